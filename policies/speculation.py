"""Speculation: how drafts are scheduled, behind the last known token of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from twinserve.policies.batch import Batch


class Speculation(NamedTuple):
    """How drafts are scheduled, as vLLM 0.33 does it.

    A running sequence is given its drafts behind what it knows, as far as threshold, budget and `max_model_len` let it;
    those cut off are lost, and those of a sequence that gets nothing wait. While the step is in flight they count as if
    they were right (`num_in_flight`, `num_computed_tokens`); `postprocess` takes back what was rejected, or came behind
    the end. A draft is never registered in the prefix cache, a preemption drops it, and blocks that only rejected
    drafts reached stay with their sequence.

    Attributes:
        most: the most drafts of a sequence in a step; 0: there are none.
        choose: how many to ask for behind a decision, of each that samples; None: `most`, and admissions are padded.
        num_lookahead_tokens: tokens behind a row for which its sequence holds blocks too, where the proposer writes KV.
        draft_slots: tokens of the budget that a sequence costs beside those of its row.
        is_async: decisions run ahead of results: who samples has as many drafts as were asked for, right or not found.
    """

    most: int = 0
    choose: Callable[[Batch], int] | None = None
    num_lookahead_tokens: int = 0
    draft_slots: int = 0
    is_async: bool = False

    def check(self, composition: str, budget: int) -> None:
        """ValueError if rows with all their drafts cannot be had in batches of this composition and token budget."""
        if self.most and composition != "mixed":
            raise ValueError(f"composition is {composition!r}, expected 'mixed' with speculation")
        if budget < (least := self.draft_slots + 1 + self.most):
            raise ValueError(f"max_num_batched_tokens is {budget}, expected at least {least}")

    def end(self, batch: Batch) -> None:
        """Count the drafts of a decision's rows, and say how many to propose behind it; when ahead, they wait."""
        for seq in batch.seqs:
            num_drafts, seq.num_drafts = seq.num_computed_tokens + 1 - seq.num_tokens - seq.num_in_flight, 0
            if num_drafts > 0:
                batch.drafts[seq] = num_drafts
                seq.num_in_flight += num_drafts
        asked = batch.num_drafts_asked = self.most if self.choose is None else self.choose(batch)
        if not 0 <= asked <= self.most:
            raise ValueError(f"{self.choose} asks for {asked} drafts, expected 0 to {self.most}")
        if self.is_async:
            for seq in batch.sampled:
                seq.num_drafts = asked
