"""A CSV file of one's own, whose columns are named by who hands it in: `time=COLUMN,prompt=COLUMN,output=COLUMN`.

Times are instants of ISO 8601, in UTC where they name no offset, or seconds; under `time_ms`, milliseconds. Time 0 is
the first request. Rows out of time order are sorted, rows without a prompt or an answer dropped, and both counted.
Nothing is known of the prompts, so each is a text of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from twinserve.settings.errors import InputError
from twinserve.traces.formats.reading import Reading, Rows, count, instant_ns, private_prompt, table_rows
from twinserve.traces.lines import Line
from twinserve.traces.request import Request

NAME = "csv"
_NAMES = ("time", "time_ms", "prompt", "output")
_PART = re.compile(rf"(?:^|,)({'|'.join(_NAMES)})=")


@dataclass(frozen=True)
class Columns:
    """Which columns say what.

    Attributes:
        unit_ns: of a time that is a number.
    """

    time: str
    prompt: str
    output: str
    unit_ns: int

    @classmethod
    def parse(cls, text: str) -> Columns:
        """From text such as "time=ts,prompt=in_tokens,output=out_tokens"; a name may have commas in it.

        Raises:
            InputError: one of the three is missing, stands twice or is empty, or there is more.
        """
        begin, *parts = _PART.split(text)
        given = dict(zip(parts[::2], parts[1::2], strict=True))
        time = given.get("time") or given.get("time_ms")
        if begin or len(parts) != 6 or not (time and given.get("prompt") and given.get("output")):
            expected = "expected time=COLUMN (or time_ms=COLUMN), prompt=COLUMN and output=COLUMN, joined by commas"
            raise InputError(expected, field="columns", value=text)
        return cls(time, given["prompt"], given["output"], 1_000_000 if "time_ms" in given else 1_000_000_000)


def rows(lines: Iterable[str], path: Path, reading: Reading, columns: Columns) -> Rows:
    """The requests of a file."""
    found: list[tuple[Line, Request]] = []
    is_instant = None
    required = (columns.time, columns.prompt, columns.output)
    for line in table_rows(lines, path, required, reading.rows_at_once):
        if is_instant is None:
            is_instant = "-" in line.get(columns.time)
        prompt_tokens, output_tokens = count(line, columns.prompt, 0), count(line, columns.output, 0)
        if not output_tokens or not prompt_tokens:
            reading.dropped["empty_prompt" if output_tokens else "failed"] += 1
            continue
        if is_instant:
            time_ns = instant_ns(line, columns.time)
        else:
            time_ns = reading.time_ns(line, columns.time, unit_ns=columns.unit_ns, in_table=True)
        told = Line(path, line.number, {columns.time: line.get(columns.time)})
        found.append((told, Request(0, time_ns, private_prompt(0, prompt_tokens), output_tokens)))
    if found:
        first_ns = min(request.arrival_ns for _, request in found)
        reading.since_first(first_ns, first_ns)
    return reading.sent(found, columns.time)
