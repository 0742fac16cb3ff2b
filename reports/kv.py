"""KV blocks over time: held, cached and free; what prompts found in the prefix cache; who lost their blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from twinserve.reports.drawing import Figure, Trace, axis_names, base_axis, said_of, stacked_layout, time_axis
from twinserve.reports.load import stretch_line, stretches
from twinserve.reports.runs import STORED, Run
from twinserve.reports.text import percent
from twinserve.reports.thin import LINE_POINTS, binned
from twinserve.reports.timelines import Sheet, missing_note


def kv_figure(runs: list[Run]) -> Figure | None:
    """Over time, KV blocks held, cached and free, the share of prompts found in the prefix cache, and preemptions;
    None where no record knows its blocks.

    Which free blocks are cached is known of runs that were decided again exactly, see `Run.cached`.
    """
    drawn = [run for run in runs if run.has_decisions]
    if not drawn:
        return None
    sheet = Sheet(drawn)
    panels: list[tuple[int, dict[str, Any]]] = []
    if len(drawn) > 1:
        panels.append((140, _blocks_axis(drawn, "KV blocks held")))
        for run in drawn:
            sheet.add_line(run, "used_blocks", "y", legendrank=1)
    for run in drawn:
        panels.append((150, _blocks_axis([run], said_of(run, drawn, "KV blocks", "<br>"))))
        _add_blocks(sheet, run, axis_names(len(panels))[-1])
    notes = [_blocks_note(drawn), *sheet.notes(), *missing_note(runs), *_unknown_note(drawn)]
    if any(run.outages for run in drawn):
        notes.append("The blocks of a replica count as free while it is down.")
    if looking := [run for run in drawn if run.settings.get("enable_prefix_caching") and run.summary["prompt_tokens"]]:
        panels.append((110, base_axis("prompt tokens<br>cached (%)", range=[-2, 102], tickvals=[0, 25, 50, 75, 100])))
        sheet.data += [_hit_line(run, axis_names(len(panels))[-1]) for run in looking]
        notes.append(_hit_note(looking, drawn))
    if preempting := [run for run in drawn if run.preemptions]:
        panels.append((22 * len(drawn), _lanes_axis(drawn)))
        sheet.data += [_preemption_marks(run, drawn.index(run), axis_names(len(panels))[-1]) for run in preempting]
    if any(len(run.preemptions) > LINE_POINTS for run in preempting):
        notes.append(f"Preemptions that lie close together share a mark: at most {LINE_POINTS:,} a run.")
    caption = (
        "Look for held blocks that stay at the end of the pool: from there on nothing stays cached, and requests wait, "
        "or are preempted (upright marks) and computed again."
    )
    layout = stacked_layout(panels, time_axis()) | {"hovermode": "x"}
    return Figure("kv", "", caption, sheet.data, layout, notes, sheet.detail(), is_linked=True)


def _add_blocks(sheet: Sheet, run: Run, y_axis: str) -> None:
    """The blocks of a run as areas: those held, above them the cached ones, above these the other free ones."""
    areas = [("used_blocks", run.style.full, "held")]
    if run.cached:
        areas.insert(0, (STORED, run.style.middle, "cached"))
    if run.pool is not None:
        sheet.add_level(run, run.pool, y_axis, "free" if run.cached else "free or cached")
    sheet.add_areas(run, y_axis, areas, most=("used_blocks", "most held"))


def _blocks_axis(runs: list[Run], title: str) -> dict[str, Any]:
    """The axis of blocks, with shares of the pool where all runs have the same."""
    pools = {run.pool for run in runs}
    pool = pools.pop() if len(pools) == 1 else None
    if pool is None:
        return base_axis(title, rangemode="tozero", nticks=6)
    ticks = [pool * quarter / 4 for quarter in range(5)]
    texts = ["0", *(f"{round(tick):,}<br>{tick / pool:.0%}" for tick in ticks[1:])]
    return base_axis(title, range=[0, pool * 1.04], tickvals=ticks, ticktext=texts)


def _lanes_axis(runs: list[Run]) -> dict[str, Any]:
    """The axis of preemptions, a lane a run."""
    labels = [run.text for run in runs] if len(runs) > 1 else ["preempted"]
    lanes = {"tickvals": list(range(len(runs))), "ticktext": labels, "range": [len(runs) - 0.5, -0.5]}
    return base_axis("", ticks="", showgrid=False, showline=False, **lanes)


def _blocks_note(runs: list[Run]) -> str:
    """The most blocks held, what became of the pool in the mean over time, and how many preemptions there were."""
    peaks, means = [], []
    for run in runs:
        most = int(run.over_time("used_blocks")[1].max(initial=0))
        pool = "a pool without end" if run.pool is None else f"{run.pool:,} ({most / run.pool:.0%})"
        peaks.append(said_of(run, runs, f"{most:,} of {pool}", ": "))
        if run.cached and run.pool:
            held, stored = (_mean(run, total) / run.pool for total in ("used_blocks", STORED))
            shares = f"{percent(held)} held, {percent(stored - held)} cached, {percent(1 - stored)} free"
            means.append(said_of(run, runs, shares, ": "))
    said = f" In the mean over time: {'; '.join(means)}." if means else ""
    preempted = [said_of(run, runs, f"{run.summary['preemptions']:,}", ": ") for run in runs]
    return f"Most blocks held: {', '.join(peaks)}.{said} Preemptions: {', '.join(preempted)}."


def _mean(run: Run, total: str) -> float:
    """A total in the mean over time, from the first arrival until the last request has ended."""
    x, y = run.over_time(total)
    return float(binned(x, y, 0.0, float(x[-1]), 1).mean[0])


def _unknown_note(runs: list[Run]) -> list[str]:
    """A sentence that says of which runs it is not known which free blocks were cached, if there is any."""
    unknown = [run.text for run in runs if not run.cached]
    if not unknown:
        return []
    return [f"Which free blocks were cached is not known, as it is not decided again exactly: {', '.join(unknown)}."]


def _hit_line(run: Run, y_axis: str) -> Trace:
    """Of the prompt tokens of requests that were first scheduled in a stretch of time, the share that was cached."""
    rows = [row for row in run.finished if row["first_scheduled_ns"] is not None]
    times_s = run.seconds(np.array([row["first_scheduled_ns"] for row in rows], np.int64))
    edges = stretches(float(times_s.max(initial=0.0)))
    found, asked = (
        np.histogram(times_s, edges, weights=np.array([row[name] for row in rows], np.int64))[0]
        for name in ("cached_tokens", "prompt_tokens")
    )
    with np.errstate(invalid="ignore"):
        shares = np.where(asked > 0, found / asked * 100, np.nan)
    return stretch_line(run, edges, shares, y_axis, "% of the prompt tokens cached")


def _hit_note(looking: list[Run], runs: list[Run]) -> str:
    """The share of all prompt tokens that was cached, as the summary has it."""
    shares = [run.summary["cached_tokens"] / run.summary["prompt_tokens"] for run in looking]
    said = [said_of(run, runs, percent(share), ": ") for run, share in zip(looking, shares, strict=True)]
    return f"Prompt tokens that were cached when their request was first scheduled: {', '.join(said)}."


def _preemption_marks(run: Run, lane: int, y_axis: str) -> Trace:
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
        "yaxis": y_axis,
        "marker": {"symbol": "line-ns-open", "size": 12, "color": run.style.full, "line": {"width": 1.2}},
        "customdata": sizes,
        "hovertemplate": "%{customdata} preempted at %{x:.3f} s<extra></extra>",
        "showlegend": False,
    }
