"""When steps ran: how long the device worked on one, and the spans of those that repeat one another, as columns."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from twinserve.policies.core import Span

BACK_TO_BACK_NS = 100_000
"""A step that starts so soon after the end of the one before it had to wait for that."""


def device_ns(start_ns: int, end_ns: int, ended_ns: int | None) -> int:
    """How long the device worked on a step: from the end of the one before, `ended_ns`, where it followed at once."""
    if ended_ns is not None and 0 <= start_ns - ended_ns < BACK_TO_BACK_NS:
        return end_ns - ended_ns
    return end_ns - start_ns


class BackToBack(Seq[Span]):
    """Spans of steps each of which is decided when the one before has ended, and starts an equal time after that.

    The millions of steps of a simulation come as some ten thousand of these, and a tuple a step would take longer than
    all else that is done with it. They can be cut: `spans[:count]`.

    Args:
        instants_ns: when each is decided, and the last one ends; int64.
        periods_ns: of each, from its decision to its end; int64.
        lag_ns: from a decision to the start.
    """

    __slots__ = ("instants_ns", "lag_ns", "periods_ns")

    def __init__(self, instants_ns: np.ndarray, periods_ns: np.ndarray, lag_ns: int):
        self.instants_ns, self.periods_ns, self.lag_ns = instants_ns, periods_ns, lag_ns

    def __len__(self) -> int:
        return len(self.periods_ns)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return BackToBack(self.instants_ns[: place.stop + 1], self.periods_ns[: place.stop], self.lag_ns)
        decided_ns, end_ns = self.instants_ns[place % len(self) :][:2].tolist()
        return decided_ns, decided_ns + self.lag_ns, end_ns
