"""Alibaba's Bailian traces (github.com/alibaba-edu/qwen-bailian-usagetraces-anon): JSON lines.

`timestamp` (seconds), `input_length`, `output_length`, `hash_ids`, an id for each 16 tokens begun, `chat_id` and
`parent_chat_id`: a turn waits for the answer of its parent, which -1 says it has none of. Equal ids mean equal tokens.
Time 0 is the first row.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twinserve.traces.formats.mooncake import blocks
from twinserve.traces.formats.reading import Reading, Rows
from twinserve.traces.lines import Line, json_lines
from twinserve.traces.request import Request

NAME = "bailian"
FIELDS: tuple[str, ...] = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids")

_BLOCK = 16


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    numbers: dict[int, tuple[int, int]] = {}
    missing: set[int] = set()
    first_ns: int | None = None
    for number, line in enumerate(json_lines(lines, path)):
        time_ns = reading.time_ns(line, "timestamp")
        first_ns = time_ns if first_ns is None else first_ns
        parent = _parent(line)
        after, session = numbers.get(parent, (None, number)) if parent is not None else (None, number)
        if parent is not None and after is None:
            reading.repaired["parent_before_the_trace"] += 1
            missing.add(parent)
        numbers[chat := line.integer("chat_id")] = number, session
        if chat in missing:
            raise line.error("expected no parent of itself or of a row before it", "chat_id")
        parts = blocks(line.integers("hash_ids"), line.integer("input_length", 1), _BLOCK, line)
        arrival_ns, output_tokens = reading.since_first(time_ns, first_ns), reading.output_tokens(line, "output_length")
        yield line, "timestamp", Request(number, arrival_ns, parts, output_tokens, session, after)


def _parent(line: Line) -> int | None:
    """The chat that a row goes on with; None where it begins one."""
    return None if line.values.get("parent_chat_id") == -1 else line.integer("parent_chat_id")
