"""Why requests waited: the causes of all requests' times, and of the slowest ones'."""

from __future__ import annotations

import shlex
from html import escape
from typing import Any

from twinserve.reports.runs import Run
from twinserve.reports.tables import sortable_table
from twinserve.reports.terms import term
from twinserve.reports.text import count, number, percent
from twinserve.traces.runs.waits import CAUSES, Waited, slowest_of, sums_of

SLOWEST = 10
"""Requests that are told of by themselves."""


def waits_tables(run: Run, waits: list[Waited] | None) -> str:
    """What the times of a run's requests went into, summed up by cause, and of those that waited longest for a first
    token one by one; in nanoseconds what each cell sorts by."""
    if waits is None:
        return '<p class="note">Not known: the run is not decided again exactly.</p>\n'
    if not waits:
        return '<p class="note">No request has ended.</p>\n'
    slowest = slowest_of([one for one in waits if one.ttft_ns], SLOWEST)
    parts = [_of_all(waits)]
    if slowest:
        parts.append(f"<h3>The {count(len(slowest), 'request')} that waited longest for a first token</h3>\n")
        parts.append(_of_each(slowest))
    again = escape(shlex.join(["twinserve", "explain", str(run.record.path), "--request"]))
    caption = (
        'Look at the largest share: it is what to change first. <span class="note">The parts of a time add up to it '
        f"exactly. Columns sort at a click. <code>{again} ID</code> says the same of any one request.</span>"
    )
    return f'{"".join(parts)}<p class="caption">{caption}</p>\n'


def _of_all(waits: list[Waited]) -> str:
    sums = sums_of(waits)
    heads = ["cause"]
    for name in (term("TTFT", "TTFT"), term("end to end", "End to end")):
        heads += [f"{name}, s, all together", "share"]
    rows = []
    for cause, meaning in CAUSES.items():
        if not (sums["ttft_ns"][cause] or sums["e2e_ns"][cause]):
            continue
        cells: list[tuple[Any, str]] = [(cause, cause)]
        for total in (sums["ttft_ns"], sums["e2e_ns"]):
            share = total[cause] / total.total() if total[cause] else 0.0
            cells += [(total[cause], number(total[cause] / 1e9)), (share, percent(share))]
        rows.append([*cells, (meaning, meaning)])
    return _table([*heads, "what it is"], rows)


def _of_each(slowest: list[Waited]) -> str:
    sums = sums_of(slowest)["ttft_ns"]
    causes = [cause for cause in CAUSES if sums[cause]]
    rows = []
    for one in slowest:
        of_each = [one.ttft_ns.total(), *(one.ttft_ns[cause] for cause in causes)]
        cells = [(nanoseconds, number(nanoseconds / 1e9)) for nanoseconds in of_each]
        rows.append([(one.row["id"], str(one.row["id"])), *cells])
    return _table(["request", f"{term('TTFT', 'TTFT')}, s", *causes], rows)


def _table(heads: list[str], rows: list[list[tuple[Any, str]]]) -> str:
    return sortable_table([(head, None) for head in heads], rows)
