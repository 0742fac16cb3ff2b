"""Speculative decoding as vLLM 0.33 schedules it: rows with draft tokens behind the last known one, the runs of tokens
that verification gives back, and how many drafts to ask for."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

from mypy_extensions import mypyc_attr

from twinserve.policies.batch import Batch
from twinserve.policies.block_manager import BlockManager
from twinserve.policies.scheduler import FINISHED, RUNNING, Scheduler, checked_tokens
from twinserve.policies.sequence import Sequence

METHODS = {
    "ngram": (False, 0, 0),
    "ngram_gpu": (False, 0, 0),
    "draft_model": (True, 1, 0),
    "eagle3": (True, 0, 1),
}
"""By vLLM's names of them: does the proposer write KV behind a row, its `draft_slots`, and the tokens behind a block
that the key of the block covers (`PrefixCache.hash_lookahead_tokens`)."""


class Runs(NamedTuple):
    """What came of a step that verified drafts: for each of `batch.sampled` a run of tokens, of so many `lengths`, 1 to
    1 + its drafts. `token_ids` has those of all runs, one behind another; None in a simulation. `proposed` has for each
    how many drafts wait for its next step, None where the scheduler never hears of them."""

    token_ids: Seq[int] | None
    lengths: Seq[int]
    proposed: Seq[int] | None = None


class DraftLength(Protocol):
    """Says how many drafts to ask for. `most` is the largest answer, at least 1."""

    most: int

    def choose(self, batch: Batch) -> int:
        """Drafts to propose for each sequence that samples in this batch, from 0 to `most`."""


@mypyc_attr(allow_interpreted_subclasses=True)
class FixedLength:
    """Always the same number of drafts."""

    def __init__(self, most: int):
        self.most = _at_least(1, "num_speculative_tokens", most)

    def choose(self, batch: Batch) -> int:
        return self.most


@mypyc_attr(allow_interpreted_subclasses=True)
class LengthByBatchSize:
    """vLLM's `num_speculative_tokens_per_batch_size`: rows `(first, last, drafts)`, for batches of `first` to `last`
    sequences; `most` drafts in a batch of another size, and never more."""

    def __init__(self, most: int, table: Seq[tuple[int, int, int]]):
        self.most, self.table = _at_least(1, "num_speculative_tokens", most), [*table]
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
    """How drafts are scheduled.

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


def vllm_speculation(method: str, length: DraftLength, is_async: bool) -> Speculation:
    """What a method of vLLM's sets in its scheduler; ValueError for a method that is none of METHODS."""
    if method not in METHODS:
        raise ValueError(f"the method is {method!r}, expected one of {', '.join(METHODS)}")
    has_lookahead, draft_slots, _ = METHODS[method]
    return Speculation(length, length.most if has_lookahead else 0, draft_slots, is_async)


