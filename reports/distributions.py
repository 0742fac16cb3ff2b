"""How latencies and step durations are distributed."""

from __future__ import annotations

from typing import Any

import numpy as np

from twinserve.reports.asked import Asked
from twinserve.reports.drawing import MUTED, Figure, Trace, base_axis, base_layout, said_of
from twinserve.reports.runs import Run
from twinserve.reports.text import duration, time_unit
from twinserve.reports.thin import CLOUD_POINTS, CURVE_POINTS, thin_cloud, thin_curve

LATENCIES = {
    "ttft_s": (
        "Time to first token",
        "Look at how far the right tail reaches: it is time spent waiting for admission.",
    ),
    "tpot_s": ("Time per output token", "Look for a shift to the right: fuller batches slow every answer down."),
    "itl_s": ("Inter-token latency", "Look for a second rise: gaps in which the prompts of others were computed."),
    "e2e_s": ("End-to-end latency", "Look at the tail: long answers, unless the first token came late as well."),
}

_WIDE = 20
"""Values that span more than this factor are drawn on a logarithmic axis."""


def latency_figure(runs: list[Run], metric: str, asked: Asked | None = None) -> Figure | None:
    """The cumulative distribution of a latency in every run; None where no run has a value.

    Args:
        metric: "ttft_s", "tpot_s", "itl_s" or "e2e_s".
        asked: what limits are drawn.
    """
    title, caption = LATENCIES[metric]
    samples = [(run, *sample) for run in runs if len((sample := run.latencies_s(metric))[0])]
    if not samples:
        return None
    unit, scale = time_unit(max(run.summary[metric]["p99"] or 0 for run in runs))
    data = [_curve(run, values * scale, counts, unit) for run, values, counts in samples]
    for trace in data:
        trace["showlegend"] = len(runs) > 1
    what = "token gaps" if metric == "itl_s" else "requests"
    layout = base_layout(
        300,
        xaxis=_value_axis(title.lower(), unit, [values * scale for _, values, _ in samples]),
        yaxis=base_axis(f"share of {what} (%)", range=[0, 101], tickvals=[0, 25, 50, 75, 90, 100]),
        hovermode="x",
    )
    longest = max(len(values) for _, values, _ in samples)
    notes = [_quantiles(run, runs, metric) for run, _, _ in samples]
    limits = {limit for name, limit in asked.limits_s.items() if name == metric} if asked else set()
    if asked:
        limits |= {limit for name, limit in asked.terms_s.items() if name.partition(".")[0] == metric}
    for limit in sorted(limits):
        line = {"color": MUTED, "width": 1, "dash": "4px,3px"}
        layout.setdefault("shapes", []).append(
            {"type": "line", "x0": limit * scale, "x1": limit * scale, "yref": "paper", "y0": 0, "y1": 1, "line": line}
        )
        notes.append(f"The dashed line is the limit, {duration(limit)}.")
    if longest > CURVE_POINTS:
        notes.append(f"Thinned: of up to {longest:,} values a curve shows at most {CURVE_POINTS}.")
    return Figure(f"cdf-{metric.removesuffix('_s')}", title, caption, data, layout, notes)


def _quantiles(run: Run, runs: list[Run], metric: str) -> str:
    found = run.summary[metric]
    said = ", ".join(f"{name} {duration(found[name])}" for name in ("p50", "p99") if found[name] is not None)
    return said_of(run, runs, f"{said}.", ": ")


def _curve(run: Run, values: np.ndarray, counts: np.ndarray, unit: str) -> Trace:
    ranks = np.cumsum(counts)
    kept = thin_curve(values, ranks)
    x, y = values[kept], ranks[kept] / ranks[-1] * 100
    return {
        "type": "scatter",
        "mode": "lines",
        "name": run.text,
        "x": np.concatenate([x[:1], x]),
        "y": np.concatenate([[0.0], y]),
        "line": {"color": run.style.full, "dash": run.style.dash, "width": 2, "shape": "hv"},
        "hovertemplate": f"%{{y:.1f}}% within %{{x:.4g}} {unit}<extra>{run.text}</extra>",
    }


def _value_axis(title: str, unit: str, samples: list[np.ndarray]) -> dict[str, Any]:
    """A linear axis from 0, or a logarithmic one where the values span a large factor."""
    low, high = float(min(values[0] for values in samples)), float(max(values[-1] for values in samples))
    if low <= 0 or high / low <= _WIDE:
        return base_axis(f"{title} ({unit})", range=[0, high * 1.02], hoverformat=".4g")
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    digits = (1,) if len(powers) > 4 else (1, 2, 5)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    texts = [f"{tick:,g}" for tick in ticks]
    ends = [np.log10(low) - 0.02, np.log10(high) + 0.02]
    title = f"{title} ({unit}, logarithmic)"
    return base_axis(title, type="log", range=ends, tickvals=ticks, ticktext=texts, hoverformat=".4g")


def step_figures(runs: list[Run]) -> list[Figure]:
    """Duration of steps by their tokens: those with prompt tokens, and those that only decode."""
    drawn = [run for run in runs if run.has_decisions]
    figures = (
        _step_figure(
            drawn,
            with_prompt=True,
            title="Steps with prompt tokens",
            caption="Look for the slope: it is what each further prompt token costs.",
        ),
        _step_figure(
            drawn,
            with_prompt=False,
            title="Steps that only decode",
            caption="Look for steps far above the others of their size: long contexts, or a disturbance.",
        ),
    )
    return [figure for figure in figures if figure is not None]


def _step_figure(runs: list[Run], *, with_prompt: bool, title: str, caption: str) -> Figure | None:
    data: list[Trace] = []
    thinned: list[str] = []
    for run in runs:
        tokens, durations_s = run.steps.totals["tokens"], run.steps.duration_s
        chosen = ((run.steps.totals["prompt_tokens"] > 0) == with_prompt) & (tokens > 0)
        x, y = tokens[chosen], durations_s[chosen] * 1e3
        if not len(x):
            continue
        kept = thin_cloud(x, y)
        if len(x) > CLOUD_POINTS:
            thinned.append(said_of(run, runs, f"{len(kept):,} of {len(x):,} steps", ": "))
        data.append(_cloud(run, x[kept], y[kept]) | {"showlegend": len(runs) > 1})
    if not data:
        return None
    layout = base_layout(
        320,
        xaxis=base_axis("tokens in the step", rangemode="tozero"),
        yaxis=base_axis("duration (ms)", rangemode="tozero"),
        hovermode="closest",
    )
    notes = [f"Thinned, the shortest and longest kept: {', '.join(thinned)}."] if thinned else []
    return Figure("steps-prompt" if with_prompt else "steps-decode", title, caption, data, layout, notes)


def _cloud(run: Run, tokens: np.ndarray, durations_ms: np.ndarray) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": run.text,
        "x": tokens,
        "y": durations_ms,
        "marker": {"color": run.style.full, "symbol": run.style.symbol, "size": 5, "opacity": 0.55},
        "hovertemplate": f"%{{x}} tokens: %{{y:.4g}} ms<extra>{run.text}</extra>",
    }
