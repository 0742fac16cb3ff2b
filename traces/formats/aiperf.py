"""AIPerf's (github.com/ai-dynamo/aiperf) fixed schedules and sessions: JSON lines with `input_length`.

`timestamp` (milliseconds), or in a session (`session_id`) for all turns but the first `delay` (milliseconds after the
answer before); and if there, `output_length` and `hash_ids`, an id for each 512 tokens begun. `input_length` is what a
turn adds to what was said before it. Without `hash_ids` a prompt shares nothing else. Time 0 is the first request.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twinserve.traces.formats.mooncake import blocks
from twinserve.traces.formats.reading import Reading, Rows, private_prompt
from twinserve.traces.lines import Line, json_lines
from twinserve.traces.request import Part, Request, answer_text
from twinserve.traces.transforms import renumbered

NAME = "aiperf"
FIELDS = ("input_length", "timestamp")

_BLOCK = 512


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file, by their time; a session's turns lie together there."""
    found: list[tuple[Line, Request]] = []
    latest: dict[str, Request] = {}
    for number, line in enumerate(json_lines(lines, path)):
        name = line.values.get("session_id")
        if name is not None and type(name) not in (str, int):
            raise line.error("expected text", "session_id")
        before = None if name is None else latest.get(name)
        parts = _parts(line, number)
        if before is None:
            arrival_ns = _ms(line, "timestamp", reading)
            session = None if name is None else len(latest)
            request = Request(number, arrival_ns, parts, _output_tokens(line, reading), session)
        else:
            think_ns = _ms(line, "delay", reading) if line.values.get("delay") is not None else 0
            is_timed = line.values.get("timestamp") is not None
            arrival_ns = _ms(line, "timestamp", reading) if is_timed else before.arrival_ns + think_ns
            said = (*before.parts, Part(answer_text(before.id), 0, before.max_tokens), *parts)
            tokens = _output_tokens(line, reading)
            request = Request(number, arrival_ns, said, tokens, before.session, before.id, think_ns)
        if name is not None:
            latest[name] = request
        found.append((line, request))
    first_ns = min((request.arrival_ns for _, request in found), default=0)
    found.sort(key=lambda row: row[1].arrival_ns)
    ordered = renumbered([request for _, request in found])
    for (line, _), request in zip(found, ordered, strict=True):
        arrival_ns = reading.since_first(request.arrival_ns, first_ns)
        yield line, "timestamp", request._replace(arrival_ns=arrival_ns)


def _parts(line: Line, number: int) -> tuple[Part, ...]:
    length = line.integer("input_length", 1)
    if line.values.get("hash_ids") is None:
        return private_prompt(number, length)
    return tuple(blocks(line.integers("hash_ids"), length, _BLOCK, line))


def _output_tokens(line: Line, reading: Reading) -> int:
    """A length of an output; AIPerf leaves it to the server where there is none."""
    if line.values.get("output_length") is not None:
        return reading.output_tokens(line, "output_length")
    reading.clipped["unknown_output_served_as_one"] += 1
    return 1


def _ms(line: Line, field: str, reading: Reading) -> int:
    """Milliseconds in nanoseconds."""
    return reading.time_ns(line, field, unit_ns=1_000_000)
