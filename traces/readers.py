"""Readers: a trace file in, requests out; every bad input is said in one line.

- twinserve: JSON lines. A header, `{"format": "twinserve-trace/1", ...}`, then one object a request: `arrival_ns`,
  `max_tokens`, its prompt as `prompt` (a list of [text, start, length], see `Part`) or as `prompt_tokens` (that many
  tokens that nothing else in the trace shares), and if need be `session`, `after`, `priority`, `salt` and `tenant`.
- Mooncake (github.com/kvcache-ai/Mooncake): JSON lines with `timestamp` (ms), `input_length`, `output_length`, and
  `hash_ids`, one for each 512 tokens begun. Equal ids mean equal tokens, so each is a text of its own.
- Azure (github.com/Azure/AzurePublicDataset): CSV with TIMESTAMP, ContextTokens, GeneratedTokens. Nothing is known of
  the prompts, so each is a text of its own.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from twinserve.traces.errors import InputError
from twinserve.traces.request import Part, Request, answer_text

TRACE_FORMAT = "twinserve-trace/1"

LABELS = ("priority", "salt", "tenant")
_OWN_FIELDS = ("arrival_ns", "prompt", "prompt_tokens", "max_tokens", "session", "after", *LABELS)
_MOONCAKE_BLOCK = 512
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_AZURE_TIME = re.compile("([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2})(?:[.]([0-9]{1,7}))?(?:[+]00:00)?")
_FIRST_PRIVATE_TEXT = 1 << 40
_LARGEST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file as an object of named values, which are checked as they are taken.

    Whatever is missing or of another kind (true, 1.0 and "1" are no integers) raises an InputError that names it.

    Attributes:
        path: the file.
        number: the line in it, from 1.
        values: what the line says.
    """

    path: Path
    number: int
    values: dict[str, Any]

    def get(self, field: str) -> Any:
        """The value of `field`, whatever it is."""
        if field not in self.values:
            raise InputError("is missing", path=self.path, line=self.number, field=field)
        return self.values[field]

    def integer(self, field: str, at_least: int = 0) -> int:
        """An integer of at most 63 bits."""
        value = self.get(field)
        if type(value) is not int or not at_least <= value <= _LARGEST:
            raise self.error(f"expected an integer >= {at_least}", field)
        return value

    def optional_integer(self, field: str) -> int | None:
        """An integer >= 0, or None where the field is null or missing."""
        return None if self.values.get(field) is None else self.integer(field)

    def labels(self) -> dict[str, Any]:
        """The priority, an integer, and the salt and the tenant, which are text; those that are there."""
        for field, kind, words in zip(LABELS, (int, str, str), ("an integer", "text", "text"), strict=True):
            if field in self.values and (type(self.values[field]) is not kind):
                raise self.error(f"expected {words}", field)
        if abs(self.values.get("priority", 0)) > _LARGEST:
            raise self.error("expected an integer of at most 63 bits", "priority")
        return {field: self.values[field] for field in LABELS if field in self.values}

    def integers(self, field: str) -> list[int]:
        """A list of integers >= 0."""
        value = self.get(field)
        if type(value) is not list or not all(type(item) is int and 0 <= item <= _LARGEST for item in value):
            raise self.error("expected a list of integers >= 0", field)
        return value

    def integer_lists(self, field: str, width: int) -> list[list[int]]:
        """A list of lists of `width` integers."""
        value = self.get(field)
        if type(value) is not list or not all(
            type(item) is list and len(item) == width and all(type(number) is int for number in item) for item in value
        ):
            raise self.error(f"expected a list of lists of {width} integers", field)
        return value

    def parts(self, field: str) -> tuple[Part, ...]:
        """The parts of a prompt, from lists of text, start and length."""
        parts = tuple(Part(*item) for item in self.integer_lists(field, 3))
        for part in parts:
            if abs(part.text) > _LARGEST or part.start < 0 or part.length < 1:
                raise self.error("expected text numbers below 2^63, start >= 0 and length >= 1", field, list(part))
        return parts

    def one_of(self, field: str, choices: tuple[Any, ...]) -> Any:
        """One of a few values."""
        value = self.get(field)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            expected = " or ".join(json.dumps(choice) for choice in choices)
            raise self.error(f"expected {expected}", field)
        return value

    def error(self, problem: str, field: str, value: object = ...) -> InputError:
        """The error that says what is wrong with `field`, or with `value` in it."""
        shown = self.values.get(field) if value is ... else value
        return InputError(problem, path=self.path, line=self.number, field=field, value=shown)


