"""Figures of a page: each a plotly figure with its name, its caption and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from twinserve.reports.runs import Run
from twinserve.reports.text import count, number
from twinserve.reports.thin import BUCKETS, CLOUD_POINTS, CURVE_POINTS, LINE_POINTS, thin_cloud, thin_curve, thin_line

INK, MUTED, RULE, GRID = "#1b1f24", "#57606a", "#b9c0c8", "#eceff2"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

LATENCIES = {
    "ttft_s": ("Time to first token", "Look at how far the right tail reaches: it is what waiting for admission costs."),
    "tpot_s": ("Time per output token", "Look for a shift to the right: full batches slow every answer down."),
    "itl_s": ("Inter-token latency", "Look for a second rise: gaps in which other requests' prompts were computed."),
    "e2e_s": ("End-to-end latency", "Look at the distance between the curves: both waiting and decoding add to it."),
}

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """What is drawn, and what is said below it.

    Attributes:
        id: unique on the page.
        title: a short name; empty where the section's heading says it all.
        caption: a sentence that says what to look for.
        data, layout: plotly's.
        notes: what was thinned or left out, a sentence each.
    """

    id: str
    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def json(self) -> str:
        """The figure as plotly.js takes it; equal figures give equal texts, and none can end a script element."""
        from plotly.graph_objects import Figure as PlotlyFigure

        figure = PlotlyFigure(data=self.data, layout=self.layout | {"template": "none"})
        text: str = figure.to_json()
        return text.replace("<", "\\u003c")


def _layout(height: int, **changes: Any) -> dict[str, Any]:
    """What all figures have in common."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 34, "b": 48},
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": RULE, "font": {"family": FONT, "size": 12, "color": INK}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
        "showlegend": True,
        **changes,
    }


def _axis(title: str, **changes: Any) -> dict[str, Any]:
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
