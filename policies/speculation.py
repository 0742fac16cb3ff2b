"""Speculation: how drafts are scheduled, behind the last known token of a sequence, and how many to ask for."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

from mypy_extensions import mypyc_attr

from twinserve.policies.batch import Batch


class DraftLength(Protocol):
    """Says how many drafts to ask for. `most` is the largest answer, at least 1."""

    most: int

    def choose(self, batch: Batch) -> int:
        """Drafts to propose for each sequence that samples in this batch, from 0 to `most`."""


@mypyc_attr(allow_interpreted_subclasses=True)
class VllmDraftLength:
    """vLLM's `num_speculative_tokens`; where `num_speculative_tokens_per_batch_size` has a row `(first, last, drafts)`
    for a batch of so many sequences, that many."""

    def __init__(self, most: int, table: Seq[tuple[int, int, int]] = ()):
        if most < 1:
            raise ValueError(f"num_speculative_tokens is {most}, expected an integer >= 1")
        self.most, self.table = most, [*table]
        before = 0
        for first, last, drafts in self.table:
            if not (before < first <= last and 0 <= drafts <= most):
                expected = f"first > {before}, last >= first and 0 to {most} drafts"
                raise ValueError(f"a row of the table is {(first, last, drafts)}, expected {expected}")
            before = last

    def choose(self, batch: Batch) -> int:
        for first, last, drafts in self.table:
            if first <= len(batch) <= last:
                return drafts
        return self.most


class Speculation(NamedTuple):
    """How drafts are scheduled, as vLLM 0.33 does it.

    A running sequence is given its drafts behind what it knows, as far as threshold, budget and `max_model_len` let it;
    those cut off are lost, and those of a sequence that gets nothing wait. While the step is in flight they count as if
    they were right (`num_in_flight`, `num_computed_tokens`); `postprocess` takes back what was rejected, or came behind
    the end. A draft is never registered in the prefix cache, a preemption drops it, and blocks that only rejected
    drafts reached stay with their sequence.

    Attributes:
        length: how many drafts are asked for.
        num_lookahead_tokens: tokens behind a row for which its sequence holds blocks too, where the proposer writes KV.
        draft_slots: tokens of the budget that a sequence costs beside those of its row.
        is_async: decisions run ahead of results. Nobody tells how many drafts there are; each sequence that samples has
            as many as were asked for, and what was not found counts as rejected.
    """

    length: DraftLength
    num_lookahead_tokens: int = 0
    draft_slots: int = 0
    is_async: bool = False

    def limits(self, composition: str, budget: int) -> tuple[int, int, int]:
        """The most drafts of a row, the tokens of lookahead and the slots; ValueError if rows with all their drafts
        cannot be had in batches of this composition and token budget."""
        for name, value in (("num_lookahead_tokens", self.num_lookahead_tokens), ("draft_slots", self.draft_slots)):
            if value < 0:
                raise ValueError(f"{name} is {value}, expected an integer >= 0")
        if composition != "mixed":
            raise ValueError(f"composition is {composition!r}, expected 'mixed' with speculation")
        if budget < (least := self.draft_slots + 1 + self.length.most):
            raise ValueError(f"max_num_batched_tokens is {budget}, expected at least {least}")
        return self.length.most, self.num_lookahead_tokens, self.draft_slots

    def end(self, batch: Batch) -> None:
        """Count the drafts that the rows of a decision have, and say how many to propose behind it; where results come
        late, these wait from now on."""
        for seq in batch.seqs:
            num_drafts, seq.num_drafts = seq.num_computed_tokens + 1 - seq.num_tokens - seq.num_in_flight, 0
            if num_drafts > 0:
                batch.drafts[seq] = num_drafts
                seq.num_in_flight += num_drafts
        asked = batch.num_drafts_asked = self.length.choose(batch)
        if not 0 <= asked <= self.length.most:
            raise ValueError(f"{self.length} asks for {asked} drafts, expected 0 to {self.length.most}")
        if self.is_async:
            for seq in batch.sampled:
                seq.num_drafts = asked
