"""Leap: when decisions are made that repeat one another, worked out in pieces that double.

A request that comes in throws away what was planned behind it. As each piece is as long as all before it, no more is
ever thrown away than was made, whatever the arrivals do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from twinserve.policies import Core
from twinserve.policies.core import Span
from twinserve.settings.errors import InputError
from twinserve.sim.latency import LatencyModel, StepCost, StepFeatures, cost_of
from twinserve.traces.runs.spans import BackToBack

_FEW = 6
"""Steps that cost less one by one than as columns."""
_FIRST_COLUMN = 256
"""Steps of the first piece that is worked out as columns: fewer cost as much."""


class Leap:
    """The repetitions of the latest batch of `core`, as far as they are planned.

    Args:
        features: of the batch.
        num_repetitions: how many there are at most; one at least.
        launched_ns: when the batch is launched.
    """

    def __init__(
        self, core: Core, latency: LatencyModel, features: StepFeatures, num_repetitions: int, launched_ns: int
    ):
        self._latency, self._depth = latency, core.pipeline_depth
        self._columns: Callable | None = getattr(latency, "repeated_costs", None)
        self.features = features
        self._num_repetitions = num_repetitions
        self._ends = [before.end_ns or 0 for before in core.in_flight]
        self._spans: list[Span] = []
        self._decided = [max(launched_ns, self._ends[-1 - self._depth])]
        self._back_to_back: BackToBack | None = None
        self.extend()

    @property
    def num_planned(self) -> int:
        """Repetitions that are planned."""
        return len(self._spans) if self._back_to_back is None else len(self._back_to_back)

    @property
    def until_ns(self) -> int:
        """When the decision is made that follows the last planned one."""
        return self.decided_ns(self.num_planned)

    def decided_ns(self, number: int) -> int:
        """When the repetition of this number, from 0 on, is decided, or what follows the last one."""
        return int(self._decided[number] if self._back_to_back is None else self._back_to_back.instants_ns[number])

    def num_before(self, now_ns: int) -> int:
        """How many of the planned ones are decided before a time."""
        return bisect_left(self._decided if self._back_to_back is None else self._back_to_back.instants_ns, now_ns)

    def spans(self, count: int) -> Seq[Span]:
        """The first `count` planned ones."""
        planned: Seq[Span] = self._spans if self._back_to_back is None else self._back_to_back
        return planned if count == self.num_planned else planned[:count]

    def extend(self) -> bool:
        """Plan as many more as are planned; False if there are no more."""
        planned = self.num_planned
        count = min(max(planned, 1), self._num_repetitions - planned)
        if count <= 0:
            return False
        known = self._known_costs(planned)
        if known is not None and not self._depth and not self._spans:
            self._add_columns(*known)
            return True
        costs = [] if known is None else [StepCost(known[0], device) for device in known[1].tolist()]
        for number in range(planned + 1, planned + 1 + (len(costs) or count)):
            decided = self._decided[-1]
            if costs:
                cost = costs[number - planned - 1]
            else:
                features = self.features.repeated(number, decided)
                cost = cost_of(self._latency, features)
            launched, start, end = cost.times(decided, self._ends[-1])
            self._ends.append(end)
            self._spans.append((decided, start, end))
            self._decided.append(max(launched, self._ends[-1 - self._depth]))
        return True

    def _known_costs(self, planned: int) -> tuple[int, np.ndarray] | None:
        """What the next piece costs, where the latency says that at once; None where it is asked step by step."""
        left = self._num_repetitions - planned
        if self._columns is None or (left < _FEW and not self._back_to_back):
            return None
        before = self.features.repeated(planned, 0) if planned else self.features
        known = self._columns(before, min(max(planned, _FIRST_COLUMN), left))
        if known is not None and min(known[0], int(np.minimum.reduce(known[1]))) < 0:
            raise InputError(
                "expected nanoseconds >= 0", field=f"repeated_costs of {type(self._latency).__name__}", value=known
            )
        return known

    def _add_columns(self, host_ns: int, devices_ns: np.ndarray) -> None:
        """Plan steps each of which is decided when the one before has ended."""
        known = self._back_to_back
        periods = devices_ns + host_ns
        instants = np.empty(len(periods) + 1, np.int64)
        instants[0] = self._decided[0] if known is None else known.instants_ns[-1]
        instants[1:] = periods
        instants = np.add.accumulate(instants)
        if known is not None:
            instants = np.concatenate((known.instants_ns, instants[1:]))
            periods = np.concatenate((known.periods_ns, periods))
        self._back_to_back = BackToBack(instants, periods, host_ns)
