"""Latency models of tests: what a step costs is said by a formula."""

from __future__ import annotations

from twinserve.sim.latency import StepFeatures


class Uneven:
    """Every feature of a step has a price, none of them round; `factor` makes a slower device."""

    def __init__(self, factor: int = 1):
        self.factor = factor

    def step_cost(self, features: StepFeatures) -> tuple[int, int]:
        device = 3_000_017 + 301 * features.kv_tokens + 7 * features.attention_pairs + 40_009 * features.prompt_tokens
        return 700_001 + 13 * features.seqs, (device + 11 * features.sampled) * self.factor


class Constant:
    """Every step takes as long, so that much happens at the same instant."""

    def __init__(self, device_ns: int = 10_000_000):
        self.device_ns = device_ns

    def step_cost(self, features: StepFeatures) -> tuple[int, int]:
        return 0, self.device_ns
