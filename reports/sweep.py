"""The page of a sweep or of a search for capacities: what each case costs, and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from twinserve.reports.drawing import INK, MUTED, Figure, base_axis, base_layout
from twinserve.reports.html import html_page, section, side_by_side
from twinserve.reports.tables import metric_table
from twinserve.reports.text import count, number, plain

_KEPT, _MISSED = "#1f5fa8", "#c4560b"


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


@dataclass(frozen=True)
class PageCase:
    """One case as the page shows it.

    Attributes:
        varied: the fields in which cases differ.
        values: what was found, by column.
        keeps: whether it keeps the objective in every seed; None without one.
        words: what else there is to say, by column.
    """

    varied: Mapping[str, Any]
    values: Mapping[str, Estimate]
    keeps: bool | None = None
    words: Mapping[str, str] = field(default_factory=dict)

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
    said = "".join(f'<p class="remark">{escape(remark)}</p>\n' for remark in remarks)
    figures = [_pareto_figure(f"pareto-{n}", cases, across, axis) for n, axis in enumerate(upwards)]
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(plain(value))}</td></tr>' for name, value in shared.items()
    )
    table = f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'
    folded = f"<details><summary>{count(len(shared), 'field')} that all cases share</summary>\n{table}\n</details>\n"
    return html_page(
        title,
        [
            f"<header>\n<h1>{escape(title)}</h1>\n{said}</header>\n",
            section("Cases", _case_table(cases)),
            section("What costs what", side_by_side(figures)),
            section("Shared", folded),
        ],
    )


def _case_table(cases: Sequence[PageCase]) -> str:
    heads, rows = case_columns(cases)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = metric_table(map(escape, heads), [f"<tbody>{body}</tbody>"])
    caption = "Means over seeds, with the 95% interval of the mean where there are several."
    return f'{table}\n<p class="caption">{caption}</p>\n'


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
        return number(value.mean)
    return f"{number(value.mean)} ± {number(value.interval[1] - (value.mean or 0))}"


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
    if not known:
        return None
    data: list[dict[str, Any]] = []
    for keeps, color, words in ((True, _KEPT, "keeps the objective"), (False, _MISSED, "misses it"), (None, INK, "")):
        dots = [(case, x, y) for case, x, y in known if case.keeps is keeps]
        if not dots:
            continue
        spread = [case.values[axis.column].interval for case, _, _ in dots]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": words,
                "showlegend": bool(words),
                "x": [x for _, x, _ in dots],
                "y": [y for _, _, y in dots],
                "text": [case.label for case, _, _ in dots],
                "marker": {"color": color, "size": 9, "symbol": "x" if keeps is False else "circle"},
                "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
            }
        )
        if all(interval is not None for interval in spread):
            halves = [high - y for (_, _, y), (_, high) in zip(dots, spread, strict=True)]  # type: ignore[misc]
            data[-1]["error_y"] = {"type": "data", "array": halves, "color": color, "thickness": 1, "width": 3}
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
    values = [y for _, _, y in known] + ([axis.limit] if axis.limit is not None else [])
    wide = min(values) > 0 and max(values) > 20 * min(values)
    layout = base_layout(
        360,
        xaxis=base_axis(across.title),
        yaxis=base_axis(axis.title, type="log") if wide else base_axis(axis.title, rangemode="tozero"),
        hovermode="closest",
    )
    if axis.limit is not None:
        layout["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": axis.limit, "y1": axis.limit}
            | {"line": {"color": _MISSED, "width": 1, "dash": "4px,3px"}}
        ]
    notes = [f"The dashed line is the limit, {number(axis.limit)}."] if axis.limit is not None else []
    left_out = len(cases) - len(known)
    if left_out:
        notes.append(f"Not drawn: {left_out} of {len(cases)} cases, for which one of the two is not known.")
    caption = "Look to the lower left: cheap and fast. Each dot is a case; hover to see which."
    return Figure(name, f"{axis.title} against {across.title}", caption, data, layout, notes)
