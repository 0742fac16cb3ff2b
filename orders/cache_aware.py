"""CacheAware: first the sequence that the prefix cache spares most."""

from __future__ import annotations

from mypy_extensions import mypyc_attr

from twinserve.policies import BlockManager, FirstCome, Sequence


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
