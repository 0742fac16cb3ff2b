"""vLLM's rules, each an object: whom it admits, and what changed from 0.24.0 (June 2026) to 0.33.0 (November 2026)."""

from __future__ import annotations

from typing import NamedTuple

from mypy_extensions import mypyc_attr

from twinserve.policies.block_manager import ENDLESS, BlockManager, bound
from twinserve.policies.sequence import Sequence


@mypyc_attr(allow_interpreted_subclasses=True)
class VllmAdmission:
    """vLLM's rule: what is needed must be free: for its first step's tokens, with `reserve_full_prompt` for all that it
    knows too; and `watermark_blocks` besides, while anything is running."""

    def __init__(self, *, reserve_full_prompt: bool = True, watermark_blocks: int = 0):
        if watermark_blocks < 0:
            raise ValueError(f"watermark_blocks is {watermark_blocks}, expected an integer >= 0")
        self.reserve_full_prompt, self.watermark_blocks = reserve_full_prompt, watermark_blocks

    def lacks(self, manager: BlockManager, seq: Sequence, hits: list[int], num_tokens: int, is_alone: bool) -> int:
        least = seq.num_tokens if self.reserve_full_prompt else 0
        covered = max(len(hits) * manager.block_size + num_tokens, least)
        margin = 0 if is_alone else self.watermark_blocks
        return max(0, manager.blocks_to_take(hits, covered) + margin - manager.num_free_blocks)


class LongPrefillThreshold(NamedTuple):
    """How `long_prefill_token_threshold` binds: in vLLM 0.24 always; in 0.33 not a request that is alone, and where it
    is `adaptive`, it is the budget's share of each request at least."""

    binds_alone: bool = False
    adaptive: bool = False

    def in_force(self, threshold: int, num_requests: int, budget: int) -> int:
        """The most tokens of a sequence, with so many that run or wait before the decision."""
        if num_requests <= 1 and not self.binds_alone:
            return ENDLESS
        return max(threshold, budget // max(1, num_requests)) if self.adaptive else threshold


@mypyc_attr(allow_interpreted_subclasses=True)
class PrefillInterval:
    """vLLM 0.33's `prefill_schedule_interval`: between two steps with prompt work, `steps` - 1 for decodes alone.

    These are *held*, but not if nothing decodes, or if the last decision that was not left somebody waiting
    (`is_saturated`). `num_since` counts the steps since the last with prompt work. `is_held`: is the latest one?"""

    def __init__(self, steps: int = 1):
        self.steps = self.num_since = bound("prefill_schedule_interval", steps)
        self.is_saturated = self.is_held = False

    def holds(self, running: list[Sequence]) -> bool:
        """Is the next decision, with these running, for decodes alone?"""
        is_due = self.is_saturated or self.num_since + 1 >= self.steps
        return not is_due and any([seq.has_sampled for seq in running])

    def end(self, num_steps: int, is_prompt_work: bool, leaves_waiting: bool | None) -> None:
        """Count steps that were decided alike; `leaves_waiting` is None after a preemption, which tells nothing."""
        self.num_since = 0 if is_prompt_work else self.num_since + num_steps
        if leaves_waiting is not None and not self.is_held:
            self.is_saturated = leaves_waiting


class VllmRules(NamedTuple):
    """The rules that changed, for one Scheduler, as the interval counts its steps.

    Attributes:
        self_preemption_ends_pass: does a sequence that has to make room by going itself end the pass? In vLLM 0.24.
        victim_before_skips: as many sequences lose their turn as there were victims without tokens in the step before
            the one that needed room. In vLLM 0.24; in 0.33 the pass goes on behind that one.
    """

    interval: PrefillInterval
    self_preemption_ends_pass: bool = False
    victim_before_skips: bool = False
    threshold: LongPrefillThreshold = LongPrefillThreshold()
