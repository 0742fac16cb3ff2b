"""The page of a sweep or of a search for capacities: what each case costs, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from twinserve.reports.drawing import INK, MUTED, Figure, base_axis, base_layout
from twinserve.reports.html import contents, html_page, section, side_by_side
from twinserve.reports.runs import COLORS, style_of
from twinserve.reports.tables import sortable_table
from twinserve.reports.text import count, plain
from twinserve.reports.text import number as number_of

_KEPT, _MISSED = COLORS[:2]
_UNITS = {"rate": "requests/s", "session_rate": "sessions/s"}
"""Of swept fields whose names do not say it."""
_LOADS = ("rate", "rate_scale", "session_rate", "replicas")
"""Fields that say how much is asked of how many, drawn before others."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and the interval that holds it with a confidence of 95%; None with one seed."""

    mean: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    """A column that a figure draws: its title, which names the unit, and a limit that it should stay under."""

    column: str
    title: str
    limit: float | None = None

    @property
    def unit(self) -> str:
        """The unit as it stands behind a number."""
        _, comma, unit = self.title.rpartition(", ")
        return f" {unit}" if comma else ""


@dataclass(frozen=True)
class Tried:
    """A point of a search.

    Attributes:
        at: what is sought, such as a rate.
        values: what was found there, by column.
        keeps: whether every seed that was run there keeps the objective.
    """

    at: float
    values: Mapping[str, Estimate]
    keeps: bool


@dataclass(frozen=True)
class PageCase:
    """One case as the page shows it.

    Attributes:
        varied: the fields in which cases differ.
        values: what was found, by column.
        keeps: whether it keeps the objective in every seed; None without one.
        words: what else there is to say, by column.
        tried: of a search, what was run on the way.
        sought: of a search, the column that holds what it found.
    """

    varied: Mapping[str, Any]
    values: Mapping[str, Estimate]
    keeps: bool | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    tried: Sequence[Tried] = ()
    sought: str | None = None

    @property
    def label(self) -> str:
        """The varied fields in words."""
        return ", ".join(f"{name} {plain(value)}" for name, value in self.varied.items()) or "the only case"

    def value(self, axis: Axis) -> float | None:
        """What was found for an axis; None where nothing was."""
        return self.values.get(axis.column, Estimate(None)).mean


def sweep_page(
    title: str,
    remarks: Sequence[str],
    cases: Sequence[PageCase],
    shared: Mapping[str, Any],
    across: Axis,
    upwards: Sequence[Axis],
) -> str:
    """A self-contained HTML page; the same arguments give the same text.

    Args:
        title: what was swept, in words.
        remarks: sentences below the title.
        shared: the fields that all cases have.
        across: what all figures have on their x axis; less of it is better.
        upwards: a figure each, with this on its y axis; less of it is better.
    """
    said = "".join(f'<p class="remark">{escape(remark)}</p>\n' for remark in (*_verdicts(cases, across), *remarks))
    parts = [("Cases", _case_table(cases))]
    if searches := [_search_figure(f"search-{n}", cases, axis) for n, axis in enumerate(upwards)]:
        parts += [("What the search tried", side_by_side(searches))] if any(searches) else []
    for number, name in enumerate(swept_fields(cases)):
        figures = [_field_figure(f"field-{number}-{n}", cases, name, axis) for n, axis in enumerate(upwards)]
        parts.append((f"By {escape(name)}", side_by_side(figures)))
    if len(cases) > 1:
        paretos = [_pareto_figure(f"pareto-{n}", cases, across, axis) for n, axis in enumerate(upwards)]
        parts.append(("What costs what", side_by_side(paretos)))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(plain(value))}</td></tr>' for name, value in shared.items()
    )
    table = f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'
    parts.append(
        (
            "Shared",
            f"<details><summary>{count(len(shared), 'field')} that all cases share</summary>\n{table}\n</details>\n",
        )
    )
    head = f"<header>\n<h1>{escape(title)}</h1>\n{said}</header>\n{contents(name for name, _ in parts)}"
    return html_page(title, [head, *(section(name, content) for name, content in parts)])


def _verdicts(cases: Sequence[PageCase], across: Axis) -> list[str]:
    """How many cases keep the objective, and the cheapest of them; nothing where there is no objective, or one capacity
    that was found."""
    if all(case.keeps is None for case in cases) or (len(cases) == 1 and cases[0].sought and cases[0].keeps):
        return []
    kept = [case for case in cases if case.keeps]
    if not kept:
        return ["No case keeps the objective."]
    said = [f"{len(kept)} of {count(len(cases), 'case')} {'keeps' if len(cases) == 1 else 'keep'} the objective."]
    known = [(value, number, case) for number, case in enumerate(kept) if (value := case.value(across)) is not None]
    if len(known) > 1:
        value, _, case = min(known, key=lambda item: item[:2])
        said.append(f"The cheapest of them: {case.label}, {across.title} {number_of(value)}.")
    return said


