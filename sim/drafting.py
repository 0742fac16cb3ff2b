"""What proposing drafts costs in a simulation, behind the step that it follows."""

from __future__ import annotations

from typing import Protocol

from twinserve.sim.latency import LatencyModel, StepCost, StepFeatures, cost_of


class Drafting(Protocol):
    """Says what it costs to propose drafts behind a step."""

    def drafting_ns(self, features: StepFeatures) -> int:
        """Nanoseconds for `features.asked` drafts of each of the step's `drafting` sequences."""


class LookupDrafting:
    """Prompt lookup, which reads the text of each sequence.

    Args:
        row_ns, token_ns: nanoseconds a sequence, and a token of its text.
    """

    def __init__(self, row_ns: float, token_ns: float):
        self._row_ns, self._token_ns = row_ns, token_ns

    def drafting_ns(self, features: StepFeatures) -> int:
        return round(self._row_ns * features.drafting + self._token_ns * features.drafting_tokens)


class ModelDrafting:
    """A smaller model. It computes what the step has computed, which gives the first draft, and for each further one a
    token of each sequence, whose contexts count as equally long. A pass takes what the device needs, or launching it
    kernel by kernel if that is longer.

    Args:
        latency: what steps of the smaller model cost.
    """

    def __init__(self, latency: LatencyModel):
        self._latency = latency

    def drafting_ns(self, features: StepFeatures) -> int:
        count, tokens = features.drafting, features.drafting_tokens
        first = features._replace(sampled=count, asked=0, drafting=0, drafting_tokens=0)
        one = StepFeatures(
            features.decision,
            count,
            0,
            count,
            tokens,
            tokens,
            count,
            decided_ns=features.decided_ns,
            longest_decode=-(-tokens // count),
        )
        passes = [first, *(one.repeated(number, features.decided_ns) for number in range(1, features.asked))]
        return sum(map(self._pass_ns, passes))

    def _pass_ns(self, features: StepFeatures) -> int:
        cost = cost_of(self._latency, features)
        return max(cost.device_ns, cost.lead_ns)


class DraftedLatency:
    """Another model's costs, and behind each step that asks for drafts those of proposing them."""

    def __init__(self, latency: LatencyModel, drafting: Drafting):
        self._latency, self._drafting = latency, drafting

    def step_cost(self, features: StepFeatures) -> StepCost:
        """The cost of a step and of the drafts behind it."""
        cost = cost_of(self._latency, features)
        if not (features.asked and features.drafting):
            return cost
        return cost.followed(self._drafting.drafting_ns(features))

    def watch(self, features: StepFeatures, count: int = 1) -> None:
        """Tell the other model, if it wants to know, which steps were made."""
        if (told := getattr(self._latency, "watch", None)) is not None:
            told(features, count)
