"""Scheduler: which sequences compute how many tokens in the next step."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

import xxhash

from twinserve.policies.block_manager import BlockManager
from twinserve.policies.prefix_cache import PrefixCache
from twinserve.policies.sequence import Sequence, SequenceStatus

COMPOSITIONS = ("prefill-first", "mixed")


class Row(NamedTuple):
    """One sequence's part of a step: `num_tokens` tokens from position `start` on.

    `samples`: the step reaches the sequence's last known token, so it samples the next one. `is_prompt`: the sequence
    has sampled nothing since it was admitted, so its tokens are prompt (or recomputed) tokens, however few.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    is_prompt: bool


class Batch:
    """One decision: the rows of a step, and what changed since the decision before it.

    Unpacks as the pair `seqs, is_prefill`. `sampled` lists, in order, the sequences that get a token from this step.
    `is_prefill`: some sequence computes more than one token, or samples for the first time since it was admitted.

    The deltas say the decision in terms of the one before: `admitted` rows (their `start` is the prefix hit),
    sequences that `left` (finished or aborted) and were `preempted`, `grown` block tables, and `exceptions`: rows of
    running sequences that are not the usual `usual_tokens` (1, or 0 in a step for prompts alone).

    Totals: `num_tokens` = `num_prompt_tokens` + `num_decode_tokens`; `num_kv_tokens` is the sum of the rows' context
    lengths; `num_attention_pairs` counts each query against each key it attends.
    """

    def __init__(self, usual_tokens: int = 1) -> None:
        self.rows: list[Row] = []
        self.seqs: list[Sequence] = []
        self.sampled: list[Sequence] = []
        self.usual_tokens = usual_tokens

        self.admitted: list[Row] = []
        self.left: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.grown: list[tuple[Sequence, list[int]]] = []
        self.exceptions: list[tuple[Sequence, int, bool]] = []

        self.is_prefill = False
        self.num_tokens = 0
        self.num_prompt_tokens = 0
        self.num_kv_tokens = 0
        self.num_attention_pairs = 0
        self.num_waiting = 0
        self.num_running = 0
        self.num_used_blocks = 0

        # Facts of the decision and of the step, written by Core and by the executor.
        self.decision = -1
        self.seen = 0
        self.aborted: list[Sequence] = []
        self.committed = -1
        self.decided_ns = 0
        self.start_ns: int | None = None
        self.end_ns: int | None = None
        self.digest = 0

    @property
    def num_decode_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    def add(self, row: Row) -> None:
        """Append a row and count it."""
        self.rows.append(row)
        self.seqs.append(row.seq)
        self.num_tokens += row.num_tokens
        context = row.start + row.num_tokens
        self.num_kv_tokens += context
        if row.is_prompt:
            self.num_prompt_tokens += row.num_tokens
            self.num_attention_pairs += row.start * row.num_tokens + row.num_tokens * (row.num_tokens + 1) // 2
        else:
            self.num_attention_pairs += context
        if row.samples:
            self.sampled.append(row.seq)
        if row.num_tokens > 1 or (row.samples and row.is_prompt):
            self.is_prefill = True

    def compute_digest(self, previous: int) -> int:
        """xxh64 of the deltas and totals, chained on the digest of the decision before.

        The chain fixes every decision as a whole: ids, new tokens, block tables, hits and preemptions.
        """
        values = [self.usual_tokens, self.num_waiting, self.num_running, self.num_used_blocks, len(self.admitted)]
        for seq, start, num_tokens, samples, _ in self.admitted:
            values += (seq.seq_id, start, num_tokens, samples, len(seq.block_table), *seq.block_table)
        values.append(len(self.preempted))
        values += [seq.seq_id for seq in self.preempted]
        values.append(len(self.left))
        values += [seq.seq_id for seq in self.left]
        values.append(len(self.exceptions))
        for seq, num_tokens, samples in self.exceptions:
            values += (seq.seq_id, num_tokens, samples)
        for seq, block_ids in self.grown:
            values += (seq.seq_id, len(block_ids), *block_ids)
        return xxhash.xxh64_intdigest(array("q", values).tobytes(), previous)

    def __iter__(self) -> Iterator:
        yield self.seqs
        yield self.is_prefill

    def __len__(self) -> int:
        return len(self.rows)


class FirstCome(deque):
    """The waiting queue in the order of arrival; a preempted sequence goes back to its front."""

    def push(self, seq: Sequence) -> None:
        """A new sequence arrives."""
        self.append(seq)

    def push_preempted(self, seq: Sequence) -> None:
        """A sequence comes back after a preemption."""
        self.appendleft(seq)

    def peek(self) -> Sequence:
        """The sequence to be admitted next."""
        return self[0]

    def pop_next(self) -> Sequence:
        """Remove and return what `peek` shows."""
        return self.popleft()


