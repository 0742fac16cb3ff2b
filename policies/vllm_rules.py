"""What changed in vLLM's scheduler from 0.24.0 (June 2026) to 0.33.0 (November 2026): each rule, an object."""

from __future__ import annotations

from typing import Final, NamedTuple

from mypy_extensions import mypyc_attr

from twinserve.policies.sequence import Sequence

UNLIMITED: Final = 1 << 62
"""A limit that is none; an integer, as all limits are."""


@mypyc_attr(allow_interpreted_subclasses=True)
class SelfPreemption:
    """Does a sequence that has to make room by going itself end the pass over those that run?

    vLLM 0.24: yes, those behind it get nothing in this step. 0.33: no, there may be room for them now.
    """

    def __init__(self, *, ends_pass: bool = False):
        self.ends_pass = ends_pass


@mypyc_attr(allow_interpreted_subclasses=True)
class VictimBefore:
    """Where the pass goes on after a victim that stood before the sequence which needed room.

    vLLM 0.33: behind that sequence. 0.24 passes over one more for each such victim that had got no tokens in the step.
    """

    def __init__(self, *, skips: bool = False):
        self.skips = skips

    def passed_over(self, behind: list[Sequence], num_victims: int) -> list[Sequence]:
        """Those of the sequences `behind` that get nothing, where so many victims without tokens stood before."""
        return behind[:num_victims] if self.skips else []


@mypyc_attr(allow_interpreted_subclasses=True)
class LongPrefillThreshold:
    """How `long_prefill_token_threshold` binds in a step.

    vLLM 0.24: always. 0.33: not a request that is alone; and if `adaptive`, never below the budget's share of each.
    """

    def __init__(self, *, binds_alone: bool = False, adaptive: bool = False):
        self.binds_alone, self.adaptive = binds_alone, adaptive

    def in_force(self, threshold: int, num_requests: int, budget: int) -> int:
        """The most tokens of a sequence, with so many that run or wait before the decision."""
        if num_requests <= 1 and not self.binds_alone:
            return UNLIMITED
        return max(threshold, budget // max(1, num_requests)) if self.adaptive else threshold


@mypyc_attr(allow_interpreted_subclasses=True)
class PrefillInterval:
    """vLLM 0.33's `prefill_schedule_interval`: between two steps with prompt work, `steps` - 1 for decodes alone.

    A step for decodes alone is *held*, unless nothing decodes or the last one that was not held left somebody waiting.

    Attributes:
        num_since: steps with tokens since the last with prompt work.
        is_saturated, is_held: did somebody stay waiting; is the present, or latest, decision for decodes alone?
    """

    def __init__(self, steps: int = 1):
        if steps < 1:
            raise ValueError(f"prefill_schedule_interval is {steps}, expected an integer >= 1")
        self.steps = self.num_since = steps
        self.is_saturated = self.is_held = False

    def holds(self, running: list[Sequence]) -> bool:
        """Is the next decision, with these running, for decodes alone?"""
        is_due = self.is_saturated or self.num_since + 1 >= self.steps
        return not is_due and any([seq.has_sampled for seq in running])

    def end(self, num_steps: int, is_prompt_work: bool, leaves_waiting: bool | None) -> None:
        """Count steps that were decided alike; `leaves_waiting` None where that cannot be told, after a preemption."""
        self.num_since = 0 if is_prompt_work else self.num_since + num_steps
        if leaves_waiting is not None and not self.is_held:
            self.is_saturated = leaves_waiting

    def num_alike(self, running: list[Sequence]) -> int:
        """How many decisions in a row, from the latest on, are held as it was or are all not held."""
        if self.holds(running) != self.is_held:
            return 1
        return self.steps - self.num_since if self.is_held else UNLIMITED


class VllmRules(NamedTuple):
    """The rules that changed, one object each; they belong to one Scheduler. By default those of vLLM 0.33."""

    self_preemption: SelfPreemption
    victim_before: VictimBefore
    threshold: LongPrefillThreshold
    interval: PrefillInterval

    @staticmethod
    def newest() -> VllmRules:
        return VllmRules(SelfPreemption(), VictimBefore(), LongPrefillThreshold(), PrefillInterval())
