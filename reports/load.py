"""Load over time: what came in and went out, and how much of it kept the limits."""

from __future__ import annotations

from typing import Any

import numpy as np

from twinserve.reports.asked import Asked
from twinserve.reports.drawing import MUTED, Figure, Trace, base_axis, stacked_layout, time_axis
from twinserve.reports.runs import Run
from twinserve.reports.text import count, duration
from twinserve.traces.statistics import load_of

_STRETCHES = 60
_NICE = (1, 2, 5, 10, 15, 30)


def load_figure(runs: list[Run], asked: Asked | None) -> Figure | None:
    """Requests a second by their arrival; with an objective, goodput and attainment; None where nobody came.

    Goodput and attainment of a stretch of time are those of the requests that arrived in it.
    """
    drawn = [run for run in runs if run.record.requests]
    span_s = max((_arrivals_s(run).max(initial=0.0) for run in drawn), default=0.0)
    if not drawn or span_s <= 0:
        return None
    edges = stretches(float(span_s))
    width_s = float(edges[1])
    panels = [(120, base_axis("arrivals<br>(requests/s)", rangemode="tozero", nticks=5))]
    if asked is not None:
        panels.append((120, base_axis("goodput<br>(requests/s)", rangemode="tozero", nticks=5)))
        panels.append((120, base_axis("attainment (%)", range=[-2, 102], tickvals=[0, 25, 50, 75, 100])))
    data: list[Trace] = []
    for run in drawn:
        arrivals_s = _arrivals_s(run)
        came, _ = np.histogram(arrivals_s, edges)
        data.append(stretch_line(run, edges, came / width_s, "y", "requests/s came in", showlegend=len(drawn) > 1))
        if asked is not None:
            good, _ = np.histogram(arrivals_s[asked.kept(run)], edges)
            with np.errstate(invalid="ignore"):
                share = np.where(came > 0, good / came * 100, np.nan)
            data.append(stretch_line(run, edges, good / width_s, "y2", "requests/s keep the limits"))
            data.append(stretch_line(run, edges, share, "y3", "% keep the limits"))
    layout = stacked_layout(panels, time_axis()) | {"hovermode": "x"}
    notes = [f"A point is {duration(width_s)} of arrivals."]
    if asked is not None and asked.share is not None:
        layout["shapes"] = [_level(asked.share * 100)]
        notes.append(f"The dashed line is what was asked for, {100 * asked.share:g}% of the requests.")
    if asked is None:
        caption = "Look for the busiest stretch: what waits, waits from there on."
    else:
        caption = "Look for stretches where goodput stays behind the arrivals: there requests miss the limits."
    return Figure("load", "", caption, data, layout, notes, is_linked=True)


def rate_of(run: Run) -> str:
    """A run's rate of arrivals and that of its busiest minute, in words; nothing where all came at once."""
    arrivals_ns = np.sort(_arrivals_ns(run))
    if not len(arrivals_ns):
        return "no requests"
    span_s, rate, busiest = load_of(arrivals_ns)
    if not span_s:
        return f"{count(len(arrivals_ns), 'request')} at once"
    return f"{rate:.4g} requests/s{'' if busiest is None else f', {busiest:.4g} in the busiest minute'}"


def _arrivals_s(run: Run) -> np.ndarray:
    return run.seconds(_arrivals_ns(run))


def _arrivals_ns(run: Run) -> np.ndarray:
    return np.fromiter((row["arrival_ns"] for row in run.requests), np.int64)


def stretches(span_s: float) -> np.ndarray:
    """The ends of equal stretches of time, of a round number of seconds, which hold a span that begins at 0."""
    width_s = _nice(span_s / _STRETCHES)
    return np.arange(0.0, max(span_s + width_s, 2 * width_s), width_s)


def _nice(seconds: float) -> float:
    """A round number of seconds, at least so many."""
    for power in range(-6, 7):
        for digit in _NICE if power == 0 else (1, 2, 5):
            if (nice := digit * 10.0**power) >= seconds:
                return nice
    return seconds


def stretch_line(run: Run, edges: np.ndarray, values: np.ndarray, y_axis: str, what: str, **changes: Any) -> Trace:
    """A run's values in stretches of time, each at the middle of its own; NaN is none.

    Args:
        what: what is said behind a value.
    """
    return {
        "type": "scatter",
        "mode": "lines",
        "name": run.text,
        "legendgroup": run.text,
        "showlegend": False,
        "x": (edges[:-1] + edges[1:]) / 2,
        "y": [None if np.isnan(value) else float(value) for value in values],
        "yaxis": y_axis,
        "line": {"color": run.style.full, "dash": run.style.dash, "width": 1.6},
        "hovertemplate": f"%{{y:.4~g}} {what}<extra>{run.text}</extra>",
    } | changes


def _level(percent: float) -> dict[str, Any]:
    line = {"color": MUTED, "width": 1, "dash": "4px,3px"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y3", "y0": percent, "y1": percent, "line": line}
