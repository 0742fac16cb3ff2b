"""Stages: when the steps of a pipeline of devices start and end."""

from __future__ import annotations

from collections import deque

from twinserve.sim.latency import StepCost


class Stages:
    """A pipeline's devices: each stage computes one step at a time, in their order.

    A step's first stage starts when the step is launched and that stage is free, and no sooner than the step has ended
    that came as many before as there are stages, if that one sampled: so vLLM's first rank waits for its tokens
    (`PPHandler` in vllm/v1/worker/gpu/pp_utils.py). Where stages are uneven, or fewer steps are on their way than there
    are stages, some stand idle: the pipeline's bubbles.

    Args:
        count: how many stages.
    """

    def __init__(self, count: int):
        self._free = [0] * count
        self._sampled: deque[int] = deque([0] * count, maxlen=count)

    def times(self, cost: StepCost, decided_ns: int, samples: bool) -> tuple[int, int, int]:
        """When the next step is launched, starts and ends; see `StepCost.times`. `samples`: does it sample?"""
        launched = decided_ns + cost.host_ns
        start = end = max(launched, self._free[0], self._sampled[0])
        for stage, stage_ns in enumerate(cost.stages):
            end = self._free[stage] = max(end, self._free[stage]) + stage_ns
        self._sampled.append(end if samples else 0)
        return launched, start, end

    def pass_by(self) -> None:
        """The next step is empty."""
        self._sampled.append(0)
