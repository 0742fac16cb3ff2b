"""What the figures of a page have in common: how they look, and what is said below them."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import dataclass, field
from typing import Any

from twinserve.reports.runs import Run

INK, MUTED, RULE, GRID, PAPER = "#1b1f24", "#57606a", "#b9c0c8", "#eceff2", "#ffffff"
"""Colors that the page's script replaces where a reader prefers dark; see `page.js`."""

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
PANEL_GAP = 18

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """What is drawn, and what is said below it.

    Attributes:
        id: unique on the page.
        title: a short name; empty where the section's heading says it all.
        caption: a sentence that says what to look for.
        data, layout: plotly's.
        notes: sentences that say what was thinned or left out, and what the figure adds up to.
        detail: what the page's script draws from when a reader zooms in or asks for a request; see `page.js`.
        is_linked: whether its x axis is the time of the run, so that it is zoomed as the others are.
    """

    id: str
    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    detail: dict[str, Any] | None = None
    is_linked: bool = False

    def json(self) -> str:
        """The figure as plotly.js takes it; equal figures give equal texts, and none can end a script element."""
        from plotly.graph_objects import Figure as PlotlyFigure

        figure = PlotlyFigure(data=self.data, layout=self.layout | {"template": "none"})
        text: str = figure.to_json()
        return text.replace("<", "\\u003c")


def packed(value: Any) -> str:
    """A value of JSON as a page holds it where it is long: gzip, base64; equal values give equal texts."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def base_layout(height: int, **changes: Any) -> dict[str, Any]:
    """The layout of a figure of so many pixels, with `changes`."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 34, "b": 48},
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": RULE, "font": {"family": FONT, "size": 12, "color": INK}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        "showlegend": True,
        **changes,
    }


def base_axis(title: str, **changes: Any) -> dict[str, Any]:
    """An axis with its title, which names the unit, and `changes`."""
    return {
        "title": {"text": title, "font": {"size": 12, "color": MUTED}, "standoff": 8},
        "tickfont": {"size": 11, "color": MUTED},
        "linecolor": RULE,
        "tickcolor": RULE,
        "ticks": "outside",
        "ticklen": 4,
        "gridcolor": GRID,
        "zeroline": False,
        "showline": True,
        **changes,
    }


def time_axis() -> dict[str, Any]:
    """The x axis of what happened over time."""
    return base_axis("time since the first arrival (s)", rangemode="tozero", hoverformat=".3f")


def stacked_layout(panels: list[tuple[int, dict[str, Any]]], x_axis: dict[str, Any]) -> dict[str, Any]:
    """A layout of panels above each other that share one x axis; zooming changes the x axis alone.

    Args:
        panels: height in pixels and y axis of each, from the top; their axes become y, y2, y3 and so on.
    """
    inner = sum(height for height, _ in panels) + PANEL_GAP * (len(panels) - 1)
    layout = base_layout(0)
    layout["height"] = inner + layout["margin"]["t"] + layout["margin"]["b"]
    top = inner
    for name, (height, y_axis) in zip(axis_names(len(panels)), panels, strict=True):
        place = {"domain": [(top - height) / inner, top / inner], "fixedrange": True}
        layout[name.replace("y", "yaxis")] = y_axis | place
        top -= height + PANEL_GAP
    return layout | {"xaxis": x_axis | {"anchor": axis_names(len(panels))[-1]}}


def axis_names(number_of_panels: int) -> list[str]:
    """The names of the y axes of stacked panels: y, y2, y3 and so on."""
    return ["y", *(f"y{index}" for index in range(2, number_of_panels + 1))]


def said_of(run: Run, runs: list[Run], what: str, between: str = " ") -> str:
    """`what`, with the run's label before it where there are several."""
    return f"{run.text}{between}{what}" if len(runs) > 1 else what
