"""Readers and writers: a trace file in, requests out, and back; every bad input is said in one line.

The content of a file says which format it has, and whether it is packed with gzip; `formats` has a module for each.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twinserve.settings.errors import InputError
from twinserve.settings.files import write_whole
from twinserve.traces.formats import (
    azure,
    burstgpt,
    guidellm,
    mooncake,
    own,
    recorded,
    sharegpt,
    vidur,
    vllm_bench,
    weka,
)
from twinserve.traces.formats.reading import FIRST_PRIVATE_TEXT, Reading, Rows
from twinserve.traces.lines import Line, json_value, read_content, text_lines
from twinserve.traces.request import Request

WrittenFormat = Literal["twinserve", "mooncake", "azure"]

_JSON_LINES = (own, mooncake, sharegpt, recorded)
_TABLES = (azure, vidur, burstgpt)
_DOCUMENTS = (weka, vllm_bench, guidellm)
_NAMES = ", ".join(format.NAME for format in (*_JSON_LINES, *_TABLES, *_DOCUMENTS))


@dataclass(frozen=True)
class Trace:
    """A trace as it was read.

    Attributes:
        requests: numbered in the order of their arrival.
        format: the name of its format.
        sha256: of the file's content, unpacked; of a folder, of its files' names and sha256.
        notes: how many requests have what a reader of results should know of: `same_instant` as the request before,
            `repeated_prompt` of an earlier request, `private_prompt` (shared with nothing because nothing is known of
            it), `one_token_output` (no time between tokens).
        handled: what was `dropped`, `clipped` or `repaired` on the way, counted by reason.
        epoch_ns: when time 0 was, in nanoseconds since 1970, taken as UTC; None where the file does not say.
    """

    requests: list[Request]
    format: str
    sha256: str
    notes: dict[str, int]
    handled: dict[str, dict[str, int]]
    epoch_ns: int | None = None


def read_trace(path: Path) -> Trace:
    """Read a trace: a file in any of the formats, or a folder of WEKA's conversations.

    Raises:
        InputError: the file cannot be read, its format is unknown, a value is missing or wrong, or times go backwards.
    """
    path = Path(path)
    reading = Reading()
    if path.is_dir():
        name, (rows, sha256) = weka.NAME, _folder(path, reading)
    else:
        content = read_content(path)
        sha256 = hashlib.sha256(content).hexdigest()
        lines = text_lines(content, path)
        if not lines:
            raise InputError("is empty, expected a trace", path=path)
        name, rows = _recognise(lines, path, reading)
    requests: list[Request] = []
    latest_ns = 0
    for line, time_field, request in rows:
        if request.arrival_ns < latest_ns:
            raise line.error("expected no earlier time than in the line before", time_field)
        latest_ns = request.arrival_ns
        requests.append(request)
    if not requests:
        dropped = reading.dropped.total()
        raise InputError("has no requests" + (f" to replay, {dropped} were dropped" if dropped else ""), path=path)
    return Trace(requests, name, sha256, _notes(requests), reading.handled, reading.epoch_ns)


def write_trace(
    path: Path,
    requests: list[Request],
    header: dict[str, Any],
    *,
    format: WrittenFormat = "twinserve",
    epoch_ns: int | None = None,
) -> dict[str, int]:
    """Write a trace, packed if the name ends in .gz; equal arguments give equal bytes.

    Reading it gives equal requests and the same `epoch_ns` again, in any format: what a row of the format cannot say
    stands in a further field or column of it, `twinserve`.

    Args:
        requests: their ids must be 0, 1, 2...
        header: goes into the first line beside the format; twinserve's own has one, the others do not.
        epoch_ns: when time 0 was, see `Trace`.

    Returns:
        How many rows hold each thing in the field `twinserve`.

    Raises:
        InputError: `path` exists, or cannot be written.
    """
    path = Path(path)
    for number, request in enumerate(requests):
        if request.id != number:
            raise ValueError(f"request {number} has id {request.id}, expected ids 0, 1, 2...")
    beside: Counter[str] = Counter()
    if format == "twinserve":
        header = header | ({} if epoch_ns is None else {"epoch_ns": epoch_ns})
        rows = own.texts(requests, header)
        text = "".join(json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n" for row in rows)
    else:
        written = {"mooncake": mooncake, "azure": azure}[format].texts(requests, epoch_ns)
        lines = []
        for line, said in written:
            lines.append(line)
            beside.update(dict.fromkeys(said, 1))
        text = "".join(lines)
    content = text.encode()
    write_whole(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return dict(beside)


def _recognise(lines: list[str], path: Path, reading: Reading) -> tuple[str, Rows]:
    """Which format it is, and its rows."""
    if lines[0].lstrip().startswith("{"):
        value, is_line = _first_object(lines, path)
        for format in _JSON_LINES if is_line else ():
            if value.keys() & format.KEYS:
                return format.NAME, format.rows(lines, path, reading)
        for format in _DOCUMENTS:
            if value.keys() & format.KEYS:
                if is_line and len(lines) > 1:
                    problem = f"expected the end of the file, as a {format.NAME} file is one object"
                    raise InputError(problem, path=path, line=2, value=lines[1])
                document = Line(path, 1 if is_line else None, value)
                return format.NAME, format.rows([document] if format is weka else document, reading)
    else:
        columns = set(lines[0].split(","))
        for format in _TABLES:
            if columns & format.KEYS:
                return format.NAME, format.rows(lines, path, reading)
    raise InputError(f"expected a trace, one of {_NAMES}", path=path, line=1, value=lines[0])


def _first_object(lines: list[str], path: Path) -> tuple[dict[str, Any], bool]:
    """The object in the first line, or in the file if it has more lines; and whether it was the line's."""
    try:
        return json_value(lines[0], path, 1, nan=True), True
    except InputError:
        if len(lines) == 1:
            raise
    return json_value("\n".join(lines), path, nan=True), False


def _folder(folder: Path, reading: Reading) -> tuple[Rows, str]:
    """The rows of the conversations in a folder, and its sha256."""
    paths = sorted(path for path in folder.iterdir() if path.name.endswith((".json", ".json.gz")))
    if not paths:
        raise InputError("has no *.json, expected a conversation of WEKA in each", path=folder)
    conversations = []
    digest = hashlib.sha256()
    for path in paths:
        content = read_content(path)
        digest.update(f"{path.name} {hashlib.sha256(content).hexdigest()}\n".encode())
        value = json_value("\n".join(text_lines(content, path)), path, nan=True)
        if type(value) is not dict or not value.keys() & weka.KEYS:
            raise InputError("expected a conversation of WEKA", path=path)
        conversations.append(Line(path, None, value))
    return weka.rows(conversations, reading), digest.hexdigest()


def _notes(requests: list[Request]) -> dict[str, int]:
    return {
        "same_instant": len(requests) - len({request.arrival_ns for request in requests}),
        "repeated_prompt": len(requests) - len({request.parts for request in requests}),
        "private_prompt": sum(next(iter(request.parts)).text >= FIRST_PRIVATE_TEXT for request in requests),
        "one_token_output": sum(request.max_tokens == 1 for request in requests),
    }