class SpeculativeScheduler(Scheduler):
    """A Scheduler of mixed batches whose sequences may carry drafts.

    A running sequence is given its drafts behind what it knows, as far as threshold, budget and `max_model_len` let it;
    those cut off are lost, and those of a sequence that gets nothing wait. While the step is in flight they count as if
    they were right (`num_in_flight`, `num_computed_tokens`); `postprocess` takes back what was rejected, or came behind
    the end. A draft is never registered in the prefix cache, a preemption drops it, and blocks that only rejected
    drafts reached stay with their sequence.
    """

    def __init__(
        self, block_manager: BlockManager, max_num_seqs: int = 256, *, speculation: Speculation, **others: Any
    ):
        super().__init__(block_manager, max_num_seqs, **others)
        if self.composition != "mixed":
            raise ValueError(f"composition is {self.composition!r}, expected 'mixed' with speculation")
        self.speculation = speculation
        least = _at_least(0, "draft_slots", speculation.draft_slots) + 1 + speculation.length.most
        if self.max_num_batched_tokens < least:
            raise ValueError(f"max_num_batched_tokens is {self.max_num_batched_tokens}, expected at least {least}")
        _at_least(0, "num_lookahead_tokens", speculation.num_lookahead_tokens)
        self._beside = (False, False)

    def schedule(self) -> Batch:
        """Decide the next step, and how many drafts to ask for behind it."""
        batch = super().schedule()
        most = self.speculation.length.most
        batch.num_drafts_asked = asked = self.speculation.length.choose(batch)
        if not 0 <= asked <= most:
            raise ValueError(f"{self.speculation.length} asks for {asked} drafts, expected 0 to {most}")
        if self.speculation.is_async:
            for seq in batch.sampled:
                seq.num_drafts = asked
        return batch

    def _budget(self, batch: Batch) -> int:
        slots = self.speculation.draft_slots * (len(batch) + 1)
        return self.max_num_batched_tokens - batch.num_tokens - slots

    def _reach(self, start: int, num_tokens: int) -> int:
        return min(num_tokens + self.speculation.num_lookahead_tokens, self.max_model_len - start)

    def _serve(self, seqs: list[Sequence], batch: Batch) -> None:
        cacheable, longest = self.block_manager.cacheable_tokens, self.max_model_len - 1
        passed_over: list[Sequence] = []
        for seq in seqs:
            if batch.preempted and (seq.status is not RUNNING or seq in passed_over):
                continue
            start, in_flight = seq.num_computed_tokens, seq.num_in_flight
            known = seq.num_tokens + in_flight
            num_tokens = min(known + seq.num_drafts - start, self._threshold, self._budget(batch), longest - start)
            if num_tokens <= 0 or (in_flight and start + 2 - in_flight >= seq.final_length):
                continue
            end, reach = start + num_tokens, self._reach(start, num_tokens)
            if start + reach > seq.num_block_tokens and not self._make_room(seq, reach, batch, passed_over):
                if self.rules.self_preemption.ends_pass:
                    break
                continue
            num_drafts = max(0, end - known)
            batch.seqs.append(seq)
            batch.starts.append(start)
            batch.lengths.append(num_tokens)
            batch.num_tokens += num_tokens
            seq.num_computed_tokens, seq.num_scheduled_tokens, seq.num_drafts = end, num_tokens, 0
            if num_drafts:
                batch.drafts[seq] = num_drafts
            if end < known:
                batch.chunks.append(seq)
            else:
                seq.num_in_flight = in_flight + 1 + num_drafts
            if end - seq.num_registered_tokens >= cacheable:
                self.block_manager.register(seq, min(end, seq.num_tokens))
            if not seq.has_sampled:
                batch.prompts.append(seq)
                batch.num_prompt_tokens += num_tokens
                seq.has_sampled = end >= known

    def _admit(self, batch: Batch) -> None:
        self._beside = bool(batch.prompts), bool(batch)
        super()._admit(batch)

    def _padding(self, num_hit_tokens: int, missing: int) -> int:
        """An admission with one token to compute is padded to the length of rows with drafts, by placeholders that are
        never right: beside running sequences or behind a hit, but not beside prompts."""
        most, (has_prompts, has_rows) = self.speculation.length.most, self._beside
        is_padded = missing == 1 and not has_prompts and (has_rows or num_hit_tokens > 0)
        return most if is_padded and num_hit_tokens + most + 2 <= self.max_model_len else 0

    def _preempt(self, seq: Sequence, batch: Batch) -> bool:
        seq.num_in_flight -= batch.drafts.pop(seq, 0)
        seq.num_drafts = 0
        return super()._preempt(seq, batch)

    def postprocess(
        self, seqs: Batch | list[Sequence], token_ids: Runs | Seq[int] | None, eos_token_id: int | None = None
    ) -> list[Sequence]:
        """Hand the runs of the oldest batch in flight to its sequences; those that end with them. A run goes on until
        the sequence ends, and what comes behind is thrown away. Tokens that are no Runs are runs of one."""
        batch = self._oldest(seqs)
        runs = token_ids if isinstance(token_ids, Runs) else Runs(token_ids, [1] * len(batch.sampled))
        tokens = self._checked_runs(batch, runs)
        self.in_flight.popleft()
        eos = -1 if eos_token_id is None else eos_token_id
        ended: list[Sequence] = []
        first = 0
        for place, seq in enumerate(batch.sampled):
            length, num_drafts = runs.lengths[place], batch.drafts.get(seq, 0)
            run = None if tokens is None else tokens[first : first + length]
            first += length
            if seq.status is FINISHED:
                if num_drafts:
                    batch.runs.append((seq, length, 0))
                continue
            kept, reason = _append(seq, run, length, eos)
            if num_drafts:
                batch.runs.append((seq, length, kept))
            seq.num_in_flight -= 1 + num_drafts
            if seq.status is RUNNING:  # else it was preempted, and computes all of it again
                seq.num_computed_tokens -= 1 + num_drafts - kept
                if runs.proposed is not None and reason is None and runs.proposed[place]:
                    seq.num_drafts = runs.proposed[place]
                    batch.proposed.append((seq, seq.num_drafts))
                self.block_manager.register(seq, seq.num_computed_tokens - seq.num_in_flight)
            if reason is not None:
                self._end(seq, reason)
                ended.append(seq)
        return ended

    def _checked_runs(self, batch: Batch, runs: Runs) -> list[int] | None:
        """The tokens of all runs; ValueError if runs or proposals are not as many or as long as they can be."""
        sampled, (token_ids, lengths, proposed) = batch.sampled, runs
        if len(lengths) != len(sampled):
            raise ValueError(f"{len(lengths)} runs for a batch that samples {len(sampled)}")
        for place, seq in enumerate(sampled):
            most = 1 + batch.drafts.get(seq, 0)
            if not 1 <= lengths[place] <= most:
                raise ValueError(f"a run of {lengths[place]} tokens for {seq}, expected 1 to {most}")
        if proposed is not None:
            most = batch.num_drafts_asked
            if self.speculation.is_async or len(proposed) != len(sampled):
                expected = "none" if self.speculation.is_async else len(sampled)
                raise ValueError(f"{len(proposed)} numbers of proposed drafts, expected {expected}")
            if wrong := [number for number in proposed if not 0 <= number <= most]:
                raise ValueError(f"{wrong[0]} drafts were proposed, expected 0 to {most}")
        return checked_tokens(token_ids, sampled, sum(lengths))

    def _most_tokens(self, seq: Sequence) -> int:
        """With a pool of so many a sequence that has to give way to itself gets a token whenever it comes back."""
        most = seq.final_length - 1 + self.speculation.length.most + self.speculation.num_lookahead_tokens
        return min(most, self.max_model_len)

    def _check_running(self, seq: Sequence) -> None:
        manager, most = self.block_manager, self.speculation.length.most
        ahead = manager.blocks_for(2 * most + self.speculation.num_lookahead_tokens)
        missing = manager.num_missing(seq, 0)
        assert -ahead <= missing <= 0, f"{seq} holds {-missing} blocks ahead, expected 0 to {ahead}"
        assert 0 <= seq.num_drafts <= most, f"{seq.num_drafts} drafts wait, expected 0 to {most}: {seq}"


def _append(seq: Sequence, run: Seq[int] | None, length: int, eos: int) -> tuple[int, str | None]:
    """Append a run up to the token that ends the sequence: how many were kept, and why it ends, if it does."""
    for number in range(length):
        seq.num_tokens += 1
        reason = "length" if seq.num_tokens >= seq.final_length else None
        if run is not None:
            seq.token_ids.append(run[number])
            if seq.sampling_params.stops(run[number], eos):
                reason = "stop"
        if reason is not None:
            return number + 1, reason
    return length, None


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise ValueError(f"{name} is {value}, expected an integer >= {least}")
    return value
