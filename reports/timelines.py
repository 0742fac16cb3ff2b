"""What a run did over time: its batch and its KV blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from twinserve.reports.drawing import Figure, Trace, axis_names, base_axis, said_of, stacked_layout, time_axis
from twinserve.reports.runs import Run
from twinserve.reports.text import count
from twinserve.reports.thin import BUCKETS, LINE_POINTS, thin_line

_MEANING = {
    "running": "running",
    "waiting": "waiting",
    "tokens": "tokens in all",
    "decode_tokens": "decode tokens",
    "used_blocks": "blocks in use",
}


def batch_figure(runs: list[Run]) -> Figure | None:
    """Requests running and waiting, and each step's tokens, over time; None where no record knows them."""
    drawn = [run for run in runs if run.has_decisions]
    if not drawn:
        return None
    axes = axis_names(2 + len(drawn))
    panels = [(120, _count_axis(drawn, what)) for what in ("running", "waiting")]
    most = max(int(run.steps.totals["tokens"].max(initial=1)) for run in drawn)
    data: list[Trace] = []
    for run, tokens_axis in zip(drawn, axes[2:], strict=True):
        data.append(
            _line(run, "running", "y", legendgroup=run.label, name=run.label, showlegend=len(drawn) > 1, legendrank=1)
        )
        data.append(_line(run, "waiting", "y2", legendgroup=run.label, name=run.label, showlegend=False))
        title = said_of(run, drawn, "tokens") + "<br>in the step"
        panels.append((140, base_axis(title, nticks=5, range=[0, most * 1.05])))
        data.append(_area(run, "tokens", tokens_axis, run.style.middle, said_of(run, drawn, "prompt tokens")))
        data.append(_area(run, "decode_tokens", tokens_axis, run.style.full, said_of(run, drawn, "decode tokens")))
    caption = (
        "Look for requests that wait while few are running, and for prompt tokens (pale, on top of the decode tokens) "
        "that fill whole steps."
    )
    layout = stacked_layout(panels, time_axis()) | {"hovermode": "x"}
    return Figure("batch", "", caption, data, layout, _thinned_note(drawn) + _missing_note(runs))


def kv_figure(runs: list[Run]) -> Figure | None:
    """Used KV blocks over time, and when requests were preempted; None where no record knows them."""
    drawn = [run for run in runs if run.has_decisions]
    if not drawn:
        return None
    data = [_line(run, "used_blocks", "y", name=run.label, showlegend=len(drawn) > 1) for run in drawn]
    panels = [(200, _blocks_axis(drawn))]
    notes = [_peak_note(drawn), *_thinned_note(drawn), *_missing_note(runs)]
    if any(run.preemptions for run in drawn):
        labels = [run.label for run in drawn] if len(drawn) > 1 else ["preempted"]
        lanes = {"tickvals": list(range(len(drawn))), "ticktext": labels, "range": [len(drawn) - 0.5, -0.5]}
        panels.append((22 * len(drawn), base_axis("", ticks="", showgrid=False, showline=False, **lanes)))
        data += [_preemption_marks(run, lane) for lane, run in enumerate(drawn)]
    if any(len(run.preemptions) > LINE_POINTS for run in drawn):
        notes.append(f"Preemptions that lie close together share a mark: at most {LINE_POINTS:,} a run.")
    caption = (
        "Look for a curve that stays at the end of the pool: from there on requests wait, or are preempted (upright "
        "marks) and computed again."
    )
    return Figure("kv", "", caption, data, stacked_layout(panels, time_axis()) | {"hovermode": "x"}, notes)


def _missing_note(runs: list[Run]) -> list[str]:
    """A sentence that says whose steps cannot be drawn, if there is any such run."""
    missing = [run.label for run in runs if not run.has_decisions]
    return [f"Not drawn, because its record keeps no decisions: {', '.join(missing)}."] if missing else []


