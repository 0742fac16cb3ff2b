"""What became of each request: a bar for its wait, its prefill and its decoding."""

from __future__ import annotations

from typing import Any

from twinserve.reports.drawing import INK, Figure, Trace, base_axis, base_layout, said_of
from twinserve.reports.runs import Run
from twinserve.reports.text import count, duration

MOST_REQUESTS, MOST_BARS = 40, 60
"""How many requests a figure shows, and how many bars, a bar for each request in each run."""

_BAR_PX, _GAP = 9, 0.7

_PHASES = (
    ("queued", "pale", "arrival_ns", "first_scheduled_ns"),
    ("prefill", "full", "first_scheduled_ns", "first_token_ns"),
    ("decode", "middle", "first_token_ns", "finish_ns"),
)

Row = dict[str, Any]


def request_figure(runs: list[Run], number_of_group: int, numbers: list[int] | None = None) -> Figure | None:
    """Each request's wait, prefill and decoding, a bar in each run; None where no request was served.

    Where there are too many, the ones shown came in around the one that waited longest for its first token; the page's
    script shows those around another that a reader chooses.

    Args:
        runs: runs of the same trace; the first one chooses the requests.
        number_of_group: tells the figures of a page apart.
        numbers: of the runs among those of the page; from 0 on unless given.
    """
    numbers = list(range(len(runs))) if numbers is None else numbers
    served = [row for row in runs[0].requests if _was_served(row)]
    if not served:
        return None
    shown, notes = _choose(served, max(8, min(MOST_REQUESTS, MOST_BARS // len(runs))))
    left_out = len(runs[0].requests) - len(shown)
    if left_out:
        notes.append(f"{count(left_out, 'request')} left out.")
    places = {row["id"]: index * (len(runs) + _GAP) for index, row in enumerate(shown)}
    data = [
        trace | {"meta": trace["meta"] | {"run": numbers[lane], "lane": lane}}
        for lane, run in enumerate(runs)
        for trace in (*_bars(run, runs, places, lane), *_preemptions(run, places, lane))
    ]
    end = len(shown) * (len(runs) + _GAP)
    y_axis = base_axis(
        "request (its row in the trace)",
        range=[end - _GAP, -1],
        tickvals=[place + (len(runs) - 1) / 2 for place in places.values()],
        ticktext=[str(request) for request in places],
        tickfont={"size": 10},
        fixedrange=True,
        showgrid=False,
        ticks="",
    )
    bars = [trace for trace in data if trace["type"] == "bar"]
    x_axis = base_axis("time since the first arrival (s)", range=_window(bars))
    layout = base_layout(round(end * _BAR_PX) + 100, xaxis=x_axis, yaxis=y_axis, hovermode="closest", barmode="overlay")
    layout["meta"] = {"runs": numbers, "most": len(shown), "gap": _GAP}
    caption = "Look for long waits (faintest), for prefills (strongest) that take long, and for preemptions (crosses)."
    return Figure(f"requests-{number_of_group}", "", caption, data, layout, notes, is_linked=True)


def _window(bars: list[Trace]) -> list[float]:
    """The time that the bars take, and a little more."""
    begin = min(start for bar in bars for start in bar["base"])
    end = max(start + length for bar in bars for start, length in zip(bar["base"], bar["x"], strict=True))
    margin = (end - begin) * 0.01
    return [begin - margin, end + margin]


def _was_served(row: Row) -> bool:
    return row["first_scheduled_ns"] is not None and row["finish_ns"] is not None


def _choose(rows: list[Row], most: int) -> tuple[list[Row], list[str]]:
    """At most so many successive requests, and what is to be said of the choice."""
    if len(rows) <= most:
        return rows, []
    waits_ns = [(row["first_token_ns"] or row["finish_ns"]) - row["arrival_ns"] for row in rows]
    longest = waits_ns.index(max(waits_ns))
    begin = min(max(0, longest - most // 2), len(rows) - most)
    said = (
        f"Shown are {most} of {count(len(rows), 'served request')}: those that came in around request "
        f"{rows[longest]['id']}, which waited longest for its first token ({duration(waits_ns[longest] / 1e9)})."
    )
    return rows[begin : begin + most], [said]


def _bars(run: Run, runs: list[Run], places: dict[int, float], lane: int) -> list[Trace]:
    """A trace a phase; a request that ended early has fewer phases."""
    rows = [row for row in run.requests if row["id"] in places and _was_served(row)]
    traces: list[Trace] = []
    for phase, shade, begin, end in _PHASES:
        spans = [(row, *span) for row in rows if (span := _span(row, begin, end))]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": said_of(run, runs, phase),
                "y": [places[row["id"]] + lane for row, *_ in spans],
                "base": [(start - run.origin_ns) / 1e9 for _, start, _ in spans],
                "x": [(stop - start) / 1e9 for _, start, stop in spans],
                "width": 0.86,
                "marker": {"color": getattr(run.style, shade), "line": {"width": 0}},
                "customdata": [_about(row) for row, *_ in spans],
                "meta": {"phase": phase},
                "hovertemplate": f"{phase} took %{{x:.4~g}} s<br>%{{customdata}}<extra>{run.text}</extra>",
            }
        )
    return traces


def _span(row: Row, begin: str, end: str) -> tuple[int, int] | None:
    """When a phase began and ended, which may be the request's own end; None where it was not reached."""
    if row[begin] is None:
        return None
    return row[begin], row["finish_ns"] if row[end] is None else row[end]


def _about(row: Row) -> str:
    return (
        f"request {row['id']}: {row['prompt_tokens']:,} prompt tokens ({row['cached_tokens']:,} cached), "
        f"{row['output_tokens']:,} of {row['max_tokens']:,} output tokens, {count(row['preemptions'], 'preemption')}"
    )


def _preemptions(run: Run, places: dict[int, float], lane: int) -> list[Trace]:
    """Crosses on the bars, if there are any."""
    if not run.preemptions:
        return []
    marks = [(time, places[id] + lane) for time, ids in run.preemptions for id in ids if id in places]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [time for time, _ in marks],
        "y": [place for _, place in marks],
        "marker": {"symbol": "x-thin", "size": 6, "line": {"color": INK, "width": 1.3}},
        "hovertemplate": f"preempted at %{{x:.3f}} s<extra>{run.text}</extra>",
        "showlegend": False,
        "meta": {"phase": "preempted"},
    }
    return [trace]
