"""Readers and writers: a trace file in, requests out, and back; every bad input is said in one line.

The content of a file says which format it has, and whether it is packed with gzip; `formats` has a module for each.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from twinserve.settings.errors import InputError
from twinserve.settings.files import refuse_endless, whole_file
from twinserve.settings.garbage import rare_collections
from twinserve.traces.formats import (
    aiperf,
    azure,
    bailian,
    burstgpt,
    guidellm,
    inference_perf,
    mooncake,
    own,
    own_csv,
    parquet,
    recorded,
    servegen,
    sglang_bench,
    sharegpt,
    sharegpt_v3,
    splitwise,
    vidur,
    vllm_bench,
    weka,
)
from twinserve.traces.formats.reading import FIRST_PRIVATE_TEXT, PlainRows, Reading, Rows, columns_of
from twinserve.traces.lines import Content, Line, json_lines, json_lines_file, json_value
from twinserve.traces.request import Part, Request
from twinserve.traces.requests import Requests, as_requests

WrittenFormat = Literal["twinserve", "mooncake", "azure"]

_JSON_LINES: tuple[tuple[frozenset[str], Any], ...] = (
    (frozenset(own.FIELDS), own),
    (frozenset(recorded.FIELDS), recorded),
    (frozenset(bailian.FIELDS), bailian),
    (frozenset({"session_id", "input_length"}), aiperf),
    (frozenset(mooncake.FIELDS), mooncake),
    (frozenset({"timestamp", "input_length"}), aiperf),
    (frozenset(sharegpt.FIELDS), sharegpt),
)
"""Of each format all the fields that make it, the more telling first."""
_DOCUMENTS = (weka, vllm_bench, sglang_bench, guidellm)
_ARRAYS = (sharegpt_v3, inference_perf)
_TABLES = (azure, vidur, burstgpt, splitwise, servegen)
_STREAMED = {form.NAME for form in (own, mooncake, bailian, sharegpt, *_TABLES)}
"""Formats that are read a line at a time."""
_NEIGHBOURS = {
    "an AIBrix workload": {"timestamp", "requests"},
    "a batch of OpenAI's interface": {"custom_id", "body"},
    "a dataset of conversations without lengths": {"messages"},
}
"""What people have that says nothing of lengths or times, by fields."""
_NAMES = ", ".join(
    dict.fromkeys(form.NAME for form in (*(form for _, form in _JSON_LINES), *_TABLES, *_DOCUMENTS, *_ARRAYS))
)


@dataclass(frozen=True)
class Trace:
    """A trace as it was read.

    Attributes:
        requests: numbered in the order of their arrival.
        format: the name of its format.
        sha256: of the file's content, unpacked; of a record in several files, of all together; of a folder of
            conversations, of its files' names and sha256.
        notes: how many requests have what a reader of results should know of: `same_instant` as the request before,
            `repeated_prompt` of an earlier request, `private_prompt` (shared with nothing because nothing is known of
            it), `one_token_output` (no time between tokens), `arrival_not_said` where the file is not timed.
        handled: what was `dropped`, `clipped` or `repaired` on the way, counted by reason.
        epoch_ns: when time 0 was, in nanoseconds since 1970, taken as UTC; None where the file does not say.
        is_timed: whether the file says when requests come; where it does not, all are at 0.
        num_unread: lines behind the last that was wanted.
    """

    requests: Requests
    format: str
    sha256: str
    notes: dict[str, int]
    handled: dict[str, dict[str, int]]
    epoch_ns: int | None = None
    is_timed: bool = True
    num_unread: int = 0


@rare_collections
def read_trace(path: Path, *, limit: int | None = None, until_s: float = math.inf, columns: str | None = None) -> Trace:
    """Read a trace: a file in any of the formats, a run record's folder, or one of WEKA's conversations.

    Args:
        limit: so many requests are read, and no more.
        until_s: up to the first request that arrives so many seconds after the first one or later.
        columns: of a CSV file of one's own, see `own_csv.Columns`.

    Raises:
        InputError: the file cannot be read, its format is unknown, a value is missing or wrong, or times go backwards.
    """
    path = Path(path)
    is_all_wanted = limit is None and until_s == math.inf
    reading = Reading() if is_all_wanted else Reading(rows_at_once=1)  # no row behind the last is looked at
    if os.path.isdir(path):  # which is no error for any name
        if columns is not None:
            raise InputError("expected a CSV file", path=path, field="columns", value=columns)
        form, read_folder = (recorded, _record) if recorded.is_record(path) else (weka, _folder)
        rows, sha256 = read_folder(path, reading)
        _read(rows, reading, limit, until_s)
        return _trace(form.NAME, sha256, reading, path, sum(1 for _ in rows))
    with Content(path) as content:
        name, rows = _own_csv(content, path, reading, columns) if columns else _recognise(content, path, reading)
        is_whole = _read(rows, reading, limit, until_s)
        num_unread = 0
        if not is_whole:
            num_unread = content.rest_of_lines() if name in _STREAMED else sum(1 for _ in rows)
        return _trace(name, content.sha256(), reading, path, num_unread)


def made_trace(requests: Seq[Request], name: str, sha256: str) -> Trace:
    """A trace of requests that come from elsewhere, by the name of what they are from and the sha256 of its content."""
    reading = Reading()
    for request in requests:
        reading.requests.append(request)
    return Trace(reading.requests, name, sha256, _notes(reading.requests), reading.handled)


def _read(rows: Rows, reading: Reading, limit: int | None, until_s: float) -> bool:
    """Read the requests that are wanted; whether they are all."""
    requests = reading.requests
    first_ns = latest_ns = 0
    for row in rows:
        if isinstance(row, PlainRows) and requests.counts_by_place and _is_sorted([latest_ns, *row.arrivals_ns]):
            requests.extend(row.arrivals_ns, row.prompt_tokens, row.max_tokens)
            latest_ns = row.arrivals_ns[-1]
            continue
        for line, time_field, request in row if isinstance(row, PlainRows) else (row,):
            if request.arrival_ns < latest_ns:
                raise line.error("expected no earlier time than in the line before", time_field)
            latest_ns = request.arrival_ns
            first_ns = first_ns if requests else latest_ns
            requests.append(request)
            if len(requests) == limit or latest_ns - first_ns >= until_s * 1e9:
                return False
    return True


def _is_sorted(values: list[int]) -> bool:
    """Is no value less than the one before?"""
    return values == sorted(values)


def _trace(name: str, sha256: str, reading: Reading, path: Path, num_unread: int) -> Trace:
    requests = reading.requests
    if not requests:
        dropped = reading.dropped.total()
        raise InputError("has no requests" + (f" to replay, {dropped} were dropped" if dropped else ""), path=path)
    notes, handled = _notes(requests), reading.handled
    if not reading.is_timed:
        notes["arrival_not_said"] = len(requests)
    return Trace(requests, name, sha256, notes, handled, reading.epoch_ns, reading.is_timed, num_unread)


def write_trace(
    path: Path,
    requests: Seq[Request],
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
    with whole_file(path) as file:
        packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.suffix == ".gz" else nullcontext(file)
        with packed as into:
            for line, said in _written(format, as_requests(requests), header, epoch_ns):
                into.write(line.encode())
                beside.update(list(said))
    return dict(beside)


def _written(
    format: WrittenFormat, requests: Requests, header: dict[str, Any], epoch_ns: int | None
) -> Iterator[tuple[str, Iterable[str]]]:
    """The lines of a trace, each with the names of what it holds in the field `twinserve`."""
    if format != "twinserve":
        yield from {"mooncake": mooncake, "azure": azure}[format].texts(requests, epoch_ns)
        return
    for row in own.texts(requests, header | ({} if epoch_ns is None else {"epoch_ns": epoch_ns})):
        yield json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n", ()


def _recognise(content: Content, path: Path, reading: Reading) -> tuple[str, Rows]:
    """Which format it is, and its rows."""
    lines = parquet.lines(path) if content.begin.startswith(b"PAR1") else iter(content)
    first = next(lines, None)
    if first is None:
        raise InputError("is empty, expected a trace", path=path)
    opening = first.lstrip()[:1]
    if opening == "[":
        return _recognise_array(json_value(content.whole(first), path, nan=True), path, reading)
    if opening == "{":
        return _recognise_object(first, lines, content, path, reading)
    try:
        columns = columns_of(first)
    except (ValueError, csv.Error) as error:
        raise InputError(f"expected the names of a table's columns: {error}", path=path, line=1, value=first) from error
    for table in _TABLES:
        if set(table.FIELDS) <= set(columns):
            return table.NAME, table.rows(chain((first,), lines), path, reading)
    hint = "; or a table of your own by columns, such as --columns time=COLUMN,prompt=COLUMN,output=COLUMN"
    raise _unknown(columns, [(set(table.FIELDS), table) for table in _TABLES], first, path, hint)


def _own_csv(content: Content, path: Path, reading: Reading, columns: str) -> tuple[str, Rows]:
    """The rows of a table whose columns are named by who hands it in."""
    named = own_csv.Columns.parse(columns)
    lines = iter(content)
    first = next(lines, None)
    if first is None:
        raise InputError("is empty, expected a trace", path=path)
    try:
        columns_of(first)
    except (ValueError, csv.Error) as error:
        raise InputError(f"expected the names of a table's columns: {error}", path=path, line=1, value=first) from error
    return own_csv.NAME, own_csv.rows(chain((first,), lines), path, reading, named)


def _recognise_object(
    first: str, lines: Iterator[str], content: Content, path: Path, reading: Reading
) -> tuple[str, Rows]:
    """Of a file that begins with an object: JSON lines, a document a line, or one document."""
    try:
        value = json_value(first, path, 1, nan=True)
    except InputError:
        text = content.whole(first)
        if text == first:
            raise
        document = Line(path, None, json_value(text, path, nan=True))
        for form in _DOCUMENTS:
            if set(form.FIELDS) <= document.values.keys():
                return form.NAME, form.rows([document], reading)
        raise _unknown(document.values, [(set(form.FIELDS), form) for form in _DOCUMENTS], first, path) from None
    for fields, form in _JSON_LINES:
        if fields <= value.keys():
            return form.NAME, form.rows(chain((first,), lines), path, reading)
    for form in _DOCUMENTS:
        if set(form.FIELDS) <= value.keys():
            documents = json_lines(chain((first,), lines), path, nan=True)
            return form.NAME, form.rows(list(documents), reading)
    known = [*_JSON_LINES, *((set(form.FIELDS), form) for form in _DOCUMENTS)]
    raise _unknown(value, known, first, path)


def _recognise_array(value: Any, path: Path, reading: Reading) -> tuple[str, Rows]:
    """Of a file that is one list."""
    document = Line(path, None, {"[]": value})
    if not value or type(value[0]) is not dict:
        raise InputError(f"expected a trace, one of {_NAMES}", path=path, value=value)
    for form in _ARRAYS:
        if set(form.FIELDS) <= value[0].keys():
            return form.NAME, form.rows(document.items("[]"), reading)
    raise _unknown(value[0], [(set(form.FIELDS), form) for form in _ARRAYS], json.dumps(value[0]), path)


def _unknown(
    found: Iterable[str], known: Iterable[tuple[Collection[str], Any]], first: str, path: Path, hint: str = ""
) -> InputError:
    """What a file is that is no trace: a neighbour, or nearly one of the formats; and what else may be tried."""
    names = set(found)
    for words, marks in _NEIGHBOURS.items():
        if marks <= names:
            problem = f"is {words}, by {', '.join(sorted(marks))}, which is not read: expected one of {_NAMES}"
            return InputError(problem, path=path, line=1)
    fields, form = max(known, key=lambda entry: len(names & set(entry[0])) / len(entry[0]))
    if 2 * len(names & set(fields)) >= len(fields):
        missing = ", ".join(sorted(set(fields) - names))
        problem = f"is missing: by {', '.join(sorted(names & set(fields)))} it is of the format {form.NAME}{hint}"
        return InputError(problem, path=path, line=1, field=missing)
    return InputError(f"expected a trace, one of {_NAMES}{hint}", path=path, line=1, value=first)


def _record(folder: Path, reading: Reading) -> tuple[Rows, str]:
    """The rows of a run record, and the sha256 of the files that hold them."""
    paths = recorded.request_files(folder)
    lines = (line for path in paths for line in json_lines_file(path))
    return recorded.rows_of(lines, reading), sha256_of(paths)


def sha256_of(paths: Iterable[Path]) -> str:
    """The sha256 of what files hold, unpacked, one after the other.

    Raises:
        InputError: one of them cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with Content(path, digest) as content:
            content.rest_of_lines()
    return digest.hexdigest()


