"""Requests: those of a trace, millions of them where little is known of each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from itertools import count, repeat
from typing import Any

from twinserve.traces.request import Part, Request

FIRST_PRIVATE_TEXT = 1 << 40
"""Texts from this number on are prompts of which nothing but the length is known."""

_MOST = (1 << 32) - 1
_NOT_SAID = tuple(Request._field_defaults.values())
"""What a plain request has behind its time, prompt and answer."""


class Requests(Seq[Request]):
    """The requests of a trace in the order of its rows, which is that of their arrival.

    A *plain* request is one of which only its time and lengths are known: its prompt is a private text that has the
    number of its row. It takes 16 bytes, and is made when it is read: a week of Azure's has 27 million of them.

    Attributes:
        others: by place, the requests that say more.
    """

    __slots__ = ("_arrivals_ns", "_first_id", "_first_text", "_max_tokens", "_prompt_tokens", "others")

    def __init__(self, requests: Iterable[Request] = ()):
        self._arrivals_ns = array("q")
        self._prompt_tokens, self._max_tokens = array("I"), array("I")
        self._first_id, self._first_text = 0, -1
        self.others: dict[int, Request] = {}
        for request in requests:
            self.append(request)

    def append(self, request: Request) -> None:
        """Take the next request."""
        number, parts = len(self._arrivals_ns), request.parts
        length = parts[0].length if len(parts) == 1 else request.prompt_tokens
        if not self._is_plain(request, number):
            self.others[number] = request
        self._arrivals_ns.append(request.arrival_ns)
        self._prompt_tokens.append(min(length, _MOST))
        self._max_tokens.append(min(request.max_tokens, _MOST))

    @property
    def counts_by_place(self) -> bool:
        """Do plain requests, if there are any, have the numbers of their places?"""
        return (self._first_id, self._first_text) in ((0, -1), (0, FIRST_PRIVATE_TEXT))

    def extend(self, arrivals_ns: list[int], prompt_tokens: list[int], max_tokens: list[int]) -> None:
        """Take the next requests: plain ones, each with the number of its place, whose lengths are below 2**32."""
        assert self.counts_by_place, "those before are numbered otherwise"
        self._first_id, self._first_text = 0, FIRST_PRIVATE_TEXT
        self._arrivals_ns.fromlist(arrivals_ns)
        self._prompt_tokens.fromlist(prompt_tokens)
        self._max_tokens.fromlist(max_tokens)

    def _is_plain(self, request: Request, number: int) -> bool:
        """Is it one that its row, time and lengths make again? The first such says how rows are numbered."""
        text, start, length = request.parts[0] if len(request.parts) == 1 else (-1, 0, 0)
        if text < FIRST_PRIVATE_TEXT or start or length > _MOST or request.max_tokens > _MOST:
            return False
        if self._first_text < 0:
            self._first_id, self._first_text = request.id - number, text - number
        return (
            request.id == number + self._first_id
            and text == number + self._first_text
            and request.session is None
            and request.after is None
            and not (request.think_ns or request.priority or request.salt or request.tenant)
        )

    def __len__(self) -> int:
        return len(self._arrivals_ns)

    def __iter__(self) -> Iterator[Request]:
        # As their classes make them, in a third of the time.
        texts = zip(count(self._first_text), repeat(0), self._prompt_tokens)
        prompts = zip(map(tuple.__new__, repeat(Part), texts))
        columns = zip(count(self._first_id), self._arrivals_ns, prompts, self._max_tokens, *map(repeat, _NOT_SAID))
        plain = map(tuple.__new__, repeat(Request), columns)
        return map(self.others.get, count(), plain) if self.others else plain

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Requests(self[number] for number in range(*place.indices(len(self))))
        number = range(len(self))[place]
        if number in self.others:
            return self.others[number]
        parts = (Part(number + self._first_text, 0, self._prompt_tokens[number]),)
        return Request(number + self._first_id, self._arrivals_ns[number], parts, self._max_tokens[number])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Seq):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Requests({list(self)!r})"

    def has_plain(self, parts: Seq[Part]) -> bool:
        """Is there a plain request with this prompt?"""
        text, start, length = parts[0] if len(parts) == 1 else (-1, 0, 0)
        number = text - self._first_text
        is_plain = not start and 0 <= number < len(self) and number not in self.others
        return is_plain and self._prompt_tokens[number] == length

    def column(self, name: str) -> Any:
        """`arrival_ns`, `prompt_tokens` or `max_tokens` of each, as numpy's array: of Python's integers where the sum
        of all may be beyond 63 bits."""
        import numpy as np

        column = {"arrival_ns": self._arrivals_ns, "prompt_tokens": self._prompt_tokens}.get(name, self._max_tokens)
        values = np.array(column, np.int64)
        if name == "arrival_ns":
            return values
        longer = {number: getattr(request, name) for number, request in self.others.items() if column[number] == _MOST}
        if sum(longer.values()) + len(values) * _MOST >= 1 << 63:
            values = values.astype(object)
        for number, length in longer.items():
            values[number] = length
        return values

    def longer_than(self, most: int) -> Iterator[Request]:
        """Those whose prompt or answer has more tokens."""
        longest = max(max(column, default=0) for column in (self._prompt_tokens, self._max_tokens))
        if longest > min(most, _MOST - 1):
            yield from (r for r in self if max(r.prompt_tokens, r.max_tokens) > most)


def as_requests(requests: Iterable[Request]) -> Requests:
    """The same requests, as `Requests`."""
    return requests if isinstance(requests, Requests) else Requests(requests)
