"""Orders: which waiting sequence is next, which running one gives way, and whether the next one fits."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import Protocol

from mypy_extensions import mypyc_attr

from twinserve.policies.block_manager import BlockManager
from twinserve.policies.sequence import Sequence


class Victim(Protocol):
    """Says which running sequence is preempted when another one needs a block and none is free."""

    def choose(self, running: Collection[Sequence], seq: Sequence) -> Sequence:
        """One of `running`, which is in the order of admission (and can be reversed); it may be `seq` itself."""


class Order(Protocol):
    """The waiting queue. Only what `peek` shows is ever admitted; `starvation_free`: after a bounded number of others;
    `victim`: the order's own rule; `is_steady` (False where it is missing): who is next changes only when a sequence
    comes or goes. A method `bind` is given the BlockManager before anything else is called; for `loads` see Loading."""

    starvation_free: bool
    victim: Victim

    def push(self, seq: Sequence) -> None: ...  # a new one
    def push_preempted(self, seq: Sequence) -> None: ...  # one that comes back after a preemption
    def peek(self) -> Sequence: ...  # the next one; asking changes nothing
    def pop_next(self) -> Sequence: ...  # removed
    def remove(self, seq: Sequence) -> None: ...  # one that was aborted, or ended while it waited
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sequence]: ...


class Admission(Protocol):
    """Says whether the next sequence may be admitted now."""

    def lacks(self, manager: BlockManager, seq: Sequence, hits: list[int], num_tokens: int, is_alone: bool) -> int:
        """Free blocks that lack for `seq` to get `num_tokens` tokens behind the cached blocks `hits`; 0: it may.
        `is_alone`: nothing is running. The answer depends on the arguments alone. It is never less because fewer blocks
        are free, and at most one less for each hit more, so nobody is asked again before that can have changed."""


class LastAdmitted:
    """The sequence that was admitted last."""

    def choose(self, running: Collection[Sequence], seq: Sequence) -> Sequence:
        return next(reversed(running))  # type: ignore[call-overload]


@mypyc_attr(allow_interpreted_subclasses=True)
class FirstCome:
    """In the order of arrival; a preempted sequence goes back to the front."""

    starvation_free = True
    is_steady = True

    def __init__(self) -> None:
        self.victim: Victim = LastAdmitted()
        self._queue: deque[Sequence] = deque()

    def push(self, seq: Sequence) -> None:
        self._queue.append(seq)

    def push_preempted(self, seq: Sequence) -> None:
        self._queue.appendleft(seq)

    def peek(self) -> Sequence:
        return self._queue[0]

    def pop_next(self) -> Sequence:
        return self._queue.popleft()

    def remove(self, seq: Sequence) -> None:
        self._queue.remove(seq)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)