def read_content(path: Path) -> bytes:
    """The content of a file, unpacked if it is a gzip file (which its first bytes say, not its name).

    Raises:
        InputError: it cannot be read, or is a gzip file that is broken or cut short.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from error
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"expected a whole gzip file: {error}", path=path) from error


def text_lines(content: bytes, path: Path) -> list[str]:
    """The lines of a UTF-8 text, which end in LF or CRLF, the last one in either or in nothing.

    Empty lines at the end are left out.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"expected UTF-8: {error.reason} at byte {error.start}", path=path, line=line) from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def json_value(text: str, path: Path, line: int | None = None) -> Any:
    """The value that a JSON text says.

    Raises:
        InputError: it is not JSON; NaN and Infinity are not.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected JSON: {error}", path=path, line=line) from error


def json_lines(lines: list[str], path: Path, first: int = 1) -> Iterator[Line]:
    """Each line as a JSON object; the first of `lines` is the file's line number `first`.

    Raises:
        InputError: a line is no JSON object.
    """
    for number, text in enumerate(lines, first):
        value = json_value(text, path, number)
        if type(value) is not dict:
            raise InputError("expected a JSON object", path=path, line=number, value=value)
        yield Line(path, number, value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


# --- traces ---


@dataclass(frozen=True)
class Trace:
    """A trace as it was read.

    Attributes:
        requests: a request a row, in the file's order, which is the order of their arrival.
        format: "twinserve", "mooncake" or "azure".
        sha256: of the file's content, unpacked.
        notes: how many requests have what a reader of results should know of: `same_instant` as the request before,
            `repeated_prompt` of an earlier request, `private_prompt` (shared with nothing because nothing is known of
            it), `one_token_output` (no time between tokens).
    """

    requests: list[Request]
    format: str
    sha256: str
    notes: dict[str, int]


_Rows = Iterator[tuple[Line, str, Request]]
"""Of each request the line, the field that says its time, and the request."""


def read_trace(path: Path) -> Trace:
    """Read a trace; its content says which format it has, and whether it is packed with gzip.

    Raises:
        InputError: the file cannot be read, its format is unknown, a value is missing or wrong, or times go backwards.
    """
    path = Path(path)
    content = read_content(path)
    lines = text_lines(content, path)
    if not lines:
        raise InputError("is empty, expected a trace", path=path)
    name, rows = _recognise(lines, path)
    requests: list[Request] = []
    for line, time_field, request in rows:
        if requests and request.arrival_ns < requests[-1].arrival_ns:
            raise line.error("expected no earlier time than in the line before", time_field)
        requests.append(request)
    if not requests:
        raise InputError("has no requests", path=path)
    return Trace(requests, name, hashlib.sha256(content).hexdigest(), _notes(requests))


def write_trace(path: Path, requests: list[Request], header: dict[str, Any]) -> None:
    """Write a trace in twinserve's own format, packed if the name ends in .gz; equal arguments give equal bytes.

    Args:
        requests: their ids must be 0, 1, 2...
        header: goes into the first line beside the format.

    Raises:
        InputError: `path` exists, or cannot be written.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = [{"format": TRACE_FORMAT} | header]
    for number, request in enumerate(requests):
        if request.id != number:
            raise ValueError(f"request {number} has id {request.id}, expected ids 0, 1, 2...")
        row = {"arrival_ns": request.arrival_ns, "prompt": request.parts, "max_tokens": request.max_tokens}
        links = {"session": request.session, "after": request.after}
        rows.append(row | {name: value for name, value in links.items() if value is not None} | request.labels)
    content = "".join(json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n" for row in rows).encode()
    try:
        with path.open("xb") as file:
            file.write(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    except FileExistsError as error:
        raise InputError("exists already, expected a new file", path=path) from error
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", path=path) from error


def _recognise(lines: list[str], path: Path) -> tuple[str, _Rows]:
    """Which format it is, and its rows."""
    if lines[0].lstrip().startswith("{"):
        first = next(json_lines(lines[:1], path)).values
        if "format" in first:
            return "twinserve", _own_rows(lines, path)
        if first.keys() & {"hash_ids", "input_length", "output_length"}:
            return "mooncake", _mooncake_rows(lines, path)
    elif set(lines[0].split(",")) & set(_AZURE_COLUMNS):
        return "azure", _azure_rows(lines, path)
    raise InputError("expected a header of twinserve or Azure, or a row of Mooncake", path=path, line=1, value=lines[0])


def _own_rows(lines: list[str], path: Path) -> _Rows:
    header, *rows = json_lines(lines, path)
    header.one_of("format", (TRACE_FORMAT,))
    prompts = [line.parts("prompt") if "prompt" in line.values else () for line in rows]
    texts = (part.text for prompt in prompts for part in prompt)
    first_private = max(_FIRST_PRIVATE_TEXT, 1 + max(texts, default=0))
    requests: list[Request] = []
    for number, (line, parts) in enumerate(zip(rows, prompts, strict=True)):
        for field in line.values:
            if field not in _OWN_FIELDS:
                raise line.error(f"expected only {', '.join(_OWN_FIELDS)}", field)
        if ("prompt" in line.values) == ("prompt_tokens" in line.values):
            raise InputError("expected either prompt or prompt_tokens", path=path, line=line.number)
        if "prompt_tokens" in line.values:
            parts = (Part(first_private + number, 0, line.integer("prompt_tokens", 1)),)
        request = Request(
            id=number,
            arrival_ns=line.integer("arrival_ns"),
            parts=parts,
            max_tokens=line.integer("max_tokens", 1),
            session=line.optional_integer("session"),
            after=line.optional_integer("after"),
            **line.labels(),
        )
        _check_links(line, request, requests)
        requests.append(request)
        yield line, "arrival_ns", request


def _check_links(line: Line, request: Request, earlier: list[Request]) -> None:
    """The prompt is not empty, `after` names an earlier request, and answers in the prompt are complete by then."""
    if not request.parts:
        raise line.error("expected at least one part", "prompt")
    if request.after is not None and request.after >= request.id:
        raise line.error(f"expected the number of an earlier request, below {request.id}", "after")
    lengths: dict[int, int] = {}
    before = request.after
    while before is not None:
        lengths[answer_text(before)] = earlier[before].max_tokens
        before = earlier[before].after
    for part in request.parts:
        if part.text < 0 and part.text not in lengths:
            raise line.error("expected answers only of requests that `after` leads to", "prompt", list(part))
        if part.text < 0 and part.start + part.length > lengths[part.text]:
            raise line.error(f"expected at most the answer's {lengths[part.text]} tokens", "prompt", list(part))


def _mooncake_rows(lines: list[str], path: Path) -> _Rows:
    for number, line in enumerate(json_lines(lines, path)):
        length = line.integer("input_length", 1)
        ids = line.integers("hash_ids")
        num_blocks = -(-length // _MOONCAKE_BLOCK)
        if len(ids) != num_blocks:
            problem = f"expected {num_blocks} ids, one for each {_MOONCAKE_BLOCK} of {length} tokens begun"
            raise line.error(problem, "hash_ids", f"{len(ids)} ids")
        parts = [Part(text, 0, _MOONCAKE_BLOCK) for text in ids[:-1]]
        parts.append(Part(ids[-1], 0, length - _MOONCAKE_BLOCK * (num_blocks - 1)))
        arrival_ns = line.integer("timestamp") * 1_000_000
        yield line, "timestamp", Request(number, arrival_ns, tuple(parts), line.integer("output_length", 1))


def _azure_rows(lines: list[str], path: Path) -> _Rows:
    columns = lines[0].split(",")
    for column in _AZURE_COLUMNS:
        if column not in columns:
            raise InputError("is missing, expected a column of that name", path=path, line=1, field=column)
    first_ns: int | None = None
    for number, text in enumerate(lines[1:]):
        values = text.split(",")
        if len(values) != len(columns):
            raise InputError(f"expected {len(columns)} columns", path=path, line=number + 2, value=text)
        line = Line(path, number + 2, dict(zip(columns, values, strict=True)))
        time_ns = _azure_time_ns(line)
        first_ns = time_ns if first_ns is None else first_ns
        part = Part(_FIRST_PRIVATE_TEXT + number, 0, _azure_count(line, "ContextTokens"))
        max_tokens = _azure_count(line, "GeneratedTokens")
        yield line, "TIMESTAMP", Request(number, time_ns - first_ns, (part,), max_tokens)


def _azure_time_ns(line: Line) -> int:
    """Nanoseconds since the year 1, exact to the 100 ns that the column can say."""
    match = _AZURE_TIME.fullmatch(line.get("TIMESTAMP"))
    seconds, fraction = match.groups(default="") if match else ("", "")
    try:
        since = datetime.fromisoformat(seconds) - datetime.min
    except ValueError as error:
        raise line.error("expected a time like 2023-11-16 18:15:46.6805900", "TIMESTAMP") from error
    return ((since.days * 86_400 + since.seconds) * 10_000_000 + int(fraction.ljust(7, "0"))) * 100


def _azure_count(line: Line, field: str) -> int:
    text = line.get(field)
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
        raise line.error("expected an integer >= 1", field)
    return int(text)


def _notes(requests: list[Request]) -> dict[str, int]:
    return {
        "same_instant": len(requests) - len({request.arrival_ns for request in requests}),
        "repeated_prompt": len(requests) - len({request.parts for request in requests}),
        "private_prompt": sum(request.parts[0].text >= _FIRST_PRIVATE_TEXT for request in requests),
        "one_token_output": sum(request.max_tokens == 1 for request in requests),
    }