def _folder(folder: Path, reading: Reading) -> tuple[Rows, str]:
    """The rows of the conversations in a folder, and its sha256."""
    refuse_endless(folder)
    paths = sorted(path for path in folder.iterdir() if path.name.endswith((".json", ".json.gz")))
    if not paths:
        raise InputError("has no *.json, expected a conversation of WEKA in each", path=folder)
    conversations = []
    digest = hashlib.sha256()
    for path in paths:
        with Content(path) as content:
            value = json_value(content.whole(next(iter(content), "")), path, nan=True)
            name = path.name.encode("utf-8", "surrogateescape")
            digest.update(name + f" {content.sha256()}\n".encode())
        if type(value) is not dict or not set(weka.FIELDS) <= value.keys():
            raise InputError(f"expected a conversation of WEKA, with {', '.join(weka.FIELDS)}", path=path)
        conversations.append(Line(path, None, value))
    return weka.rows(conversations, reading), digest.hexdigest()


def _notes(requests: Requests) -> dict[str, int]:
    others = requests.others.values()
    num_plain = len(requests) - len(others)
    of_length: defaultdict[int, list[Seq[Part]]] = defaultdict(list)
    for request in others:
        of_length[request.prompt_tokens].append(request.parts)
    prompts = chain.from_iterable(set(alike) if len(alike) > 1 else alike for alike in of_length.values())
    arrivals_ns = requests.column("arrival_ns")
    return {
        "same_instant": int((arrivals_ns[1:] == arrivals_ns[:-1]).sum()),
        "repeated_prompt": len(others) - sum(not requests.has_plain(parts) for parts in prompts),
        "private_prompt": num_plain + sum(next(iter(request.parts)).text >= FIRST_PRIVATE_TEXT for request in others),
        "one_token_output": int((requests.column("max_tokens") == 1).sum()),
    }
