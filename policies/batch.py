"""Batch: one decision, as a table with a row for each sequence that computes something, and what changed before it."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from twinserve.policies.sequence import Sequence


class Row(NamedTuple):
    """One sequence's part of a step: `num_tokens` tokens from position `start` on; the last `num_drafts` are drafts.
    `samples`: the step reaches the last known token, so it samples the next one. `is_prompt`: the sequence has sampled
    nothing since it was admitted."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    is_prompt: bool
    num_drafts: int = 0


class Runs(NamedTuple):
    """What came of a step that verified drafts: for each of `batch.sampled` a run of tokens, of so many `lengths`, 1 to
    1 + its drafts. `token_ids` has those of all runs, one behind another; None in a simulation. `proposed` has for each
    how many drafts wait for its next step, None where the scheduler never hears of them."""

    token_ids: Seq[Any] | None
    lengths: Seq[int]
    proposed: Seq[int] | None = None


class Batch:
    """One decision: the rows of a step, as columns in running order, their totals, and what changed since the decision
    before. Unpacks as the pair `seqs, is_prefill`.

    Attributes:
        usual_tokens: what a running sequence gets that is not a prompt: 1, or 0 in a step for prompts alone.
        seqs, starts, lengths: of each row the sequence, the position of its first token, and its number of tokens.
        chunks, prompts: those of `seqs` that do not sample; those that had sampled nothing since they were admitted.
        sampled: those of `seqs` that sample a token.
        admitted: the rows of sequences that were waiting; their `start` is the prefix hit.
        left, preempted, aborted: sequences that finished or were aborted, were preempted, were aborted just now.
        drafts: how many of its tokens are drafts, of each row that has any. num_drafts_asked: how many to propose then.
        runs: what came of `drafts`: sequence, tokens made, tokens kept. proposed: sequence, drafts for its next step.
        grown: block tables of running sequences that became longer, with the new blocks.
        kv_moves: facts of KV that lies elsewhere, see `twinserve.orders.loading`; written by Core's callers.
        skipped: running sequences that got nothing in a step that decodes.
        num_tokens: of all rows; `num_prompt_tokens` are those of `prompts`, `num_decode_tokens` the others.
        num_kv_tokens, num_attention_pairs: the sum of the rows' contexts; each query counted against each of its keys.
        is_ahead, lost_prompts: the step before was in flight; a prompt's row was taken back, as it was preempted.
        num_waiting, num_running, num_used_blocks: once all of this was decided.
        decision, seen, committed, decided_ns, launched_ns, start_ns, end_ns: facts, written by Core and its callers.
    """

    def __init__(self, usual_tokens: int) -> None:
        self.usual_tokens = usual_tokens
        self.seqs: list[Sequence] = []
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.chunks: list[Sequence] = []
        self.prompts: list[Sequence] = []
        self.sampled: list[Sequence] = []
        self.admitted: list[Row] = []
        self.left: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.aborted: list[Sequence] = []
        self.drafts: dict[Sequence, int] = {}
        self.runs: list[tuple[Sequence, int, int]] = []
        self.proposed: list[tuple[Sequence, int]] = []
        self.grown: list[tuple[Sequence, list[int]]] = []
        self.skipped: list[Sequence] = []
        self.kv_moves: dict[str, list[Any]] = {}
        self.num_tokens = self.num_prompt_tokens = self.num_kv_tokens = self.num_attention_pairs = self.seen = 0
        self.num_waiting = self.num_running = self.num_used_blocks = self.decided_ns = self.num_drafts_asked = 0
        self.is_ahead, self.lost_prompts, self.decision, self.committed = False, False, -1, -1
        self.launched_ns: int | None = None
        self.start_ns: int | None = None
        self.end_ns: int | None = None

    def remove(self, seq: Sequence) -> bool:
        """Take back what was decided for a sequence; had it a row?"""
        self.grown = [(other, block_ids) for other, block_ids in self.grown if other is not seq]
        if seq not in self.seqs:
            return False
        place = self.seqs.index(seq)
        del self.seqs[place], self.starts[place], self.lengths[place]
        if seq in self.chunks:
            self.chunks.remove(seq)
        if seq in self.prompts:
            self.prompts.remove(seq)
            self.lost_prompts = True
        return True

    def count(self) -> None:
        """Work out who samples and the totals, once every row is there."""
        self.sampled = self.seqs[: -len(self.chunks)] if self.chunks else self.seqs
        if self.seqs[len(self.sampled) :] != self.chunks:  # mostly they are the last
            self.sampled = [seq for seq in self.seqs if seq not in self.chunks]
        self.num_tokens = sum(self.lengths)
        self.num_prompt_tokens = sum([seq.num_scheduled_tokens for seq in self.prompts]) if self.prompts else 0
        self.num_kv_tokens = self.num_attention_pairs = sum(self.starts) + self.num_tokens
        if self.num_tokens > len(self.seqs):  # all but a row's last token attend to keys beside those that are counted
            longer = self.prompts if self.num_decode_tokens == len(self.seqs) - len(self.prompts) else self.seqs
            ends = [(seq.num_scheduled_tokens, seq.num_computed_tokens) for seq in longer]
            self.num_attention_pairs += sum([(n - 1) * (2 * end - n) // 2 for n, end in ends])

    @property
    def num_decode_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_sampled(self) -> int:
        return len(self.seqs) - len(self.chunks)

    @property
    def is_prefill(self) -> bool:
        """Does some sequence compute more than one token, or sample for the first time since it was admitted?"""
        return any(row.num_tokens > 1 or row.samples for row in self.rows if row.is_prompt) if self.prompts else False

    @property
    def rows(self) -> list[Row]:
        """The rows, in running order; a new list."""
        chunks, prompts, drafts = set(self.chunks), set(self.prompts), self.drafts
        return [
            Row(seq, start, length, seq not in chunks, seq in prompts, drafts.get(seq, 0))
            for seq, start, length in zip(self.seqs, self.starts, self.lengths, strict=True)
        ]

    def __iter__(self) -> Iterator[list[Sequence] | bool]:
        yield self.seqs
        yield self.is_prefill

    def __len__(self) -> int:
        return len(self.seqs)
