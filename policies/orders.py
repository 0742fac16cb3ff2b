"""Orders: which waiting sequence is next, which running one gives way, and whether the next one fits."""

from __future__ import annotations

from bisect import insort
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
    comes or goes. A method `bind` is given the BlockManager before anything else is called."""

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


class LeastUrgent:
    """The sequence that its order would admit last, wherever it is among those that run."""

    def __init__(self, order: Ranked):
        self._order = order

    def choose(self, running: Collection[Sequence], seq: Sequence) -> Sequence:
        return max(running, key=self._order.rank)


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


@mypyc_attr(allow_interpreted_subclasses=True)
class CacheAware(FirstCome):
    """The longest prefix hit first, among the `window` in front; each is passed over `patience` times at most, and a
    preempted one goes back to the front."""

    def __init__(self, *, window: int = 8, patience: int = 8):
        super().__init__()
        self.is_steady = False
        for name, value in (("window", window), ("patience", patience)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected an integer >= 1")
        self.window, self.patience = window, patience
        self._passed: dict[Sequence, int] = {}
        self._manager: BlockManager | None = None

    def bind(self, manager: BlockManager) -> None:
        """Look for hits in this manager's cache."""
        self._manager = manager

    def peek(self) -> Sequence:
        return self._queue[self._choose()]

    def pop_next(self) -> Sequence:
        index = self._choose()
        seq = self._queue[index]
        for number in range(index):
            passed = self._queue[number]
            self._passed[passed] = self._passed.get(passed, 0) + 1
        self.remove(seq)
        return seq

    def remove(self, seq: Sequence) -> None:
        super().remove(seq)
        self._passed.pop(seq, None)

    def _choose(self) -> int:
        assert self._manager is not None, "CacheAware is bound to no BlockManager"
        best = most = 0
        for index in range(min(self.window, len(self))):
            if self._passed.get(self._queue[index], 0) >= self.patience:
                return index
            hits = len(self._manager.find_hits(self._queue[index]))
            if hits > most:
                best, most = index, hits
        return best


@mypyc_attr(allow_interpreted_subclasses=True)
class Ranked(FirstCome):
    """The smallest rank first; a rank is fixed when the sequence is pushed, and equal ones go by arrival. With
    `ageing`, so many later arrivals outweigh one unit of the order's own measure; with 0 none do."""

    def __init__(self, *, ageing: int = 0):
        super().__init__()
        if ageing < 0:
            raise ValueError(f"ageing is {ageing}, expected an integer >= 0 (0: none)")
        self.ageing, self.starvation_free = ageing, ageing > 0
        self._ranks: dict[Sequence, tuple[int, int]] = {}

    def measure(self, seq: Sequence) -> int:
        """What the order goes by."""
        raise NotImplementedError

    def rank(self, seq: Sequence) -> tuple[int, int]:
        """Smaller is sooner; no two sequences have the same."""
        measure = self.measure(seq)
        return measure * self.ageing + seq.arrival_index if self.ageing else measure, seq.arrival_index

    def push(self, seq: Sequence) -> None:
        self._ranks[seq] = self.rank(seq)
        insort(self._queue, seq, key=self._ranks.__getitem__)

    def push_preempted(self, seq: Sequence) -> None:
        self.push(seq)

    def pop_next(self) -> Sequence:
        seq = super().pop_next()
        del self._ranks[seq]
        return seq

    def remove(self, seq: Sequence) -> None:
        super().remove(seq)
        del self._ranks[seq]


class Priority(Ranked):
    """The smallest `priority` first; the largest gives way, wherever it is among those that run, as in vLLM."""

    def __init__(self, *, ageing: int = 0):
        super().__init__(ageing=ageing)
        self.victim = LeastUrgent(self)

    def measure(self, seq: Sequence) -> int:
        return seq.priority


class ShortestJob(Ranked):
    """The fewest known tokens first, as of when the sequence came in or came back."""

    def measure(self, seq: Sequence) -> int:
        return seq.num_tokens
