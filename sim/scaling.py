"""Autoscaling: how many replicas are up, by a rule on what they have to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from twinserve.sim.replica import Replica

METRICS: dict[str, Callable[[Replica], float]] = {
    "waiting": lambda replica: replica.num_waiting,
    "outstanding": lambda replica: replica.outstanding_requests,
    "kv-use": lambda replica: replica.kv_use,
}


@dataclass(frozen=True)
class Scaling:
    """As many replicas as bring a metric to its target, as Kubernetes' HorizontalPodAutoscaler works it out.

    Every period, the metric of all that are up is added up and divided by the target; so many, rounded up, are wanted.
    Within `tolerance` of what there is, nothing changes. Those that are missing are begun at once, and are up when they
    have started. Those that are too many go, the last ones first, once no more than that were wanted for a while: they
    are sent nothing more, end what they have, and are gone.

    Attributes:
        metric: "waiting", requests of a replica that do not run yet; "outstanding", those that have not ended; or
            "kv-use", the share of its KV blocks in use.
        target: of the metric, on average.
        least: how many there are at least, and at first; the fleet's own number is the most.
        period_ns: between two looks; Kubernetes' default is 15 s.
        start_ns: from being wanted to being up: a cold start.
        settle_ns: how long no more may have been wanted before any goes; Kubernetes' default is 300 s.
    """

    metric: Literal["waiting", "outstanding", "kv-use"]
    target: float
    least: int = 1
    period_ns: int = 15 * 10**9
    start_ns: int = 60 * 10**9
    settle_ns: int = 300 * 10**9
    tolerance: float = 0.1

    def wanted(self, up: Iterable[Replica], count: int, most: int) -> int:
        """How many replicas there should be, where `count` are up or starting, and no more than `most` can be."""
        read = METRICS[self.metric]
        ratio = sum(map(read, up)) / self.target
        if abs(ratio / count - 1) <= self.tolerance:
            return count
        return min(most, max(self.least, math.ceil(ratio)))

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of it."""
        return asdict(self)


@dataclass
class Lease:
    """The time that a replica was paid for.

    Attributes:
        from_ns, up_ns, to_ns: when it was asked for, when it was up, and when it was gone; None: not yet.
    """

    replica: int
    from_ns: int
    up_ns: int | None = None
    to_ns: int | None = None
