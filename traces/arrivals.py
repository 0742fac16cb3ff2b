"""Arrivals: when each request of a trace comes in, in any world's time."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from twinserve.traces.request import Request


class Arrivals:
    """The requests of a trace by the time they arrive.

    A request with `after` set arrives at its own time or `think_ns` after that request's answer is complete, whichever
    is later, and its prompt holds what was really answered. Equal instants go by trace row.
    """

    def __init__(self, requests: Iterable[Request]):
        self._due: list[tuple[int, int, Request]] = []
        self._held: dict[int, list[Request]] = defaultdict(list)
        self._answer_lengths: dict[int, int] = {}
        for request in requests:
            if request.after is None:
                self._due.append((request.arrival_ns, request.id, request))
            else:
                self._held[request.after].append(request)
        heapq.heapify(self._due)

    @property
    def next_ns(self) -> int | None:
        """When the next request arrives; None if that depends on an answer, or nothing is left."""
        return self._due[0][0] if self._due else None

    @property
    def is_empty(self) -> bool:
        """Have all requests arrived?"""
        return not self._due and not self._held

    def pop(self) -> Request:
        """The next request to arrive; its time is `next_ns`."""
        return heapq.heappop(self._due)[2]

    def answered(self, request_id: int, answer_length: int, now_ns: int) -> None:
        """Request `request_id` has ended with `answer_length` tokens: those that wait for it can arrive."""
        self._answer_lengths[request_id] = answer_length
        for request in self._held.pop(request_id, ()):
            arrival_ns = max(request.arrival_ns, now_ns + request.think_ns)
            request = replace(request.resolved(self._answer_lengths), arrival_ns=arrival_ns)
            heapq.heappush(self._due, (request.arrival_ns, request.id, request))
