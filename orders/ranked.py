"""Orders by rank: the most urgent first, or the shortest; and the victim that such an order would admit last."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection

from mypy_extensions import mypyc_attr

from twinserve.policies import FirstCome, Sequence


class LeastUrgent:
    """The sequence that its order would admit last, wherever it is among those that run."""

    def __init__(self, order: Ranked):
        self._order = order

    def choose(self, running: Collection[Sequence], seq: Sequence) -> Sequence:
        return max(running, key=self._order.rank)


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