def swept_fields(cases: Sequence[PageCase]) -> list[str]:
    """The varied fields that are numbers, with two values or more; what says how much comes first."""
    names = dict.fromkeys(name for case in cases for name in case.varied)
    numeric = []
    for name in names:
        values = [case.varied[name] for case in cases if name in case.varied]
        if all(type(value) in (int, float) for value in values) and len(set(values)) > 1:
            numeric.append(name)
    return sorted(numeric, key=lambda name: (name not in _LOADS, list(names).index(name)))


def _field_figure(name: str, cases: Sequence[PageCase], swept: str, axis: Axis) -> Figure | None:
    """What was found against a field that was swept, a line for each choice of the others."""
    lines: dict[str, list[Tried]] = {}
    for case in cases:
        if swept in case.varied and case.value(axis) is not None:
            others = {other: value for other, value in case.varied.items() if other != swept}
            label = ", ".join(f"{other} {plain(value)}" for other, value in others.items())
            lines.setdefault(label, []).append(Tried(case.varied[swept], case.values, case.keeps is not False))
    across = f"{swept}, {_UNITS[swept]}" if swept in _UNITS else swept
    return _curves(name, lines, {}, across, axis, "Look for the knee: the value from which the curve rises steeply.")


def _search_figure(name: str, cases: Sequence[PageCase], axis: Axis) -> Figure | None:
    """What a search found on its way to each capacity, with the limit and the capacity."""
    lines = {case.label: [one for one in case.tried if one.values[axis.column].mean is not None] for case in cases}
    found = {case.label: case.values[case.sought].mean for case in cases if case.sought is not None}
    sought = next((case.sought for case in cases if case.sought is not None), "")
    caption = "Look at how steeply the curve crosses the limit: it is how much the capacity would move with it."
    return _curves(name, {label: of for label, of in lines.items() if of}, found, sought, axis, caption)


def _curves(
    name: str,
    lines: Mapping[str, Sequence[Tried]],
    found: Mapping[str, float | None],
    across: str,
    axis: Axis,
    caption: str,
) -> Figure | None:
    """Lines of what was found for an axis, with marks that say which points miss the objective."""
    if not any(lines.values()):
        return None
    data: list[dict[str, Any]] = []
    for place, (label, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda one: one.at)
        style = style_of(place, is_real=place < len(COLORS))
        estimates = [one.values[axis.column] for one in ordered]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(label) or axis.title,
                "x": [one.at for one in ordered],
                "y": [estimate.mean for estimate in estimates],
                "line": {"color": style.full, "dash": style.dash, "width": 1.6},
                "marker": {
                    "size": 8,
                    "symbol": [
                        style.symbol if one.keeps else f"{style.symbol.removesuffix('-open')}-open" for one in ordered
                    ],
                },
                "hovertemplate": f"{escape(across)} %{{x:,.4~g}}: %{{y:.4~g}}<extra>{escape(label)}</extra>",
            }
            | _error_bars(estimates, style.full)
        )
    layout = _layout(axis, [y for trace in data for y in trace["y"]])
    layout["xaxis"] = base_axis(escape(across), rangemode="tozero", hoverformat=",.4~g")
    layout["showlegend"] = len(data) > 1
    notes = _limit_notes(axis, layout)
    for place, (label, value) in enumerate(found.items()):
        if value is not None and label in lines:
            line = {"color": COLORS[place % len(COLORS)], "width": 1, "dash": "1px,3px"}
            layout.setdefault("shapes", []).append(
                {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": value, "x1": value, "line": line}
            )
    if any(value is not None for value in found.values()):
        notes.append("Upright dotted lines are the capacities.")
    if not all(one.keeps for points in lines.values() for one in points):
        notes.append("Open marks miss the objective.")
    return Figure(name, f"{axis.title} by {escape(across)}", caption, data, layout, notes)


def _error_bars(estimates: Sequence[Estimate], color: str) -> dict[str, Any]:
    """Intervals as plotly draws them, none below 0; nothing where there are none."""
    halves = [one.interval[1] - (one.mean or 0) if one.interval is not None else None for one in estimates]
    if None in halves or not halves:
        return {}
    below = [min(half or 0.0, one.mean or 0.0) for half, one in zip(halves, estimates, strict=True)]
    return {
        "error_y": {"type": "data", "symmetric": False, "array": halves, "arrayminus": below}
        | {"color": color, "thickness": 1, "width": 3}
    }


def _layout(axis: Axis, values: Sequence[float]) -> dict[str, Any]:
    """A figure whose y axis begins at 0, or is logarithmic where values span a large factor."""
    values = [*values, *([axis.limit] if axis.limit is not None else [])]
    wide = min(values) > 0 and max(values) > 20 * min(values)
    if wide:
        ticks = _ticks(min(values), max(values))
        texts = [f"{tick:,.10g}" for tick in ticks]
        y_axis = base_axis(axis.title, type="log", tickvals=ticks, ticktext=texts)
    else:
        y_axis = base_axis(axis.title, rangemode="tozero")
    return base_layout(360, yaxis=y_axis, hovermode="closest")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around the values of a logarithmic axis: 1, 2 and 5 of each power of ten, or 1 alone of many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    digits = (1, 2, 5) if len(powers) < 7 else (1,)
    return [float(f"{digit}e{power}") for power in powers for digit in digits]


def _limit_notes(axis: Axis, layout: dict[str, Any]) -> list[str]:
    """Draw the limit, if there is one, and say so."""
    if axis.limit is None:
        return []
    line = {"color": MUTED, "width": 1, "dash": "4px,3px"}
    layout["shapes"] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": axis.limit, "y1": axis.limit, "line": line}
    ]
    return [f"The dashed line is the limit, {number_of(axis.limit)}{axis.unit}."]


