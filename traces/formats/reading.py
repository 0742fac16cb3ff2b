"""What the readers of all formats share: counts of what was handled, tables, prompts known by their length alone."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from twinserve.settings.errors import InputError
from twinserve.traces.lines import LARGEST, LARGEST_VALUE, Line, nanoseconds
from twinserve.traces.request import Part, Request
from twinserve.traces.requests import FIRST_PRIVATE_TEXT, Requests, as_requests

_SECOND = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2}")
_BEHIND_SECOND = re.compile("(?:[.,]([0-9]{1,9}))?(Z|[+-][0-9]{2}:?[0-9]{2})?")
FIRST_INSTANT = datetime(1970, 1, 1, tzinfo=UTC)
"""From which instants are counted."""

_2000_NS = 946_684_800 * 1_000_000_000
"""The year 2000: what counts from 1970 is later, and what counts from the start of a trace is not so long."""

Row = tuple[Line, str, Request]
"""Of a request its line, the field that says its time, and the request."""

_AT_ONCE = 1024
"""Rows of a table that are read together."""


@dataclass(slots=True)
class Table:
    """Rows of a CSV file that lie together.

    Attributes:
        columns: their names.
        numbers, rows: of each row its line, and its values.
    """

    path: Path
    columns: list[str]
    numbers: list[int] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Line]:
        for number, values in zip(self.numbers, self.rows, strict=True):
            yield Line(self.path, number, dict(zip(self.columns, values, strict=True)))

    def column(self, name: str) -> list[str]:
        """The values in a column; none where there is no such column."""
        if name not in self.columns:
            return []
        place = self.columns.index(name)
        return [values[place] for values in self.rows]


@dataclass(slots=True)
class PlainRows:
    """Rows of a table that say no more of their requests than times and lengths, as columns; each prompt is private.

    Attributes:
        time_field: the name of the column of times.
        first: the number of the first request.
    """

    table: Table
    time_field: str
    first: int
    arrivals_ns: list[int]
    prompt_tokens: list[int]
    max_tokens: list[int]

    def __iter__(self) -> Iterator[Row]:
        columns = zip(self.table, self.arrivals_ns, self.prompt_tokens, self.max_tokens, strict=True)
        for number, (line, arrival_ns, length, max_tokens) in enumerate(columns, self.first):
            yield line, self.time_field, Request(number, arrival_ns, private_prompt(number, length), max_tokens)


Rows = Iterator[Row | PlainRows]
"""The requests of a trace, one by one or many at once."""


@dataclass
class Reading:
    """What a reader finds out about a trace.

    Attributes:
        rows_at_once: the most rows of a table that are read together.
        requests: those of the rows so far.
        dropped: rows that are no requests to replay, by reason.
        clipped: lengths that were changed, by reason.
        repaired: what was put right without a change to what is replayed, by reason.
        epoch_ns: when time 0 of the trace was, in nanoseconds since 1970, taken as UTC.
        is_timed: whether the file says when requests come; where it does not, all are at 0.
    """

    rows_at_once: int = _AT_ONCE
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
        request._replace(parts=private_prompt(request.id, request.prompt_tokens))
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


def table_rows(lines: Iterable[str], path: Path, required: tuple[str, ...], most_rows: int) -> Iterator[Line]:
    """The rows of a CSV file one by one, see `tables`."""
    for table in tables(lines, path, required, most_rows):
        yield from table


def tables(lines: Iterable[str], path: Path, required: tuple[str, ...], most_rows: int) -> Iterator[Table]:
    """The rows of a CSV file, by the names in its first line, in pieces; those before a wrong one come first.

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
    table = Table(path, columns)
    try:
        for values in reader:
            if len(values) != len(columns):
                number, text = reader.line_num + 1, ",".join(values)
                raise InputError(f"expected {len(columns)} columns", path=path, line=number, value=text)
            table.numbers.append(reader.line_num + 1)
            table.rows.append(values)
            if len(table.rows) == most_rows:
                yield table
                table = Table(path, columns)
    except (csv.Error, InputError) as error:
        if table.rows:
            yield table
        if isinstance(error, InputError):
            raise
        raise InputError(f"expected CSV: {error}", path=path, line=reader.line_num + 1) from error
    if table.rows:
        yield table


