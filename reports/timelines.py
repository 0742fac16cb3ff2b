"""What a run did over time: its batch, and how lines over time are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from twinserve.reports.drawing import MUTED, Figure, Trace, axis_names, base_axis, said_of, stacked_layout, time_axis
from twinserve.reports.runs import STORED, Run
from twinserve.reports.text import count
from twinserve.reports.thin import FINE_BINS, GROUPS, LINE_POINTS, Bins, binned

_AREA_POINTS = 2 * GROUPS
"""The most points of an area that is drawn as it is: one that goes up and down more often is a comb."""

_MEANING = {
    "running": "running",
    "waiting": "waiting",
    "tokens": "tokens in all",
    "decode_tokens": "decode tokens",
    "used_blocks": "blocks held",
    STORED: "blocks held or cached",
}
Area = tuple[str, str, str]
"""A total over time, the color that fills what is below it, and what that is."""


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
        areas = [("tokens", run.style.middle, "prompt tokens"), ("decode_tokens", run.style.full, "decode tokens")]
        sheet.add_areas(run, tokens_axis, areas, most=("tokens", "most tokens of a step"))
    caption = (
        "Look for requests that wait while few are running, and for prompt tokens (fainter, on top of the decode "
        "tokens) that fill whole steps."
    )
    layout = stacked_layout(panels, time_axis()) | {"hovermode": "x"}
    notes = sheet.notes() + missing_note(runs)
    return Figure("batch", "", caption, sheet.data, layout, notes, sheet.detail(), is_linked=True)


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

    def add_areas(self, run: Run, y_axis: str, areas: list[Area], *, most: tuple[str, str]) -> None:
        """Totals as areas, each over those before it; of a long run means, and a line of the most that one of them had.

        Args:
            most: which of them, and what is said of the line.
        """
        for total, color, what in areas:
            line, how = self._line_of(run, total, _AREA_POINTS)
            hover = f"%{{y:,.4~g}} {_MEANING[total]}{how}<extra>{run.text}</extra>"
            area = {"fill": "tozeroy", "fillcolor": color, "name": said_of(run, self._runs, what), "yaxis": y_axis}
            self._draw(run, line, "mean", width=0.5, color=color, hovertemplate=hover, **area)
            if isinstance(line, Bins) and total == most[0]:
                name, hover = said_of(run, self._runs, most[1]), "%{y:,} at most<extra></extra>"
                self._draw(run, line, "high", width=0.8, color=MUTED, name=name, hovertemplate=hover, yaxis=y_axis)

    def add_level(self, run: Run, value: int, y_axis: str, what: str) -> None:
        """What lies below a value that stays, behind the areas of a run."""
        x = np.array([0.0, run.over_time("used_blocks")[0][-1]])
        area = {"fill": "tozeroy", "fillcolor": run.style.pale, "name": said_of(run, self._runs, what)}
        quiet = {"hoverinfo": "skip", "yaxis": y_axis}
        self._draw(run, (x, np.array([value, value])), "mean", width=0.5, color=run.style.pale, **area, **quiet)

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


def missing_note(runs: list[Run]) -> list[str]:
    """A sentence that says whose steps cannot be drawn, if there is any such run."""
    missing = [run.text for run in runs if not run.has_decisions]
    return [f"Not drawn, because its record keeps no decisions: {', '.join(missing)}."] if missing else []


def _count_axis(runs: list[Run], total: str) -> dict[str, Any]:
    """The axis of a number of requests; its ticks are whole."""
    most = max(int(run.over_time(total)[1].max(initial=0)) for run in runs)
    ticks = {"dtick": 1} if most <= 4 else {"nticks": 5}
    return base_axis(f"requests<br>{total}", range=[0, max(1, most) * 1.05], **ticks)
