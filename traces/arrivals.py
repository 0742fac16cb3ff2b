"""Arrivals: when each request of a trace comes in, in any world's time."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq

from twinserve.traces.request import Request


class Arrivals:
    """The requests of a trace by the time they arrive.

    A request with `after` set arrives at its own time or `think_ns` after that request's answer is complete, whichever
    is later, and its prompt holds what was really answered. Equal instants go by trace row.

    Args:
        requests: a list, or an iterator that gives them in the order of their arrival and is read as they arrive, so
            that a long trace need not be held; none of those may wait for an answer.
    """

    def __init__(self, requests: Iterable[Request]):
        self._held: dict[int, list[Request]] = defaultdict(list)
        self._answer_lengths: dict[int, int] = {}
        self._answered: list[tuple[int, int, Request]] = []
        if isinstance(requests, Seq):
            latest, is_ordered = (0, -1), True
            for request in requests:
                if request.after is not None:
                    self._held[request.after].append(request)
                else:
                    is_ordered, latest = is_ordered and latest <= _place(request), _place(request)
            ordered = requests if is_ordered else sorted(requests, key=_place)
            self._coming: Iterator[Request] = (request for request in ordered if request.after is None)
        else:
            self._coming = _checked(requests)
        self._next = next(self._coming, None)

    @property
    def next_ns(self) -> int | None:
        """When the next request arrives; None if that depends on an answer, or nothing is left."""
        request = self.peek()
        return None if request is None else request.arrival_ns

    @property
    def is_empty(self) -> bool:
        """Have all requests arrived?"""
        return self._next is None and not self._answered and not self._held

    def peek(self) -> Request | None:
        """The next request to arrive, as far as is known now; None where `next_ns` is."""
        if self._answered and (self._next is None or self._answered[0][:2] < _place(self._next)):
            return self._answered[0][2]
        return self._next

    def pop(self) -> Request:
        """The next request to arrive; its time is `next_ns`."""
        request = self.peek()
        if request is None:
            raise IndexError("no request is known to arrive")
        if self._answered and self._answered[0][2] is request:
            heapq.heappop(self._answered)
        else:
            self._next = next(self._coming, None)
        return request

    def answered(self, request_id: int, answer_length: int, now_ns: int) -> None:
        """Request `request_id` has ended with `answer_length` tokens: those that wait for it can arrive."""
        if not self._held:
            return
        self._answer_lengths[request_id] = answer_length
        for request in self._held.pop(request_id, ()):
            arrival_ns = max(request.arrival_ns, now_ns + request.think_ns)
            request = request.resolved(self._answer_lengths)._replace(arrival_ns=arrival_ns)
            heapq.heappush(self._answered, (*_place(request), request))


def _place(request: Request) -> tuple[int, int]:
    return request.arrival_ns, request.id


def _checked(requests: Iterable[Request]) -> Iterator[Request]:
    """Requests in the order of their arrival.

    Raises:
        ValueError: one comes after a later one, or waits for an answer.
    """
    latest = (0, -1)
    for request in requests:
        if request.after is not None or _place(request) < latest:
            raise ValueError(f"{request} after {latest}, expected requests in the order of arrival that wait for none")
        latest = _place(request)
        yield request
