"""Power: what a device draws while it computes and while it waits, and so the joules of a simulated run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinserve.sim.devices import PEAKS, Collectives, Power
from twinserve.sim.latency import LatencyModel, StepCost, StepFeatures, cost_of
from twinserve.sim.roofline import RooflineLatency

_FREE = 1e21


@dataclass(frozen=True)
class Use:
    """What devices did, added up over all of them.

    Attributes:
        busy_s: seconds in which they computed steps.
        bytes, operations: moved between them and their memory, and computed.
    """

    busy_s: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Use) -> Use:
        return Use(self.busy_s + other.busy_s, self.bytes + other.bytes, self.operations + other.operations)

    def joules(self, power: Power, in_all_s: float) -> float:
        """What they drew in `in_all_s` seconds of devices, idle ones included."""
        return (
            power.idle_w * in_all_s
            + power.active_w * self.busy_s
            + power.joules_per_byte * self.bytes
            + power.joules_per_operation * self.operations
        )


class Work:
    """The bytes and operations of a model's steps: its roofline on a device that moves one a nanosecond, and that takes
    no time for all else."""

    def __init__(self, latency: RooflineLatency):
        self.split = latency.split
        links = {"link": _FREE, "network": _FREE, "hop_ns": 0, "network_hop_ns": 0, "float8_flops": None}
        free = Collectives(ranks=2, all_reduce_ns=0, link=_FREE, source=PEAKS.source)
        counting = latency.device.model_copy(update={"shares": PEAKS, "collectives": free, **links})
        self._counts = [
            RooflineLatency(latency.shape, counting.model_copy(update=figures), split=latency.split)
            for figures in ({"bandwidth": 1e9, "flops": _FREE}, {"bandwidth": _FREE, "flops": 1e9})
        ]

    def of(self, features: StepFeatures, busy_ns: int, count: int = 1) -> Use:
        """Of a step, or of `count`, the first of which has these features and those that follow repeat it.

        Args:
            busy_ns: what the devices of a step are busy for, of a pipeline each with its own stage, of all steps.
        """
        moved, computed = (_sum(latency, features, count) for latency in self._counts)
        tensor = self.split.tensor
        return Use(tensor * busy_ns / 1e9, tensor * float(moved), tensor * float(computed))


def _sum(latency: LatencyModel, features: StepFeatures, count: int) -> int:
    """The device's nanoseconds of a step and of those that repeat it."""
    first = cost_of(latency, features).device_ns
    if count == 1:
        return first
    repeated = getattr(latency, "repeated_costs", None)
    known = None if repeated is None else repeated(features, count - 1)
    if known is not None:
        return first + int(np.sum(known[1]))
    later = (features.repeated(number, features.decided_ns) for number in range(1, count))
    return first + sum(cost_of(latency, one).device_ns for one in later)


class MeteredLatency:
    """Another model's costs, and a meter of what the steps that are made use.

    Args:
        work: of the model and the device that it is of.
    """

    def __init__(self, latency: LatencyModel, work: Work):
        self.latency, self.use = latency, Use()
        self._work = work
        self._told = getattr(latency, "watch", None)
        if (repeated := getattr(latency, "repeated_costs", None)) is not None:
            self.repeated_costs = repeated

    def step_cost(self, features: StepFeatures) -> tuple[int, int] | StepCost:
        """The other model's."""
        return self.latency.step_cost(features)

    def watch(self, features: StepFeatures, count: int = 1) -> None:
        """See Watching."""
        if self._told is not None:
            self._told(features, count)
        self.use += self._work.of(features, _sum(self.latency, features, count), count)


@dataclass(frozen=True)
class Metered:
    """Replicas that are alike: their meter, how many devices they have together, which kind, and what one draws."""

    latency: MeteredLatency
    num_devices: int
    device: str
    power: Power


def energy_of(metered: Iterable[Metered], summary: dict[str, Any]) -> dict[str, Any]:
    """The joules of a run, of each output token and of each finished request; from first arrival to last finish.

    Returns:
        `joules`, `joules_per_output_token`, `joules_per_request`, the mean `watts` of all devices, and the `basis`: the
        sources of their power models. None where nothing finished.
    """
    metered, duration_s = list(metered), summary["duration_s"]
    basis = "; ".join(dict.fromkeys(f"{one.device}: {one.power.source}" for one in metered))
    joules = None
    if duration_s:
        joules = sum(one.latency.use.joules(one.power, one.num_devices * duration_s) for one in metered)
    by = {
        "joules_per_output_token": summary["output_tokens"],
        "joules_per_request": summary["finished"],
        "watts": duration_s,
    }
    shares = {name: joules / count if joules is not None and count else None for name, count in by.items()}
    return {"joules": joules, **shares, "basis": basis}
