"""Which free KV blocks were cached: a record says how many were held, and the rest comes of deciding it again."""

from __future__ import annotations

from dataclasses import dataclass

from twinserve.policies import Batch, CoreListener, Sequence
from twinserve.traces.runs.record import RunRecord
from twinserve.traces.runs.waits import Explainer


@dataclass(frozen=True)
class Cached:
    """How many free KV blocks the prefix cache knew, decision by decision, as they were made again.

    Attributes:
        behind: right behind each decision, as the record's `used_blocks` are.
        left: before the next one, or at the end: what ran had ended, and nobody had come yet.
    """

    behind: list[int]
    left: list[int]


class PoolExplainer(Explainer):
    """Notes as well how many free blocks the prefix cache knows."""

    def __init__(self, record: RunRecord, also: CoreListener | None = None):
        super().__init__(record, also)
        self._behind: list[int] = []
        self._left: list[int] = []
        self._latest = 0

    @property
    def cached(self) -> Cached:
        """What was noted, once the record has been decided again."""
        return Cached(self._behind, [*self._left[1:], self._latest])

    def decided(self, batch: Batch) -> None:
        super().decided(batch)
        self._left.append(self._latest)
        self._note()
        self._behind.append(self._latest)

    def committed(self, batch: Batch) -> None:
        self._note()

    def finished(self, seq: Sequence) -> None:
        super().finished(seq)
        self._note()

    def _note(self) -> None:
        self._latest = self.core.scheduler.block_manager.num_cached_blocks
