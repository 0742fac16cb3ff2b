"""twinserve's own format, and what it adds to a row of another format that cannot say all of a request.

JSON lines. A header, `{"format": "twinserve-trace/1", ...}`, then one object a request: `arrival_ns`, `max_tokens`, its
prompt as `prompt` (a list of [text, start, length], see `Part`) or as `prompt_tokens` (that many tokens that nothing
else in the trace shares), and if need be `session`, `after`, `think_ns`, `priority`, `salt` and `tenant`.

A row of another format may have a field or column `twinserve`: an object with those of `arrival_ns`, `prompt`,
`session`, `after`, `think_ns`, `priority`, `salt` and `tenant` that the row itself cannot say, in the first row also
`epoch_ns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from twinserve.settings.errors import InputError
from twinserve.traces.formats.reading import FIRST_PRIVATE_TEXT, Reading, Rows, private_prompt
from twinserve.traces.lines import LABELS, Line, json_lines
from twinserve.traces.request import Part, Request, answer_text

NAME = "twinserve"
FIELDS = ("format",)
TRACE_FORMAT = "twinserve-trace/1"
BESIDE = "twinserve"
"""The field of another format's row that holds what the row cannot say."""

_LINKS = ("session", "after", "think_ns", *LABELS)
_FIELDS = ("arrival_ns", "prompt", "prompt_tokens", "max_tokens", *_LINKS)
_BESIDE_FIELDS = ("arrival_ns", "prompt", *_LINKS, "epoch_ns")


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    rest = json_lines(lines, path)
    header = next(rest)
    header.one_of("format", (TRACE_FORMAT,))
    reading.epoch_ns = header.optional_integer("epoch_ns")
    private = _PrivateTexts()
    for number, line in enumerate(rest):
        _refuse_unknown(line, _FIELDS)
        if ("prompt" in line.values) == ("prompt_tokens" in line.values):
            raise InputError("expected either prompt or prompt_tokens", path=path, line=line.number)
        if "prompt" in line.values:
            parts = line.parts("prompt")
            private.meet(line, parts, number)
        else:
            parts = private.prompt(line, number)
        request = Request(number, line.integer("arrival_ns"), parts, line.integer("max_tokens", 1), **_links(line))
        _check_links(line, request, reading.requests)
        yield line, "arrival_ns", request


class _PrivateTexts:
    """The texts of rows with `prompt_tokens`, held apart from those that other rows name by number."""

    def __init__(self) -> None:
        self._is_taken = bytearray()
        self._named: set[int] = set()

    def prompt(self, line: Line, number: int) -> tuple[Part, ...]:
        """The prompt of a row of which nothing but the length is known."""
        self._is_taken.extend(bytes(number + 1 - len(self._is_taken)))
        if FIRST_PRIVATE_TEXT + number in self._named:
            self._refuse(line, "prompt_tokens", number)
        self._is_taken[number] = 1
        return private_prompt(number, line.integer("prompt_tokens", 1))

    def meet(self, line: Line, parts: tuple[Part, ...], number: int) -> None:
        """A row names texts, its own private one in most long traces."""
        for part in parts:
            if part.text >= FIRST_PRIVATE_TEXT and part.text != FIRST_PRIVATE_TEXT + number:
                named = part.text - FIRST_PRIVATE_TEXT
                if named < len(self._is_taken) and self._is_taken[named]:
                    self._refuse(line, "prompt", named)
                self._named.add(part.text)

    def _refuse(self, line: Line, field: str, number: int) -> None:
        problem = f"expected a text that is not {FIRST_PRIVATE_TEXT + number}, as request {number} has prompt_tokens"
        raise line.error(problem, field)


def texts(requests: Iterable[Request], header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects of the lines of a file, the header first."""
    yield {"format": TRACE_FORMAT} | header
    for request in requests:
        row = {"arrival_ns": request.arrival_ns, "prompt": list(request.parts), "max_tokens": request.max_tokens}
        yield row | _said_links(request)


def beyond(request: Request, told: Request) -> dict[str, Any]:
    """What `request` says beyond `told`, which is all that a row of another format says of it."""
    said: dict[str, Any] = {}
    if request.arrival_ns != told.arrival_ns:
        said["arrival_ns"] = request.arrival_ns
    if request.parts != told.parts:
        said["prompt"] = list(request.parts)
    return said | _said_links(request)


def completed(beside: Line, told: Request, earlier: Seq[Request]) -> Request:
    """The request that a row of another format says as `told`, with what stands beside it.

    Raises:
        InputError: what stands beside it is wrong, or contradicts the row.
    """
    _refuse_unknown(beside, _BESIDE_FIELDS)
    arrival_ns = beside.integer("arrival_ns") if "arrival_ns" in beside.values else told.arrival_ns
    parts = beside.parts("prompt") if "prompt" in beside.values else told.parts
    request = Request(told.id, arrival_ns, parts, told.max_tokens, **_links(beside))
    if request.prompt_tokens != told.prompt_tokens:
        problem = f"expected a prompt of {told.prompt_tokens} tokens, as the row has it"
        raise beside.error(problem, "prompt", f"{request.prompt_tokens} tokens")
    _check_links(beside, request, earlier)
    return request


def _refuse_unknown(line: Line, known: tuple[str, ...]) -> None:
    if unknown := [name for name in line.values if name not in known]:
        raise line.error(f"expected only {', '.join(known)}", unknown[0])


def _links(line: Line) -> dict[str, Any]:
    """Session, the request that is waited for, how long after its answer, and what orders look at."""
    if line.values.keys().isdisjoint(_LINKS):
        return {}
    after = line.optional_integer("after")
    think_ns = line.optional_integer("think_ns")
    if think_ns is not None and after is None:
        raise line.error("expected `after` beside it", "think_ns")
    links = {"session": line.optional_integer("session"), "after": after, "think_ns": think_ns or 0}
    return links | line.labels()


def _said_links(request: Request) -> dict[str, Any]:
    said = {"session": request.session, "after": request.after, "think_ns": request.think_ns or None}
    return {name: value for name, value in said.items() if value is not None} | request.labels


def _check_links(line: Line, request: Request, earlier: Seq[Request]) -> None:
    """The prompt is not empty, `after` names an earlier request, and answers in the prompt are complete by then."""
    if not request.parts:
        raise line.error("expected at least one part", "prompt")
    if request.after is not None and request.after >= request.id:
        raise line.error(f"expected the number of an earlier request, below {request.id}", "after")
    if all(part.text >= 0 for part in request.parts):
        return
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