def _case_table(cases: Sequence[PageCase]) -> str:
    heads, rows = case_columns(cases)
    values = list(dict.fromkeys(name for case in cases for name in case.values))
    num_varied = heads.index(values[0]) if values else len(heads)
    cells = [
        [(_sort_key(case, heads[at], at < num_varied), text) for at, text in enumerate(row)]
        for case, row in zip(cases, rows, strict=True)
    ]
    table = sortable_table([(escape(head), None) for head in heads], cells)
    caption = "Means over seeds, with the 95% interval of the mean where there are several. Columns sort at a click."
    if any(case.keeps is not None for case in cases):
        caption += (
            " A case keeps the objective if each of its seeds does. An interval may reach beyond a limit for all that: "
            "it says where the mean of many more seeds would lie."
        )
    return f'{table}\n<p class="caption">{caption}</p>\n'


def _sort_key(case: PageCase, head: str, is_varied: bool) -> Any:
    if is_varied:
        return case.varied.get(head)
    return case.words[head] if head in case.words else case.values.get(head, Estimate(None)).mean


def case_columns(cases: Sequence[PageCase]) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of a table of cases: varied fields, what was found, what else there is to say."""
    varied, values, words = (
        list(dict.fromkeys(name for case in cases for name in getattr(case, part)))
        for part in ("varied", "values", "words")
    )
    rows = [
        [
            *(plain(case.varied[name]) if name in case.varied else "–" for name in varied),
            *(_estimated(case.values.get(name, Estimate(None))) for name in values),
            *(case.words.get(name, "–") for name in words),
        ]
        for case in cases
    ]
    return [*varied, *values, *words], rows


def _estimated(value: Estimate) -> str:
    if value.interval is None:
        return number_of(value.mean)
    half = float(f"{value.interval[1] - (value.mean or 0):.2g}")
    return f"{number_of(value.mean)} ± {half:,.10g}"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points of which no other is as good in both and better in one, from left to right.

    Less is better. Of equal points the first stands for all.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i], i)):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def _pareto_figure(name: str, cases: Sequence[PageCase], across: Axis, axis: Axis) -> Figure | None:
    """Every case as a dot, and a line through those that nothing else beats in both."""
    known = [
        (case, x, y) for case in cases if (x := case.value(across)) is not None and (y := case.value(axis)) is not None
    ]
    if len(known) < 2:
        return None
    data: list[dict[str, Any]] = []
    for keeps, color, words in ((True, _KEPT, "keeps the objective"), (False, _MISSED, "misses it"), (None, INK, "")):
        dots = [(case, x, y) for case, x, y in known if case.keeps is keeps]
        if not dots:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": words,
                "showlegend": bool(words),
                "x": [x for _, x, _ in dots],
                "y": [y for _, _, y in dots],
                "text": [escape(case.label) for case, _, _ in dots],
                "marker": {"color": color, "size": 9, "symbol": "x" if keeps is False else "circle"},
                "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
            }
        )
        data[-1] |= _error_bars([case.values[axis.column] for case, _, _ in dots], color)
    front = [known[index] for index in pareto_front([(x, y) for _, x, y in known])]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "nothing is better in both",
            "x": [x for _, x, _ in front],
            "y": [y for _, _, y in front],
            "line": {"color": MUTED, "width": 1.5, "shape": "hv"},
            "hoverinfo": "skip",
        }
    )
    layout = _layout(axis, [y for _, _, y in known])
    layout["xaxis"] = base_axis(across.title, range=[0, max(x for _, x, _ in known) * 1.1 or 1])
    notes = _limit_notes(axis, layout)
    left_out = len(cases) - len(known)
    if left_out:
        notes.append(f"Not drawn: {left_out} of {len(cases)} cases, for which one of the two is not known.")
    caption = "Look to the lower left: cheap and fast. Each dot is a case; hover to see which."
    return Figure(name, f"{axis.title} against {across.title}", caption, data, layout, notes)