def _over_time(run: Run, total: str) -> tuple[np.ndarray, np.ndarray]:
    """A line that holds each step's value until the next one starts, and 0 while there is nothing to do; thinned."""
    x = np.concatenate([run.steps.start_s, run.idle_from_s])
    y = np.concatenate([run.steps.totals[total], np.zeros(len(run.idle_from_s), dtype=np.int64)])
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    kept = thin_line(x, y)
    return x[kept], y[kept]


def _line(run: Run, total: str, y_axis: str, **changes: Any) -> Trace:
    x, y = _over_time(run, total)
    line = {"color": run.style.full, "dash": run.style.dash, "width": 1.4, "shape": "hv"}
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "yaxis": y_axis,
        "line": line,
        "hovertemplate": f"%{{y:,}} {_MEANING[total]}<extra>{run.label}</extra>",
    } | changes


def _area(run: Run, total: str, y_axis: str, color: str, name: str) -> Trace:
    line = {"color": color, "width": 0.5, "shape": "hv"}
    return _line(run, total, y_axis, name=name, line=line, fill="tozeroy", fillcolor=color)


def _thinned_note(runs: list[Run]) -> list[str]:
    longest = max(len(run.steps.start_s) for run in runs)
    if longest + max(len(run.idle_from_s) for run in runs) <= LINE_POINTS:
        return []
    return [
        f"Thinned: of up to {count(longest, 'step')} a line shows at most {LINE_POINTS:,} points, the first, lowest, "
        f"highest and last of each of {BUCKETS} equal stretches of time."
    ]


def _count_axis(runs: list[Run], total: str) -> dict[str, Any]:
    """The axis of a number of requests; its ticks are whole."""
    most = max(int(run.steps.totals[total].max(initial=0)) for run in runs)
    ticks = {"dtick": 1} if most <= 4 else {"nticks": 5}
    return base_axis(f"requests<br>{total}", range=[0, max(1, most) * 1.05], **ticks)


def _blocks_axis(runs: list[Run]) -> dict[str, Any]:
    """The axis of used blocks, with shares of the pool where all runs have the same."""
    pools = {run.pool for run in runs}
    pool = pools.pop() if len(pools) == 1 else None
    if pool is None:
        return base_axis("used KV blocks", rangemode="tozero", nticks=6)
    ticks = [pool * quarter / 4 for quarter in range(5)]
    texts = ["0", *(f"{round(tick):,}<br>{tick / pool:.0%}" for tick in ticks[1:])]
    return base_axis("used KV blocks", range=[0, pool * 1.04], tickvals=ticks, ticktext=texts)


def _peak_note(runs: list[Run]) -> str:
    peaks = []
    for run in runs:
        most = int(run.steps.totals["used_blocks"].max(initial=0))
        pool = "a pool without end" if run.pool is None else f"{run.pool:,} ({most / run.pool:.0%})"
        peaks.append(said_of(run, runs, f"{most:,} of {pool}", ": "))
    preempted = [said_of(run, runs, f"{run.summary['preemptions']:,}", ": ") for run in runs]
    return f"Most blocks in use: {', '.join(peaks)}. Preemptions: {', '.join(preempted)}."


def _preemption_marks(run: Run, lane: int) -> Trace:
    """An upright mark for each decision that preempted; neighbours share one where there are too many."""
    times = np.array([time for time, _ in run.preemptions])
    sizes = np.array([len(ids) for _, ids in run.preemptions])
    if len(times) > LINE_POINTS:
        edges = np.linspace(times[0], times[-1], LINE_POINTS + 1)[1:-1]
        _, first, group = np.unique(np.searchsorted(edges, times, "right"), return_index=True, return_inverse=True)
        times, sizes = times[first], np.bincount(group, weights=sizes).astype(np.int64)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": times,
        "y": np.full(len(times), lane),
        "yaxis": "y2",
        "marker": {"symbol": "line-ns-open", "size": 12, "color": run.style.full, "line": {"width": 1.2}},
        "customdata": sizes,
        "hovertemplate": "%{customdata} preempted at %{x:.3f} s<extra></extra>",
        "showlegend": False,
    }
