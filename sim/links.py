"""Links that KV goes over: a port a replica, with a bandwidth, a latency and a queue."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """What KV goes over.

    Attributes:
        bytes_per_s: of a port.
        latency_ns: nanoseconds from the last byte's departure until it is there.
    """

    bytes_per_s: float
    latency_ns: int

    def duration_ns(self, num_bytes: float) -> int:
        """Nanoseconds that so many bytes keep a port busy."""
        return round(num_bytes / self.bytes_per_s * 1e9)


class Ports:
    """The ports of replicas. A transfer keeps those at both of its ends busy; transfers go in the order in which they
    are asked for, as soon as both ports are free."""

    def __init__(self, link: Link):
        self.link = link
        self._free_ns: defaultdict[int, int] = defaultdict(int)

    def transfer(self, source: int, target: int, num_bytes: float, ready_ns: int) -> tuple[int, int]:
        """When a transfer that is ready begins, and when all of it is there."""
        begin_ns = max(ready_ns, self._free_ns[source], self._free_ns[target])
        self._free_ns[source] = self._free_ns[target] = begin_ns + self.link.duration_ns(num_bytes)
        return begin_ns, self._free_ns[source] + self.link.latency_ns