class Scheduler:
    """Continuous batching over paged KV: admission, composition, chunking, preemption by recomputation.

    The first two parameters alone give prefill-first batches without budget, chunks or cache. With
    `composition="mixed"`, `enable_chunked_prefill=True` and a budget, it decides what vLLM's V1 scheduler decides:
    running sequences first, in the order they were admitted, then the head of the waiting queue as long as it fits.

    Args:
        block_manager: the KV blocks.
        max_num_seqs: sequences that may run at once.
        composition: "prefill-first" (a step computes prompts or decodes, prompts first) or "mixed" (both at once).
        max_num_batched_tokens: token budget of a step; None is none.
        enable_chunked_prefill: a prompt larger than what is left of the budget is computed in several steps.
        long_prefill_token_threshold: the most tokens of one sequence in a step; 0 is no limit.
        max_model_len: the most tokens (prompt and generated) of a sequence; generation ends there.
        prefix_cache: blocks of equal prefixes are shared through it.
        reserve_full_prompt: admit a sequence only if all tokens it knows fit the free blocks, not just its first chunk.
        watermark_blocks: blocks that an admission leaves free while anything is running.
        waiting: the order of the waiting queue, an object with the methods of `FirstCome`.

    Attributes:
        waiting: sequences not yet admitted, or preempted.
        running: admitted sequences, in the order of their admission.
        in_flight: decided batches that `postprocess` has not seen, oldest first.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int = 256,
        *,
        composition: str = "prefill-first",
        max_num_batched_tokens: int | None = None,
        enable_chunked_prefill: bool = False,
        long_prefill_token_threshold: int = 0,
        max_model_len: int | None = None,
        prefix_cache: PrefixCache | None = None,
        reserve_full_prompt: bool = True,
        watermark_blocks: int = 0,
        waiting: FirstCome | None = None,
    ):
        if composition not in COMPOSITIONS:
            raise ValueError(f"composition is {composition!r}, expected one of {', '.join(COMPOSITIONS)}")
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {max_num_seqs}, expected an integer >= 1")
        if max_num_batched_tokens is not None and max_num_batched_tokens < 1:
            raise ValueError(f"max_num_batched_tokens is {max_num_batched_tokens}, expected an integer >= 1 or None")
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.composition = composition
        self.max_num_batched_tokens = math.inf if max_num_batched_tokens is None else max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.long_prefill_token_threshold = long_prefill_token_threshold or math.inf
        self.max_model_len = math.inf if max_model_len is None else max_model_len
        self.reserve_full_prompt = reserve_full_prompt
        self.watermark_blocks = watermark_blocks
        self.waiting = FirstCome() if waiting is None else waiting
        self.running: list[Sequence] = []
        self.in_flight: deque[Batch] = deque()
        self._left: list[Sequence] = []
        if prefix_cache is not None:
            block_manager.bind(prefix_cache)

    # --- what comes in ---

    def add(self, seq: Sequence) -> bool:
        """Put a new sequence into the waiting queue, or refuse one that can never be served.

        A refused sequence is FINISHED with `finish_reason` "refused" and `refusal` in words; the result is then False.
        """
        seq.refusal = self._refusal(seq)
        if seq.refusal is not None:
            self._finish(seq, "refused")
            return False
        seq.block_size = self.block_manager.block_size
        self.waiting.push(seq)
        return True

    def abort(self, seq: Sequence) -> None:
        """End a sequence now and free its blocks; tokens of it that are still in flight will be discarded."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._left.append(seq)
            self.block_manager.deallocate(seq)
        elif seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        else:
            raise ValueError(f"{seq} cannot be aborted: it has ended with {seq.finish_reason!r}")
        self._finish(seq, "abort")

    def is_finished(self) -> bool:
        """Has every sequence that was added ended?"""
        return not self.waiting and not self.running

    # --- the decision ---

    def schedule(self) -> Batch:
        """Decide the next step. The decision counts as launched: computed tokens include it from now on."""
        if self.composition == "mixed":
            batch = Batch(usual_tokens=1)
            budget = self._schedule_running(batch, self.max_num_batched_tokens)
            self._schedule_waiting(batch, budget)
        else:
            batch = Batch(usual_tokens=0)
            budget = self._schedule_running(batch, self.max_num_batched_tokens, decoding=False)
            self._schedule_waiting(batch, budget)
            if not batch:
                decodes = Batch(usual_tokens=1)
                decodes.preempted = batch.preempted
                batch = decodes
                self._schedule_running(batch, self.max_num_batched_tokens, decoding=True)
        batch.left, self._left = self._left, []
        batch.num_waiting = len(self.waiting)
        batch.num_running = len(self.running)
        batch.num_used_blocks = len(self.block_manager.used_block_ids)
        if batch:
            self.in_flight.append(batch)
        return batch

    def _schedule_running(self, batch: Batch, budget: float, decoding: bool | None = None) -> float:
        """Give running sequences their tokens, preempting from the end for room; what is left of the budget.

        `decoding` True or False takes only sequences that have, or have not, sampled since their admission.
        """
        manager = self.block_manager
        block_size = manager.block_size
        usual = batch.usual_tokens
        most = min(self.long_prefill_token_threshold, budget)
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            num_tokens = 0
            if decoding is None or seq.has_sampled == decoding:
                num_tokens = self._wanted_tokens(seq)
                if num_tokens > most:
                    num_tokens = int(most)
            if num_tokens:
                # Most decodes stay within their last block.
                if seq.num_computed_tokens + num_tokens > len(seq.block_table) * block_size:
                    while not manager.can_extend(seq, num_tokens):
                        victim = self.running[-1]
                        self._preempt(victim, batch)
                        if victim is seq:
                            return budget
                    batch.grown.append((seq, manager.extend(seq, num_tokens)))
                row = self._launch(seq, num_tokens, batch)
                budget -= num_tokens
                most = min(most, budget)
                if num_tokens != usual or not row.samples:
                    batch.exceptions.append((seq, num_tokens, row.samples))
            elif usual:
                batch.exceptions.append((seq, 0, False))
            index += 1
        return budget

    def _schedule_waiting(self, batch: Batch, budget: float) -> None:
        """Admit from the head of the waiting queue while it fits; nobody in a step with a preemption."""
        if batch.preempted:
            return
        manager = self.block_manager
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting.peek()
            if seq.num_in_flight:
                return
            hits = manager.find_hits(seq)
            num_hit_tokens = len(hits) * manager.block_size
            num_tokens = int(min(seq.num_tokens - num_hit_tokens, self.long_prefill_token_threshold))
            if num_tokens > budget:
                if not self.enable_chunked_prefill:
                    return
                num_tokens = int(budget)
            covered = seq.num_tokens if self.reserve_full_prompt else num_hit_tokens + num_tokens
            margin = self.watermark_blocks if self.running else 0
            if manager.blocks_to_take(hits, covered) + margin > manager.num_free_blocks:
                return
            self.waiting.pop_next()
            manager.admit(seq, hits, num_tokens)
            seq.status = SequenceStatus.RUNNING
            seq.num_computed_tokens = num_hit_tokens
            self.running.append(seq)
            batch.admitted.append(self._launch(seq, num_tokens, batch))
            budget -= num_tokens

    def _wanted_tokens(self, seq: Sequence) -> int:
        """Tokens that a running sequence has yet to compute, the one in flight included; 0 if its last is in flight."""
        known = seq.num_tokens + seq.num_in_flight
        if seq.num_in_flight and known >= self._final_length(seq):
            return 0
        return known - seq.num_computed_tokens

    def _final_length(self, seq: Sequence) -> float:
        """Tokens at which generation ends, whatever is generated."""
        return min(seq.num_prompt_tokens + seq.sampling_params.max_tokens, self.max_model_len)

    def _launch(self, seq: Sequence, num_tokens: int, batch: Batch) -> Row:
        """Add the row of `seq` to the batch and count its tokens as computed."""
        start = seq.num_computed_tokens
        computed = start + num_tokens
        samples = computed == seq.num_tokens + seq.num_in_flight
        row = Row(seq, start, num_tokens, samples, not seq.has_sampled)
        batch.add(row)
        seq.num_computed_tokens = computed
        seq.num_scheduled_tokens = num_tokens
        if samples:
            seq.num_in_flight += 1
            seq.has_sampled = True
        self.block_manager.register(seq, min(computed, seq.num_tokens))
        return row

    def _preempt(self, seq: Sequence, batch: Batch) -> None:
        """Take a running sequence's blocks away; it will compute them again when it is admitted again."""
        self.running.remove(seq)
        self.block_manager.deallocate(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_computed_tokens = 0
        seq.num_scheduled_tokens = 0
        seq.has_sampled = False
        seq.num_preemptions += 1
        self.waiting.push_preempted(seq)
        batch.preempted.append(seq)

    # --- the result ---

    def postprocess(
        self, seqs: Batch | list[Sequence], token_ids: Seq[int] | None, eos_token_id: int | None = None
    ) -> list[Sequence]:
        """Hand the sampled tokens of the oldest batch in flight to its sequences; those that end with them.

        Args:
            seqs: the batch, or the list that it holds.
            token_ids: a token for each of `batch.sampled`, in order; None in a simulation, which has no tokens.
            eos_token_id: ends a sequence, unless its `ignore_eos` is set.

        Raises:
            ValueError: `seqs` is not the oldest batch in flight, or `token_ids` has another length.
        """
        batch = self.in_flight[0] if self.in_flight else None
        if batch is None or not (seqs is batch or seqs is batch.seqs):
            raise ValueError("postprocess takes the oldest batch in flight, or the list it holds, and each once")
        if token_ids is not None and len(token_ids) != len(batch.sampled):
            raise ValueError(f"{len(token_ids)} tokens for a batch that samples {len(batch.sampled)}")
        self.in_flight.popleft()
        finished = []
        for index, seq in enumerate(batch.sampled):
            if seq.is_finished:
                continue
            token_id = None if token_ids is None else token_ids[index]
            seq.num_in_flight -= 1
            seq.append_token(token_id)
            if seq.status is SequenceStatus.RUNNING:
                self.block_manager.register(seq, seq.num_computed_tokens - seq.num_in_flight)
            reason = self._end_reason(seq, token_id, eos_token_id)
            if reason is not None:
                self._end(seq, reason)
                finished.append(seq)
        if finished:
            self.running = [seq for seq in self.running if not seq.is_finished]
        return finished

    def _end_reason(self, seq: Sequence, token_id: int | None, eos_token_id: int | None) -> str | None:
        params = seq.sampling_params
        stops = token_id == eos_token_id or token_id in params.stop_token_ids
        if stops and token_id is not None and not params.ignore_eos:
            return "stop"
        return "length" if seq.num_tokens >= self._final_length(seq) else None

    def _end(self, seq: Sequence, reason: str) -> None:
        """Finish a sequence that generated its last token; the caller drops it from `running`."""
        if seq.status is SequenceStatus.RUNNING:
            self.block_manager.deallocate(seq)
            self._left.append(seq)
        else:
            self.waiting.remove(seq)
        self._finish(seq, reason)

    def _finish(self, seq: Sequence, reason: str) -> None:
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason

    def _refusal(self, seq: Sequence) -> str | None:
        """Why `seq` can never be served; None if it can. Its last generated token needs no KV."""
        if seq.num_prompt_tokens == 0:
            return "the prompt has no tokens"
        if seq.num_prompt_tokens >= self.max_model_len:
            return f"prompt of {seq.num_prompt_tokens} tokens, but max_model_len is {self.max_model_len}"
        most = int(self._final_length(seq)) - 1
        manager = self.block_manager
        if manager.num_blocks is not None and manager.blocks_for(most) > manager.num_blocks:
            return f"needs {manager.blocks_for(most)} blocks of {manager.block_size}, the pool has {manager.num_blocks}"
        if not self.enable_chunked_prefill and most > self.max_num_batched_tokens:
            return f"may have to compute {most} tokens in a step, but max_num_batched_tokens is " + (
                f"{self.max_num_batched_tokens} and chunked prefill is off"
            )
        return None

    def check_integrity(self) -> None:
        """Raise AssertionError, with the values, if an invariant of pool, cache or queues does not hold."""
        manager = self.block_manager
        manager.check_integrity()
        assert len(self.running) <= self.max_num_seqs, f"{len(self.running)} running > {self.max_num_seqs}"
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING, f"running: {seq}"
            known = seq.num_tokens + seq.num_in_flight
            assert 0 < seq.num_computed_tokens <= known, f"computed beyond what is known: {seq}"
            needed = manager.blocks_for(seq.num_computed_tokens)
            assert len(seq.block_table) == needed, f"{seq} holds {len(seq.block_table)} blocks, needs {needed}"
            assert seq.num_cached_tokens < seq.num_tokens, f"nothing left to compute: {seq}"
        for seq in self.waiting:
            assert seq.status is SequenceStatus.WAITING and not seq.block_table, f"waiting: {seq}"
        held = sum(len(seq.block_table) for seq in self.running)
        assert held >= len(manager.used_block_ids), f"{len(manager.used_block_ids)} used blocks, {held} held"
