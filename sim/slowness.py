"""Replicas that are slow and not dead."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from twinserve.sim.latency import LatencyModel, StepCost, StepFeatures, cost_of


@dataclass(frozen=True)
class Slowdown:
    """A replica's device takes `factor` times as long for steps that are decided from `from_ns` on, until `to_ns`; None
    is for good. It is not dead: nobody but its clients notices."""

    replica: int
    from_ns: int
    to_ns: int | None
    factor: float


class SlowLatency:
    """Another model's costs, of whose device's times some are longer, see `Slowdown`."""

    def __init__(self, latency: LatencyModel, slowdowns: Seq[Slowdown]):
        self._latency, self._slowdowns = latency, slowdowns
        if (watch := getattr(latency, "watch", None)) is not None:
            self.watch = watch

    def step_cost(self, features: StepFeatures) -> StepCost:
        """The cost at the time of the decision."""
        cost = cost_of(self._latency, features)
        for one in self._slowdowns:
            if one.from_ns <= features.decided_ns and (one.to_ns is None or features.decided_ns < one.to_ns):
                cost = cost.slower(one.factor)
        return cost
