"""A run record as a trace that Perfetto opens: ui.perfetto.dev, or its trace processor's SQL.

The form is the JSON of Chrome's trace events ("Trace Event Format", the document that Perfetto's own pages name): times
in microseconds, a process a replica with the tracks of its host and its device and the counters of its queue and pool,
and beside it a process with a track a sequence. An arrow leads from each arrival over the step that computed its first
token to its decoding.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinserve.settings.files import write_whole
from twinserve.traces.formats.recorded import replica_place
from twinserve.traces.runs.fleet_record import is_fleet, load_replicas
from twinserve.traces.runs.record import RunRecord

HOST, DEVICE = 1, 2
"""Threads of a replica's process."""
SEQUENCES = 1_000_000
"""The process of a replica's sequences has its own number and so many more; a sequence's thread, its id and 1 more."""
_COUNTERS = (("requests", ("running", "waiting")), ("KV blocks", ("used_blocks",)))
_PHASES = (
    ("queued", "arrival_ns", "first_scheduled_ns"),
    ("prefill", "first_scheduled_ns", "first_token_ns"),
    ("decode", "first_token_ns", "finish_ns"),
)
_ARGS = ("decision", "tokens", "prompt_tokens", "decode_tokens", "kv_tokens", "running", "waiting", "used_blocks")

Event = dict[str, Any]


def export_perfetto(record: RunRecord, out: Path) -> None:
    """Write a run as a trace for Perfetto; gzip where the name ends in .gz, which Perfetto opens as well.

    Raises:
        InputError: `out` exists or cannot be written.
    """
    origin_ns = min((row["arrival_ns"] for row in record.requests), default=0)
    events: list[Event] = []
    for part in load_replicas(record.path) if is_fleet(record.path) else [record]:
        replica, life = replica_place(part.path) or (0, 0)
        process = 1 + replica  # 0 is the idle process
        if not life:
            events += _process(process, f"replica {replica}", ((HOST, "host"), (DEVICE, "device")))
            events += _process(SEQUENCES + process, f"sequences of replica {replica}", ())
        events += _events_of(part, process, origin_ns)
    about = {"run": record.path.name, "world": record.run["world"], "origin_ns": origin_ns}
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    text = f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[\n{lines}\n]}}\n'
    write_whole(out, gzip.compress(text.encode(), mtime=0) if out.suffix == ".gz" else text)


def _process(process: int, name: str, threads: tuple[tuple[int, str], ...]) -> Iterator[Event]:
    yield _named(process, 0, "process_name", name)
    yield {"ph": "M", "pid": process, "tid": 0, "name": "process_sort_index", "args": {"sort_index": process}}
    for thread, what in threads:
        yield _named(process, thread, "thread_name", what)


def _named(process: int, thread: int, what: str, name: str) -> Event:
    return {"ph": "M", "pid": process, "tid": thread, "name": what, "args": {"name": name}}


def _events_of(record: RunRecord, main: int, origin_ns: int) -> Iterator[Event]:
    """Steps on host and device, counters, and sequences with their arrows."""

    def at(time_ns: int) -> float:
        return (time_ns - origin_ns) / 1e3

    def slice_of(name: str, begin_ns: int, end_ns: int, process: int, thread: int, **more: Any) -> Event:
        where = {"ph": "X", "pid": process, "tid": thread, "name": name}
        return where | {"ts": at(begin_ns), "dur": (end_ns - begin_ns) / 1e3} | more

    ended_ns: int | None = None
    begins: dict[int, int] = {}
    following = [row["decided_ns"] for row in record.steps[1:]]
    for row, next_ns in zip(record.steps, [*following, None], strict=True):
        args = {name: row[name] for name in _ARGS if name in row}
        kind = "decode" if not row.get("prompt_tokens", 1) else "prompts" if not row.get("decode_tokens") else "mixed"
        name = kind if "tokens" in row else "step"
        launched_ns = row["start_ns"] if row.get("launched_ns") is None else row["launched_ns"]
        launched_ns = launched_ns if next_ns is None else min(launched_ns, next_ns)
        yield slice_of("decide", row["decided_ns"], max(launched_ns, row["decided_ns"]), main, HOST, args=args)
        # A step that was launched while the one before ran began when that had ended.
        begin_ns = row["start_ns"] if ended_ns is None else min(max(row["start_ns"], ended_ns), row["end_ns"])
        yield slice_of(name, begin_ns, row["end_ns"], main, DEVICE, args=args)
        ended_ns = row["end_ns"]
        begins.setdefault(row["end_ns"], begin_ns)
        for title, fields in _COUNTERS:
            if values := {field: row[field] for field in fields if field in row}:
                yield {"ph": "C", "pid": main, "name": title, "ts": at(row["decided_ns"]), "args": values}
        for seq_id in row.get("preempted", ()):
            mark = {"ph": "i", "s": "t", "pid": SEQUENCES + main, "tid": 1 + seq_id, "name": "preempted"}
            yield mark | {"ts": at(row["decided_ns"])}
    for row in record.requests:
        process, thread = SEQUENCES + main, 1 + row["id"]
        yield _named(process, thread, "thread_name", f"request {row['id']}")
        args = {name: row[name] for name in ("prompt_tokens", "cached_tokens", "output_tokens", "preemptions")}
        args["finish_reason"] = row["finish_reason"]
        for name, begin, end in _PHASES:
            until_ns = row["finish_ns"] if row[end] is None else row[end]
            if row[begin] is not None and until_ns is not None:
                yield slice_of(name, row[begin], until_ns, process, thread, args=args)
        if (first_ns := row["first_token_ns"]) is not None:
            flow = {"cat": "first token", "name": "first token", "id": row["id"]}
            yield flow | {"ph": "s", "pid": process, "tid": thread, "ts": at(row["arrival_ns"])}
            if first_ns in begins:
                yield flow | {"ph": "t", "pid": main, "tid": DEVICE, "ts": at(begins[first_ns])}
            yield flow | {"ph": "f", "bp": "e", "pid": process, "tid": thread, "ts": at(first_ns)}
