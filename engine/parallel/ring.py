"""Ring: messages from one process to some others of the same host, through memory that they share."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

CAPACITY = 1 << 20
_LINE = 64
"""Bytes of a cache line: a count that one process writes lies in one of its own."""
_NAPS_S = 50e-6, 2e-3
"""The shortest and the longest nap. One is no more than a twentieth of how long was waited before it, so that it adds
little to that, and who waits for long takes next to no time of a processor."""
_FENCE = threading.Lock()


def _fence() -> None:
    """Have what was written before be seen before what is written after; taking a lock does, on every processor."""
    with _FENCE:
        pass


class Ring:
    """A stream of bytes that one process writes and each of some others reads whole, through a ring of shared memory.

    A message costs the writer one copy, however many read it. Who waits looks again and again for a while, then takes
    naps between its looks.

    Args:
        path: a file of `make`.
        num_readers: processes that read.
        reader: which of them this is, from 0; None writes.
        eager_s: seconds of looking before the first nap.
        check: called while waiting; it raises where nothing can come any more.
    """

    def __init__(
        self, path: Path, num_readers: int, reader: int | None, *, eager_s: float, check: Callable[[], None]
    ) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        # How many bytes were written, then how many each reader has read, each in a line of its own.
        counts = np.frombuffer(self._memory, np.int64, _LINE // 8 * (1 + num_readers))[:: _LINE // 8]
        self._written, self._read = counts[:1], counts[1:]
        self._start = _LINE * (1 + num_readers)
        self._reader, self._eager_s, self._check = reader, eager_s, check

    @staticmethod
    def make(num_readers: int) -> Path:
        """A file for a ring, in memory where the system has a folder for that; whoever has opened it needs no name."""
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        number, name = tempfile.mkstemp(prefix="twinserve-", dir=folder)
        os.ftruncate(number, _LINE * (1 + num_readers) + CAPACITY)
        os.close(number)
        return Path(name)

    def send(self, message: bytes) -> None:
        """Write a message; waits where a reader is as far behind as the ring is long."""
        data = len(message).to_bytes(8, "little") + message
        for begin in range(0, len(data), CAPACITY // 2):
            piece, first = data[begin : begin + CAPACITY // 2], int(self._written[0])
            end = first + len(piece)
            self._until(partial(self._has_room, end))
            for place, part in _pieces(first, len(piece)):
                self._memory[self._start + place : self._start + place + part.stop - part.start] = piece[part]
            _fence()
            self._written[0] = end

    def receive(self) -> bytes:
        """Wait for the next message."""
        return self._take(int.from_bytes(self._take(8), "little"))

    def _take(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            first = int(self._read[self._reader])
            self._until(partial(self._has_more, first))
            _fence()
            count = min(size - len(data), int(self._written[0]) - first)
            for place, part in _pieces(first, count):
                data += self._memory[self._start + place : self._start + place + part.stop - part.start]
            _fence()
            self._read[self._reader] = first + count
        return bytes(data)

    def _has_room(self, end: int) -> bool:
        """May the ring be written up to the byte `end`?"""
        return end - int(self._read.min()) <= CAPACITY

    def _has_more(self, first: int) -> bool:
        """Is there anything behind the first bytes?"""
        return int(self._written[0]) > first

    def _until(self, is_so: Callable[[], bool]) -> None:
        begun, (shortest_s, longest_s) = time.perf_counter(), _NAPS_S
        while not is_so():
            waited_s = time.perf_counter() - begun
            if waited_s < self._eager_s:
                os.sched_yield()
            else:
                self._check()
                time.sleep(max(shortest_s, min(longest_s, waited_s / 20)))


def _pieces(first: int, count: int) -> list[tuple[int, slice]]:
    """Where in the ring `count` bytes lie from the `first` ever written on, and which of them: one piece, or two."""
    place = first % CAPACITY
    until_end = min(count, CAPACITY - place)
    return [(place, slice(0, until_end)), (0, slice(until_end, count))]
