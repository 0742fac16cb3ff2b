"""Spans of steps that repeat one another, as columns."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from twinserve.policies.core import Span


class BackToBack(Seq[Span]):
    """Spans of steps each of which is decided when the one before has ended, and starts an equal time after that.

    The millions of steps of a simulation come as some ten thousand of these, and a tuple a step would take longer than
    all else that is done with it. They can be cut: `spans[:count]`.

    Args:
        first_ns: when the first of them is decided.
        periods_ns: of each, from its decision to its end.
        lag_ns: from a decision to the start.

    Attributes:
        instants_ns: when each is decided, and when the last one ends.
    """

    __slots__ = ("first_ns", "instants_ns", "lag_ns", "periods_ns")

    def __init__(self, first_ns: int, periods_ns: np.ndarray, lag_ns: int):
        self.first_ns, self.periods_ns, self.lag_ns = first_ns, periods_ns, lag_ns
        self.instants_ns = np.full(len(periods_ns) + 1, first_ns)
        self.instants_ns[1:] += periods_ns.cumsum()

    def __len__(self) -> int:
        return len(self.periods_ns)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return BackToBack(self.first_ns, self.periods_ns[place], self.lag_ns)
        decided_ns, end_ns = self.instants_ns[place % len(self) :][:2].tolist()
        return decided_ns, decided_ns + self.lag_ns, end_ns
