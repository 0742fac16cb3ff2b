"""What the readers of all formats share: counts of what was handled, tables, prompts known by their length alone."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path

from twinserve.settings.errors import InputError
from twinserve.traces.lines import LARGEST_VALUE, Line, nanoseconds
from twinserve.traces.request import Part, Request
from twinserve.traces.requests import FIRST_PRIVATE_TEXT, Requests, as_requests

_2000_NS = 946_684_800 * 1_000_000_000
"""The year 2000: what counts from 1970 is later, and what counts from the start of a trace is not so long."""

Rows = Iterator[tuple[Line, str, Request]]
"""Of each request its line, the field that says its time, and the request."""


@dataclass
class Reading:
    """What a reader finds out about a trace.

    Attributes:
        requests: those of the rows so far.
        dropped: rows that are no requests to replay, by reason.
        clipped: lengths that were changed, by reason.
        repaired: what was put right without a change to what is replayed, by reason.
        epoch_ns: when time 0 of the trace was, in nanoseconds since 1970, taken as UTC.
        is_timed: whether the file says when requests come; where it does not, all are at 0.
    """

    requests: Requests = field(default_factory=Requests)
    dropped: Counter[str] = field(default_factory=Counter)
    clipped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    epoch_ns: int | None = None
    is_timed: bool = True

    @property
    def handled(self) -> dict[str, dict[str, int]]:
        """The counts as plain data; reasons that never occurred are left out."""
        return {name: dict(getattr(self, name)) for name in ("dropped", "clipped", "repaired")}

    def output_tokens(self, line: Line, name: str) -> int:
        """A length of an output; 0 becomes 1, as the step that computes a whole prompt always samples."""
        length = line.integer(name)
        if not length:
            self.clipped["zero_output_served_as_one"] += 1
        return max(length, 1)

    def time_ns(self, line: Line, name: str, *, unit_ns: int = 1_000_000_000, in_table: bool = False) -> int:
        """A time in seconds, or in units of so many nanoseconds, in nanoseconds: a number, in a table its text."""
        value = line.get(name)
        try:
            if type(value) not in ((str,) if in_table else (int, float)):
                raise ValueError(value)
            time_ns, rounded = nanoseconds(value, unit_ns)
        except ValueError as error:
            words = "seconds" if unit_ns == 1_000_000_000 else "milliseconds"
            raise line.error(f"expected {words} >= 0", name) from error
        if rounded:
            self.repaired["time_rounded_to_ns"] += 1
        return time_ns

    def since_first(self, time_ns: int, first_ns: int) -> int:
        """A time counted from the first one of the file; that is kept where it is one of this age."""
        if time_ns == first_ns and first_ns >= _2000_NS:
            self.epoch_ns = first_ns
        return time_ns - first_ns

    def in_time_order(self, rows: list[tuple[Line, Request]]) -> list[tuple[Line, Request]]:
        """The rows by arrival, those of an instant as in the file; counts the rows that a later one precedes."""
        latest = late = 0
        for _, request in rows:
            late += request.arrival_ns < latest
            latest = max(latest, request.arrival_ns)
        if late:
            self.repaired["out_of_time_order"] += late
        return sorted(rows, key=lambda row: row[1].arrival_ns)

    def sent(self, rows: list[tuple[Line, Request]], time_field: str) -> Rows:
        """Requests that a client sent, numbered by the time of sending; time 0 is the first, each prompt private."""
        ordered = self.in_time_order(rows)
        for number, (line, request) in enumerate(ordered):
            arrival_ns = request.arrival_ns - ordered[0][1].arrival_ns
            parts = private_prompt(number, request.prompt_tokens)
            yield line, time_field, Request(number, arrival_ns, parts, request.max_tokens)


def private_prompt(number: int, length: int) -> tuple[Part, ...]:
    """The prompt of request `number` if nothing but its length is known: it shares nothing."""
    return (Part(FIRST_PRIVATE_TEXT + number, 0, length),)


def with_own_private_prompts(requests: Seq[Request]) -> Requests:
    """The requests with each private prompt as `private_prompt` makes it for the request's number."""
    requests = as_requests(requests)
    # A plain request's text is that of no other plain one.
    uses = Counter(part.text for request in requests.others.values() for part in request.parts)
    return Requests(
        replace(request, parts=private_prompt(request.id, request.prompt_tokens))
        if _is_private(request.parts) and uses[request.parts[0].text] == (number in requests.others)
        else request
        for number, request in enumerate(requests)
    )


def _is_private(parts: Seq[Part]) -> bool:
    return len(parts) == 1 and parts[0].text >= FIRST_PRIVATE_TEXT and parts[0].start == 0


def columns_of(line: str) -> list[str]:
    """The names of a CSV file's columns, which are its first line.

    Raises:
        ValueError: it is none, or a name stands twice.
    """
    columns = next(csv.reader([line], strict=True), [])
    for column, times in Counter(columns).items():
        if times > 1:
            raise ValueError(f"{column!r} stands {times} times, expected each column once")
    return columns


def table_rows(lines: Iterable[str], path: Path, required: tuple[str, ...]) -> Iterator[Line]:
    """The rows of a CSV file, by the names in its first line.

    Raises:
        InputError: a required column is missing or stands twice, or a row has more or fewer columns than the first.
    """
    lines = iter(lines)
    columns = columns_of(next(lines))
    for column in required:
        if column not in columns:
            raise InputError("is missing, expected a column of that name", path=path, line=1, field=column)
    csv.field_size_limit(LARGEST_VALUE)
    reader = csv.reader(lines, strict=True)
    try:
        for values in reader:
            if len(values) != len(columns):
                number, text = reader.line_num + 1, ",".join(values)
                raise InputError(f"expected {len(columns)} columns", path=path, line=number, value=text)
            yield Line(path, reader.line_num + 1, dict(zip(columns, values, strict=True)))
    except csv.Error as error:
        raise InputError(f"expected CSV: {error}", path=path, line=reader.line_num + 1) from error


def lengths_by_seconds(lines: Iterable[str], path: Path, fields: tuple[str, str, str], reading: Reading) -> Rows:
    """The requests of a CSV file with a column of seconds, one of prompts' lengths and one of outputs'."""
    time, prompt, output = fields
    first_ns: int | None = None
    for number, line in enumerate(table_rows(lines, path, fields)):
        parts = private_prompt(number, count(line, prompt))
        time_ns = reading.time_ns(line, time, in_table=True)
        first_ns = time_ns if first_ns is None else first_ns
        yield line, time, Request(number, reading.since_first(time_ns, first_ns), parts, count(line, output))


def count(line: Line, name: str, at_least: int = 1) -> int:
    """An integer in a column of a CSV file.

    Raises:
        InputError: it is none of at most 18 digits, or is too small.
    """
    text = line.get(name)
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) >= at_least):
        raise line.error(f"expected an integer >= {at_least}", name)
    return int(text)
