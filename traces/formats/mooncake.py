"""Mooncake (github.com/kvcache-ai/Mooncake): JSON lines with `timestamp`, `input_length`, `output_length`, `hash_ids`.

Times are milliseconds, of whatever clock: time 0 is the first row. There is an id for each 512 tokens begun;
equal ids mean equal tokens, so each is a text of its own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from itertools import count
from pathlib import Path
from typing import Any

from twinserve.traces.formats import own
from twinserve.traces.formats.reading import Reading, Rows
from twinserve.traces.lines import LARGEST, Line, json_lines
from twinserve.traces.request import Blocks, Part, PrefixKeys, Request, answer_text
from twinserve.traces.requests import Requests

NAME = "mooncake"
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")

_BLOCK = 512
_MS = 1_000_000


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    first_ns: int | None = None
    for number, line in enumerate(json_lines(lines, path)):
        parts = blocks(line.integers("hash_ids"), line.integer("input_length", 1), _BLOCK, line)
        time_ns = line.integer("timestamp") * _MS
        if time_ns > LARGEST:
            raise line.error("expected milliseconds that are nanoseconds of at most 63 bits", "timestamp")
        if first_ns is None:
            # Where a further field says when the first request comes, the times are those of the trace.
            beside = line.values.get(own.BESIDE)
            first_ns = 0 if isinstance(beside, dict) and "arrival_ns" in beside else time_ns
        told = Request(number, reading.since_first(time_ns, first_ns), parts, line.integer("output_length", 1))
        request = told
        if own.BESIDE in line.values:
            if type(line.values[own.BESIDE]) is not dict:
                raise line.error("expected an object", own.BESIDE)
            beside = Line(path, line.number, line.values[own.BESIDE], f"{own.BESIDE}.")
            request = own.completed(beside, told, reading.requests)
            if request.arrival_ns // _MS * _MS != told.arrival_ns:
                raise beside.error(f"expected a time within millisecond {told.arrival_ns // _MS}", "arrival_ns")
            if not number:
                reading.epoch_ns = beside.optional_integer("epoch_ns")
        yield line, "timestamp", request


def texts(requests: Requests, epoch_ns: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file, each with what it holds in the field `twinserve`.

    Where all prompts are made as this reader makes them, their texts are the ids. Otherwise an id stands for the whole
    prefix that ends with its block, as in Mooncake's own traces, and the prompt itself stands beside it.
    """
    free = count()
    numbers: defaultdict[int, int] = defaultdict(free.__next__)
    told_of = {part.text for request in requests.others.values() for part in request.parts}
    as_read = all(_is_as_read(request.parts) for request in requests)
    for number, request in enumerate(requests):
        if as_read:
            ids = [part.text for part in request.parts]
        else:
            ends = (*range(_BLOCK, request.prompt_tokens, _BLOCK), request.prompt_tokens)
            if number in requests.others or request.parts[0].text in told_of:
                ids = [numbers[key] for key in map(PrefixKeys(request.parts, answer_text(request.id)), ends)]
            else:  # nothing else begins so
                ids = [next(free) for _ in ends]
        timestamp = request.arrival_ns // _MS
        prompt = Blocks(ids, _BLOCK, request.prompt_tokens)
        told = Request(request.id, timestamp * _MS, prompt, request.max_tokens)
        beside = own.beyond(request, told)
        if not request.id and timestamp:
            beside["arrival_ns"] = request.arrival_ns
        if epoch_ns is not None and not request.id:
            beside["epoch_ns"] = epoch_ns
        row: dict[str, Any] = {"timestamp": timestamp, "input_length": request.prompt_tokens}
        row |= {"output_length": request.max_tokens, "hash_ids": ids}
        yield json.dumps(row | ({own.BESIDE: beside} if beside else {})) + "\n", beside


def blocks(ids: list[int], length: int, size: int, line: Line) -> Blocks:
    """A prompt of `length` tokens from an id for each `size` of them begun.

    Raises:
        InputError: there are more ids, or fewer.
    """
    num_blocks = -(-length // size)
    if len(ids) != num_blocks:
        problem = f"expected {num_blocks} ids, one for each {size} of {length} tokens begun"
        raise line.error(problem, "hash_ids", f"{len(ids)} ids")
    return Blocks(ids, size, length)


def _is_as_read(parts: Seq[Part]) -> bool:
    return (
        all(part.text >= 0 and part.start == 0 for part in parts)
        and all(part.length == _BLOCK for part in parts[:-1])
        and parts[-1].length <= _BLOCK
    )
