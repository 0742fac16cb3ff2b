"""Azure (github.com/Azure/AzurePublicDataset, 2023 to 2025): CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

TIMESTAMP is any instant of ISO 8601, in UTC where it names no offset. Images (`NumImages`, 2025) are left out, and
counted.
Nothing is known of the prompts, so each is a text of its own. Time 0 is the first row.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from twinserve.traces.formats import own
from twinserve.traces.formats.reading import (
    FIRST_INSTANT,
    PlainRows,
    Reading,
    Rows,
    Table,
    count,
    instant,
    instant_ns,
    plain_rows,
    private_prompt,
    tables,
)
from twinserve.traces.lines import Line, json_value
from twinserve.traces.request import Request
from twinserve.traces.requests import Requests

NAME = "azure"
FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

_TICK_NS = 100


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    epoch_ns: int | None = None
    number = 0
    for table in tables(lines, path, FIELDS, reading.rows_at_once):
        plain = _plain(table, number, epoch_ns)
        if plain is not None:
            if epoch_ns is None:
                epoch_ns = _begin(reading, instant(table.column("TIMESTAMP")[0]))
            yield plain
            number += len(table)
            continue
        for line in table:
            tick_ns = instant_ns(line, "TIMESTAMP")
            beside = _beside(line)
            if epoch_ns is None:
                given_ns = None if beside is None else beside.optional_integer("epoch_ns")
                epoch_ns = _begin(reading, tick_ns if given_ns is None else given_ns)
            parts = private_prompt(number, count(line, "ContextTokens"))
            request = Request(number, tick_ns - epoch_ns, parts, count(line, "GeneratedTokens"))
            if beside is not None:
                request = own.completed(beside, request, reading.requests)
                if (epoch_ns + request.arrival_ns) // _TICK_NS != tick_ns // _TICK_NS:
                    problem = f"expected the time of the row, {tick_ns - epoch_ns} from the first"
                    raise beside.error(problem, "arrival_ns")
            if line.values.get("NumImages", "0") != "0":
                reading.clipped["images_left_out"] += 1
            yield line, "TIMESTAMP", request
            number += 1


def _begin(reading: Reading, epoch_ns: int) -> int:
    """When time 0 was; noted, where it is behind 1970."""
    if epoch_ns > 0:
        reading.epoch_ns = epoch_ns
    return epoch_ns


def _plain(table: Table, first: int, epoch_ns: int | None) -> PlainRows | None:
    """The rows as columns, if that is all they say."""
    if any(table.column(own.BESIDE)) or not set(table.column("NumImages")) <= {"0"}:
        return None
    return plain_rows(table, FIELDS, first, epoch_ns, instant)


def texts(requests: Requests, epoch_ns: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file, each with what it holds in the column `twinserve`, which is there if a row needs it.

    Lines end as in Azure's files: in CRLF, the last one in nothing. A trace that does not say when it began begins
    with 1970.
    """
    epoch_ns = epoch_ns or 0
    needed = any(_said_beside(request, epoch_ns) for request in requests)
    yield ",".join((*FIELDS, own.BESIDE) if needed else FIELDS), {}
    for request in requests:
        row = (_time(_tick_ns(request, epoch_ns)), request.prompt_tokens, request.max_tokens)
        beside = _said_beside(request, epoch_ns) if needed else {}
        text = io.StringIO()
        said = json.dumps(beside, separators=(",", ":")) if beside else ""
        csv.writer(text, lineterminator="").writerow((*row, said) if needed else row)
        yield "\r\n" + text.getvalue(), beside


def _tick_ns(request: Request, epoch_ns: int) -> int:
    """When a request comes, as exactly as a row says it, in nanoseconds since 1970."""
    return (epoch_ns + request.arrival_ns) // _TICK_NS * _TICK_NS


def _said_beside(request: Request, epoch_ns: int) -> dict[str, Any]:
    """What a request's row holds in the column `twinserve`."""
    parts = private_prompt(request.id, request.prompt_tokens)
    told = Request(request.id, _tick_ns(request, epoch_ns) - epoch_ns, parts, request.max_tokens)
    beside = own.beyond(request, told)
    if not request.id and (request.arrival_ns or epoch_ns % _TICK_NS):
        beside |= {"arrival_ns": request.arrival_ns, "epoch_ns": epoch_ns}
    return beside


def _beside(line: Line) -> Line | None:
    text = line.values.get(own.BESIDE)
    if not text:
        return None
    value = json_value(text, line.path, line.number)
    if type(value) is not dict:
        raise line.error("expected a JSON object", own.BESIDE)
    return Line(line.path, line.number, value, f"{own.BESIDE}.")


def _time(tick_ns: int) -> str:
    seconds, rest_ns = divmod(tick_ns, 1_000_000_000)
    return f"{(FIRST_INSTANT + timedelta(seconds=seconds)).replace(tzinfo=None)}.{rest_ns // _TICK_NS:07}"
