"""What a run did over time: its batch and its KV blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from twinserve.reports.drawing import MUTED, Figure, Trace, axis_names, base_axis, said_of, stacked_layout, time_axis
from twinserve.reports.runs import Run
from twinserve.reports.text import count
from twinserve.reports.thin import FINE_BINS, GROUPS, LINE_POINTS, Bins, binned

_AREA_POINTS = 2 * GROUPS
"""The most points of an area that is drawn as it is: one that goes up and down more often is a comb."""

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
    most = max(int(run.over_time("tokens")[1].max(initial=1)) for run in drawn)
    sheet = Sheet(drawn)
    for run, tokens_axis in zip(drawn, axes[2:], strict=True):
        sheet.add_line(run, "running", "y", showlegend=len(drawn) > 1, legendrank=1)
        sheet.add_line(run, "waiting", "y2", showlegend=False)
        title = said_of(run, drawn, "tokens") + "<br>in the step" + ("s" if len(run.parts) > 1 else "")
        panels.append((140, base_axis(title, nticks=5, range=[0, most * 1.05], tickformat="~s")))
        sheet.add_areas(run, tokens_axis)
    caption = (
        "Look for requests that wait while few are running, and for prompt tokens (fainter, on top of the decode "
        "tokens) that fill whole steps."
    )
    layout = stacked_layout(panels, time_axis()) | {"hovermode": "x"}
    notes = sheet.notes() + _missing_note(runs)
    return Figure("batch", "", caption, sheet.data, layout, notes, sheet.detail(), is_linked=True)


def kv_figure(runs: list[Run]) -> Figure | None:
    """Used KV blocks over time, and when requests were preempted; None where no record knows them."""
    drawn = [run for run in runs if run.has_decisions]
    if not drawn:
        return None
    sheet = Sheet(drawn)
    for run in drawn:
        sheet.add_line(run, "used_blocks", "y", showlegend=len(drawn) > 1)
    panels = [(200, _blocks_axis(drawn))]
    notes = [_peak_note(drawn), *sheet.notes(), *_missing_note(runs)]
    if any(run.preemptions for run in drawn):
        labels = [run.text for run in drawn] if len(drawn) > 1 else ["preempted"]
        lanes = {"tickvals": list(range(len(drawn))), "ticktext": labels, "range": [len(drawn) - 0.5, -0.5]}
        panels.append((22 * len(drawn), base_axis("", ticks="", showgrid=False, showline=False, **lanes)))
        sheet.data += [_preemption_marks(run, lane) for lane, run in enumerate(drawn)]
    if any(len(run.preemptions) > LINE_POINTS for run in drawn):
        notes.append(f"Preemptions that lie close together share a mark: at most {LINE_POINTS:,} a run.")
    caption = (
        "Look for a curve that stays at the end of the pool: from there on requests wait, or are preempted (upright "
        "marks) and computed again."
    )
    layout = stacked_layout(panels, time_axis()) | {"hovermode": "x"}
    return Figure("kv", "", caption, sheet.data, layout, notes, sheet.detail(), is_linked=True)


class Sheet:
    """Lines of runs over time: whole where they are short, else a band from the lowest to the highest of each stretch
    of time around their mean, which the page's script draws finer as a reader zooms in.

    Attributes:
        data: plotly's traces.
    """

    def __init__(self, runs: list[Run]):
        self.data: list[Trace] = []
        self._runs = runs
        self._fine: list[dict[str, Any]] = []
        self._longest = 0

    def add_line(self, run: Run, total: str, y_axis: str, **changes: Any) -> None:
        """A total of a run, as a line or as a band."""
        line, how = self._line_of(run, total)
        changes = {"name": run.text, "legendgroup": run.text, "yaxis": y_axis} | changes
        if isinstance(line, Bins):
            quiet = changes | {"showlegend": False, "hoverinfo": "skip"}
            self._draw(run, line, "low", width=0, **quiet)
            self._draw(run, line, "high", width=0, **quiet, fill="tonexty", fillcolor=run.style.pale)
        hover = f"%{{y:,.4~g}} {_MEANING[total]}{how}<extra>{run.text}</extra>"
        self._draw(run, line, "mean", width=1.4, **changes, hovertemplate=hover)

    def add_areas(self, run: Run, y_axis: str) -> None:
        """The tokens of steps, those of decodes over those of all; of a long run means, below a line of the most."""
        for total, color, what in (
            ("tokens", run.style.middle, "prompt tokens"),
            ("decode_tokens", run.style.full, "decode tokens"),
        ):
            line, how = self._line_of(run, total, _AREA_POINTS)
            hover = f"%{{y:,.4~g}} {_MEANING[total]}{how}<extra>{run.text}</extra>"
            area = {"fill": "tozeroy", "fillcolor": color, "name": said_of(run, self._runs, what), "yaxis": y_axis}
            self._draw(run, line, "mean", width=0.5, color=color, hovertemplate=hover, **area)
            if isinstance(line, Bins) and total == "tokens":
                name, hover = said_of(run, self._runs, "most tokens of a step"), "%{y:,} at most<extra></extra>"
                self._draw(run, line, "high", width=0.8, color=MUTED, name=name, hovertemplate=hover, yaxis=y_axis)

    def _line_of(
        self, run: Run, total: str, most: int = LINE_POINTS
    ) -> tuple[tuple[np.ndarray, np.ndarray] | Bins, str]:
        """A total over time, and what is to be said of its values."""
        x, y = run.over_time(total)
        self._longest = max(self._longest, len(x))
        if len(x) <= most:
            return (x, y), ""
        return binned(x, y, 0.0, float(x[-1])), " in the mean"

    def _draw(
        self,
        run: Run,
        line: tuple[np.ndarray, np.ndarray] | Bins,
        kind: str,
        *,
        width: float,
        color: str | None = None,
        **changes: Any,
    ) -> None:
        if isinstance(line, Bins):
            values = np.round(getattr(line, kind), 2).tolist()
            self._fine.append({"at": len(self.data), "kind": kind, "values": values})
            self._fine[-1] |= {"begin": line.begin_s, "width": line.width_s}
            drawn = line.grouped()
            x, y = drawn.starts_s, getattr(drawn, kind)
        else:
            x, y = line
        dash = run.style.dash if color is None else "solid"
        style = {"color": color or run.style.full, "dash": dash, "width": width, "shape": "hv"}
        self.data.append({"type": "scatter", "mode": "lines", "x": x, "y": y, "line": style} | changes)

    def detail(self) -> dict[str, Any] | None:
        """What the script draws finer."""
        return {"bins": self._fine, "groups": GROUPS} if self._fine else None

    def notes(self) -> list[str]:
        """That lines were thinned, if they were."""
        if not self._fine:
            return []
        return [
            f"Thinned: of up to {count(self._longest, 'change')} a line shows the mean, its band the lowest and the "
            f"highest, of {GROUPS} equal stretches of time; zooming shows {FINE_BINS:,}."
        ]


def _missing_note(runs: list[Run]) -> list[str]:
    """A sentence that says whose steps cannot be drawn, if there is any such run."""
    missing = [run.text for run in runs if not run.has_decisions]
    return [f"Not drawn, because its record keeps no decisions: {', '.join(missing)}."] if missing else []


def _count_axis(runs: list[Run], total: str) -> dict[str, Any]:
    """The axis of a number of requests; its ticks are whole."""
    most = max(int(run.over_time(total)[1].max(initial=0)) for run in runs)
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
        most = int(run.over_time("used_blocks")[1].max(initial=0))
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
