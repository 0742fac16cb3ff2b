"""Residuals of steps: how far a simulation's steps are from those of the run that it predicts, by kind and size."""

from __future__ import annotations

import numpy as np

from twinserve.reports.drawing import MUTED, Figure, Trace, base_axis, base_layout
from twinserve.reports.runs import Run, Steps
from twinserve.reports.text import percent

KINDS = ("decode alone", "prompts alone", "prompts beside decodes")
_LEAST = 3
"""Steps of a kind and size that each of the two runs has to have, for their means to be compared."""


def residual_figure(real: Run, sims: list[Run], number: int) -> Figure | None:
    """Mean durations of steps of a kind, of about as many tokens and about as long contexts, simulated against real.

    Steps of two runs are not the same steps, so they are compared where both runs have some alike: in cells of a factor
    of 2 of the KV tokens that are read, and of the square root of 2 of the step's tokens.

    Args:
        number: tells the figures of a page apart.
    """
    if not real.has_decisions:
        return None
    data: list[Trace] = []
    notes = []
    for sim in sims:
        if not sim.has_decisions:
            continue
        for kind, symbol in enumerate(("circle", "square", "diamond")):
            cells = _matched(real.steps, sim.steps, kind)
            if not cells:
                continue
            tokens, kv, theirs_s, ours_s, weights = (np.array(column) for column in zip(*cells, strict=True))
            error = ours_s / theirs_s - 1
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": KINDS[kind] if len(sims) == 1 else f"{sim.text} {KINDS[kind]}",
                    "x": tokens,
                    "y": error * 100,
                    "customdata": np.column_stack([kv, theirs_s * 1e3, ours_s * 1e3, weights * 100]).round(4).tolist(),
                    "marker": {
                        "color": sim.style.full,
                        "symbol": symbol,
                        "opacity": 0.75,
                        "size": np.clip(5 + 40 * np.sqrt(weights), 5, 24).round(1),
                        "line": {"width": 0},
                    },
                    "hovertemplate": "%{x:.0f} tokens, %{customdata[0]:,.0f} KV tokens: %{y:+.1f}%<br>"
                    "%{customdata[2]:.4g} ms for %{customdata[1]:.4g} ms, %{customdata[3]:.2g}% of the time"
                    f"<extra>{sim.text}</extra>",
                }
            )
            share = float(weights.sum())
            mean = float((error * weights).sum() / share) if share else None
            which = f"{sim.text}, {KINDS[kind]}" if len(sims) > 1 else KINDS[kind]
            notes.append(f"{which}: {percent(mean, signed=True)} weighted by time, {percent(share)} of the real run's.")
    if not data:
        return None
    layout = base_layout(
        320,
        xaxis=base_axis("tokens in the step (logarithmic)", type="log", dtick=1),
        yaxis=base_axis("simulated − real (%)", zeroline=True, zerolinecolor=MUTED, zerolinewidth=1),
        hovermode="closest",
    )
    caption = "Look for a kind whose marks lie off the zero line: there the latency model is wrong for it."
    return Figure(f"residuals-{number}", "Residuals of steps by kind", caption, data, layout, notes)


def _matched(real: Steps, sim: Steps, kind: int) -> list[tuple[float, float, float, float, float]]:
    """Cells that both have steps in: mean tokens, mean KV tokens, both mean durations, share of the real run's time."""
    total_s = float(real.duration_s.sum())
    theirs, ours = _cells(real, kind), _cells(sim, kind)
    matched = []
    for cell in sorted(theirs.keys() & ours.keys()):
        at, places = theirs[cell], ours[cell]
        if min(len(at), len(places)) >= _LEAST and real.duration_s[at].mean() > 0:
            kv = real.totals["kv_tokens"][at].mean() if "kv_tokens" in real.totals else 0.0
            tokens, theirs_s, ours_s = real.totals["tokens"][at], real.duration_s[at], sim.duration_s[places]
            share = float(theirs_s.sum()) / total_s
            matched.append((float(tokens.mean()), float(kv), float(theirs_s.mean()), float(ours_s.mean()), share))
    return matched


def _cells(steps: Steps, kind: int) -> dict[tuple[int, int], np.ndarray]:
    """The places of the steps of a kind, by cell."""
    tokens, prompt = steps.totals["tokens"], steps.totals["prompt_tokens"]
    kv = steps.totals.get("kv_tokens", np.zeros_like(tokens))
    kinds = np.where(prompt == 0, 0, np.where(steps.totals["decode_tokens"] == 0, 1, 2))
    chosen = np.flatnonzero((kinds == kind) & (tokens > 0))
    keys = np.column_stack([np.round(2 * np.log2(tokens[chosen])), np.round(np.log2(np.maximum(kv[chosen], 1)))])
    cells: dict[tuple[int, int], list[int]] = {}
    for place, (size, length) in zip(chosen.tolist(), keys.astype(int).tolist(), strict=True):
        cells.setdefault((size, length), []).append(place)
    return {cell: np.array(places) for cell, places in cells.items()}