def plain_rows(
    table: Table, fields: tuple[str, str, str], first: int, first_ns: int | None, nanoseconds_of: Callable[[str], int]
) -> PlainRows | None:
    """Rows as columns; None where one is wrong, or there is but one: who takes them one by one says what is wrong.

    Args:
        fields: the columns of times, of prompts' lengths and of outputs'.
        first: the number of the first request.
        first_ns: what the column of times says of time 0; None: it is the first row.
        nanoseconds_of: of a time; raises a ValueError or an OverflowError where it is none.
    """
    if len(table) == 1:
        return None
    try:
        times_ns = list(map(nanoseconds_of, table.column(fields[0])))
        prompt_tokens, max_tokens = (_counts(table.column(name)) for name in fields[1:])
    except (ValueError, OverflowError):
        return None
    if min(times_ns) < -LARGEST or max(times_ns) > LARGEST:
        return None
    first_ns = times_ns[0] if first_ns is None else first_ns
    return PlainRows(table, fields[0], first, [time_ns - first_ns for time_ns in times_ns], prompt_tokens, max_tokens)


def _counts(texts: list[str]) -> list[int]:
    """Texts as integers >= 1.

    Raises:
        ValueError: one is none, or is larger than most: it has ten digits or more.
    """
    digits, counts = "".join(texts), list(map(int, texts))
    if not (digits.isascii() and digits.isdigit() and max(map(len, texts)) < 10 and min(counts) >= 1):
        raise ValueError(texts)
    return counts


def lengths_by_seconds(lines: Iterable[str], path: Path, fields: tuple[str, str, str], reading: Reading) -> Rows:
    """The requests of a CSV file with a column of seconds, one of prompts' lengths and one of outputs'."""
    time, prompt, output = fields
    first_ns: int | None = None
    number = 0
    for table in tables(lines, path, fields, reading.rows_at_once):
        plain = plain_rows(table, fields, number, first_ns, _exact_nanoseconds)
        if plain is not None:
            time_ns = _exact_nanoseconds(table.column(time)[0])
            first_ns = time_ns if first_ns is None else first_ns
            reading.since_first(time_ns, first_ns)
            yield plain
            number += len(table)
            continue
        for line in table:
            parts = private_prompt(number, count(line, prompt))
            time_ns = reading.time_ns(line, time, in_table=True)
            first_ns = time_ns if first_ns is None else first_ns
            yield line, time, Request(number, reading.since_first(time_ns, first_ns), parts, count(line, output))
            number += 1


def _exact_nanoseconds(seconds: str) -> int:
    """Seconds in nanoseconds.

    Raises:
        ValueError: they are none, or have to be rounded, which is counted.
    """
    time_ns, rounded = nanoseconds(seconds)
    if rounded:
        raise ValueError(seconds)
    return time_ns


def count(line: Line, name: str, at_least: int = 1) -> int:
    """An integer in a column of a CSV file.

    Raises:
        InputError: it is none of at most 18 digits, or is too small.
    """
    text = line.get(name)
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) >= at_least):
        raise line.error(f"expected an integer >= {at_least}", name)
    return int(text)


def instant_ns(line: Line, name: str) -> int:
    """An instant of ISO 8601, in UTC where it names no offset, in nanoseconds since 1970.

    Raises:
        InputError: it is none, or is before 1678 or after 2262.
    """
    try:
        since_ns = instant(line.get(name))
    except (ValueError, OverflowError) as error:
        raise line.error("expected a time like 2023-11-16 18:15:46.6805900 or another of ISO 8601", name) from error
    if not -LARGEST <= since_ns <= LARGEST:
        raise line.error("expected a time between 1678 and 2262", name)
    return since_ns


def instant(text: str) -> int:
    """The same of a text, whenever it is.

    Raises:
        ValueError, OverflowError: it is none.
    """
    fraction, offset = text[20:], ""
    if not (text[19:20] == "." and len(fraction) <= 9 and fraction.isascii() and fraction.isdigit()):
        match = _BEHIND_SECOND.fullmatch(text[19:])
        if match is None:
            raise ValueError(text)
        fraction, offset = match.groups(default="")
    return _seconds(text[:19], offset) * 1_000_000_000 + int(fraction.ljust(9, "0"))


@lru_cache(maxsize=16)
def _seconds(second: str, offset: str) -> int:
    """Seconds from 1970 to the begin of one."""
    if _SECOND.fullmatch(second) is None:
        raise ValueError(second)
    since = datetime.fromisoformat(second + (offset or "+00:00")) - FIRST_INSTANT
    return since.days * 86_400 + since.seconds
