"""Every request of a page, to be found by its id, filtered and sorted."""

from __future__ import annotations

from typing import Any

import numpy as np

from twinserve.reports.asked import Asked
from twinserve.reports.drawing import packed
from twinserve.reports.runs import Run
from twinserve.reports.terms import sorter
from twinserve.traces.runs.metrics import SERVED
from twinserve.traces.runs.tables import LATENCY_NS

_HEADS = (
    ("id", "request", None),
    ("arrival", "arrival, ms", None),
    ("wait", "wait, ms", "Wait"),
    ("why", "waited for", None),
    ("ttft", "TTFT, ms", "TTFT"),
    ("tpot", "TPOT, ms", "TPOT"),
    ("e2e", "end to end, ms", "End to end"),
    ("prompt", "prompt tokens", None),
    ("cached", "cached", "Cached"),
    ("output", "output tokens", None),
    ("preemptions", "preemptions", "Preemptions"),
    ("replica", "replica", None),
    ("reason", "ended by", None),
    ("kept", "in limits", None),
)
"""The columns: their name in a condition, what stands above them, and which definition it tells."""

STEP, BUDGET, SEQUENCES, BLOCKS, ORDER = "the step that ran", "token budget", "max_num_seqs", "KV blocks", "its turn"
LOST = "a replica that died"
"""What a request may have waited for."""


def finder(runs: list[Run], groups: list[list[Run]], asked: Asked | None) -> str:
    """The form in which a reader asks for requests, and all of them, packed.

    Args:
        groups: the runs of each trace, in the order of their figures.
    """
    group_of = {run.label: number for number, group in enumerate(groups) for run in group}
    content = {"runs": [_packed(run, group_of[run.label], asked) for run in runs]}
    known = set().union(*(run["columns"] for run in content["runs"]))
    heads = "".join(
        f'<th scope="col" data-column="{name}">{sorter(text, definition)}</th>'
        for name, text, definition in _HEADS
        if name in known
    )
    which = "".join(f'<option value="{number}">{run.text}</option>' for number, run in enumerate(runs))
    chooser = f'<label>Run <select name="run">{which}</select></label>\n' if len(runs) > 1 else ""
    return (
        f'<form class="finder" id="finder">\n{chooser}<label>Requests <input name="filter" autocomplete="off" '
        'spellcheck="false" placeholder="17, or ttft &gt; 1000, preemptions &gt;= 1"></label>\n'
        '<output></output>\n<div class="scroll"><table class="metrics"><thead><tr>'
        f'{heads}</tr></thead><tbody></tbody></table></div>\n<script type="text/plain">{packed(content)}</script>\n'
        "</form>\n"
        '<p class="note">Times in milliseconds. Columns sort at a click; conditions are joined by a comma. A request’s '
        "number shows its bars below. What a request waited for is what was at its limit for most of its wait, "
        "decision by decision, as far as the record tells.</p>\n"
    )


def _packed(run: Run, group: int, asked: Asked | None) -> dict[str, Any]:
    """The columns of a run's requests, times in microseconds."""
    rows = run.requests
    columns: dict[str, dict[str, Any]] = {"id": {"unit": "id", "values": [row["id"] for row in rows]}}
    columns["arrival"] = _times([row["arrival_ns"] - run.origin_ns for row in rows])
    columns["wait"] = _times([_between(row, "arrival_ns", "first_scheduled_ns") for row in rows])
    why = waited_for(run)
    if any(why):
        columns["why"] = {"unit": "text", "values": why}
    columns["ttft"] = _times([_between(row, "arrival_ns", "first_token_ns") for row in rows])
    columns["tpot"] = _times([LATENCY_NS["tpot_s"](row) if row["finish_reason"] in SERVED else None for row in rows])
    columns["e2e"] = _times([_between(row, "arrival_ns", "finish_ns") for row in rows])
    for name, field in (("prompt", "prompt_tokens"), ("cached", "cached_tokens"), ("output", "output_tokens")):
        columns[name] = {"unit": "", "values": [row[field] for row in rows]}
    columns["preemptions"] = {"unit": "", "values": [row["preemptions"] for row in rows]}
    if run.replicas:
        columns["replica"] = {"unit": "", "values": [row.get("replica") for row in rows]}
    columns["reason"] = {"unit": "text", "values": [row["finish_reason"] for row in rows]}
    if asked is not None:
        columns["kept"] = {"unit": "text", "values": ["yes" if kept else "no" for kept in asked.kept(run)]}
    preempted = [[seq_id, round(time_s * 1e6)] for time_s, ids in run.preemptions for seq_id in ids]
    return {"group": group, "columns": columns, "preempted": preempted}


def _times(times_ns: list[float | None]) -> dict[str, Any]:
    return {"unit": "us", "values": [None if ns is None else round(ns / 1e3) for ns in times_ns]}


def _between(row: dict[str, Any], begin: str, end: str) -> int | None:
    return None if row[end] is None else row[end] - row[begin]


def waited_for(run: Run) -> list[str | None]:
    """What each request waited for until it was first scheduled; None where that is not known, or where it was never
    scheduled.

    Each decision after which somebody waited had something at its limit: as many sequences as `max_num_seqs` running,
    or the step's token budget spent; where neither was, the head of the queue got no blocks (or, in a pool without end,
    had to wait for the order's sake). Of these, the one that lasted longest of a request's wait is named. Most requests
    wait for the end of the step in which they arrive alone. What was lost with its replica waited for another.
    """
    found: dict[int, str] = {}
    lost: set[int] = set()
    for part in run.parts:
        if not part.has_decisions or not part.record.steps:
            continue
        settings = part.record.run["settings"]
        seqs, budget, pool = (
            value if type(value := settings.get(name)) is int else None
            for name in ("max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks")
        )
        rows = part.record.steps
        decided_ns = np.fromiter((row["decided_ns"] for row in rows), np.int64, len(rows))
        limits = np.fromiter((_limit_of(row, seqs, budget) for row in rows), np.int64, len(rows))
        lasts = np.diff(decided_ns, append=max(row["end_ns"] for row in rows))
        spent = [np.concatenate([[0], np.cumsum(np.where(limits == which, lasts, 0))]) for which in range(4)]
        words = (STEP, SEQUENCES, BUDGET, ORDER if pool is None else BLOCKS)
        for row in part.record.requests:
            if row["first_scheduled_ns"] is None or row["ingested_ns"] is None:
                continue
            begin, end = np.searchsorted(decided_ns, (row["ingested_ns"], row["first_scheduled_ns"]))
            shares = [int(of[max(begin, end)] - of[begin]) for of in spent]
            found[row["id"]] = words[int(np.argmax(shares))] if sum(shares[1:]) else STEP
        if part.died_s is not None:
            lost |= {row["id"] for row in part.record.requests if row["finish_reason"] is None}
    return [LOST if row["id"] in lost else found.get(row["id"]) for row in run.requests]


def _limit_of(row: dict[str, Any], seqs: int | None, budget: int | None) -> int:
    """What was at its limit when a decision had been made: 0 nothing, as nobody waited."""
    if not row["waiting"]:
        return 0
    if seqs is not None and row["running"] >= seqs:
        return 1
    return 2 if budget is not None and row["tokens"] >= budget else 3
