"""Scheduler: which sequences compute how many tokens in the next step."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence as Seq
from typing import Any, Final, NamedTuple

from twinserve.policies.batch import Batch, Row, Runs
from twinserve.policies.block_manager import ENDLESS, BlockManager, bound
from twinserve.policies.orders import Admission, FirstCome, Order, Victim
from twinserve.policies.prefix_cache import PrefixCache
from twinserve.policies.sequence import Sequence, SequenceStatus
from twinserve.policies.speculation import Speculation
from twinserve.policies.vllm_rules import PrefillInterval, VllmAdmission, VllmRules

COMPOSITIONS = ("prefill-first", "mixed")

RUNNING: Final = SequenceStatus.RUNNING
FINISHED: Final = SequenceStatus.FINISHED


class Refusal(NamedTuple):
    """Why the next sequence was not admitted: what was looked at, and how many hits might change that. While the facts
    are the same, blocks only become fewer. `last_hash` is that of the last hit needed, None if it can never be one."""

    facts: tuple
    num_hits: int
    last_hash: int | None


class Scheduler:
    """Continuous batching over paged KV: admission, composition, chunking, preemption by recomputation.

    The first two parameters alone give prefill-first batches without budget, chunks or cache. With
    `composition="mixed"`, `enable_chunked_prefill=True` and a budget, it decides what vLLM's V1 scheduler decides.

    Args:
        composition: "prefill-first" (a step computes prompts or decodes, prompts first) or "mixed" (both at once).
        max_num_batched_tokens: token budget of a step; None is none.
        enable_chunked_prefill: a prompt larger than what is left of the budget is computed in several steps.
        long_prefill_token_threshold: the most tokens of one sequence in a step; 0 is no limit.
        max_num_partial_prefills: running sequences that may have prompt tokens left to compute; None is no limit.
        max_model_len: the most tokens (prompt and generated) of a sequence; generation ends there.
        pipeline_parallel_size: ranks of a pipeline, for vLLM's own orders; who samples rests in so many steps less one.
        order, admission, victim: who is next, whether it fits, who is preempted; else first come, vLLM's, the order's.
        rules, speculation: what differs between versions of vLLM, by default the newest's; how drafts are scheduled.

    Attributes:
        waiting: sequences not yet admitted, or preempted; the `order`.
        in_flight: decided batches that `postprocess` has not seen, oldest first; under prefill-first, at most one.
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
        max_num_partial_prefills: int | None = None,
        max_model_len: int | None = None,
        pipeline_parallel_size: int = 1,
        prefix_cache: PrefixCache | None = None,
        order: Order | None = None,
        admission: Admission | None = None,
        victim: Victim | None = None,
        rules: VllmRules | None = None,
        speculation: Speculation | None = None,
    ):
        if composition not in COMPOSITIONS:
            raise ValueError(f"composition is {composition!r}, expected one of {', '.join(COMPOSITIONS)}")
        self.block_manager, self.composition, self._victim = block_manager, composition, victim
        self.enable_chunked_prefill = enable_chunked_prefill
        self.max_num_seqs = bound("max_num_seqs", max_num_seqs)
        self.max_num_batched_tokens = bound("max_num_batched_tokens", max_num_batched_tokens)
        self.max_num_partial_prefills = bound("max_num_partial_prefills", max_num_partial_prefills)
        self.long_prefill_token_threshold = bound("long_prefill_token_threshold", long_prefill_token_threshold or None)
        self.max_model_len = bound("max_model_len", max_model_len)
        self.pipeline_parallel_size = bound("pipeline_parallel_size", pipeline_parallel_size)
        self.rules = VllmRules(PrefillInterval()) if rules is None else rules
        self.waiting: Order = FirstCome() if order is None else order
        self.admission: Admission = VllmAdmission() if admission is None else admission
        self.in_flight: deque[Batch] = deque()
        self.refusal: Refusal | None = None
        self._running: dict[Sequence, None] = {}
        self._left: list[Sequence] = []
        self._threshold = self.long_prefill_token_threshold
        self.speculation = Speculation() if speculation is None else speculation
        self.speculation.check(composition, self.max_num_batched_tokens)
        self._left_tokens, self._padding = self.max_num_batched_tokens, (0, 0)  # if nothing hits, if it does
        self._latest: deque[Batch] = deque(maxlen=self.pipeline_parallel_size - 1)
        self._passed_over: dict[Sequence, None] = {}  # waiting ones, as tokens of them were in flight
        self._num_added = self._num_admitted = self._num_released = 0
        if prefix_cache is not None:
            block_manager.bind(prefix_cache)
        self._loads: Any = getattr(self.waiting, "loads", None)
        if hasattr(self.waiting, "bind"):
            self.waiting.bind(block_manager)

    @property
    def running(self) -> list[Sequence]:
        """The admitted sequences, in the order of their admission."""
        return list(self._running)

    def add(self, seq: Sequence) -> bool:
        """Put a new sequence into the waiting queue, or refuse one that can never be served: then it is FINISHED with
        `finish_reason` "refused" and `refusal` in words, and the result is False. ValueError if it was added before."""
        if seq.arrival_index >= 0 or seq.is_finished:
            raise ValueError(f"{seq} cannot be added: it was added before, expected a new sequence")
        seq.final_length = min(seq.num_prompt_tokens + seq.max_tokens, self.max_model_len)
        seq.refusal = self.refusal_of(seq)
        if seq.refusal is not None:
            seq.status, seq.finish_reason = SequenceStatus.FINISHED, "refused"
            return False
        seq.tokens_per_block = self.block_manager.block_size
        seq.arrival_index = self._num_added
        self._num_added += 1
        self.waiting.push(seq)
        return True

    def abort(self, seq: Sequence) -> None:
        """End a sequence now and free its blocks; tokens of it that are still in flight will be discarded."""
        if seq.is_finished:
            raise ValueError(f"{seq} cannot be aborted: it has ended with {seq.finish_reason!r}")
        self._end(seq, "abort")

    def is_finished(self) -> bool:
        """Has every sequence that was added ended?"""
        return not self._running and not self.waiting

    def schedule(self) -> Batch:
        """Decide the next step. The decision counts as launched: computed tokens include it from now on."""
        is_mixed, interval = self.composition == "mixed", self.rules.interval
        batch, running = Batch(int(is_mixed)), self._begin()
        self._serve(running if is_mixed else [seq for seq in running if not seq.has_sampled], batch)
        is_prompt_work = bool(batch.prompts) or batch.lost_prompts
        self._admit(batch)
        if not (is_mixed or batch):
            batch.usual_tokens = 1
            self._serve([seq for seq in running if seq.has_sampled], batch)
        if interval.steps > 1:
            is_prompt_work |= any([row.seq.num_tokens - row.start > 1 for row in batch.admitted])
            leaves_waiting = None if batch.preempted else len(self.waiting) > len(self._passed_over)
            interval.end(int(bool(batch)), is_prompt_work, leaves_waiting)
        if batch.usual_tokens and len(batch) < len(self._running):
            served = set(batch.seqs)
            batch.skipped = [seq for seq in self._running if seq not in served]
        batch.count()
        if self.speculation.most:
            self.speculation.end(batch)
        batch.is_ahead, batch.left, self._left = bool(self.in_flight), self._left, []
        batch.num_waiting, batch.num_running = len(self.waiting), len(self._running)
        batch.num_used_blocks = self.block_manager.num_used_blocks
        self._latest.append(batch)
        if batch:
            self.in_flight.append(batch)
        return batch

    def _begin(self) -> list[Sequence]:
        """Work out what holds for this decision; the running sequences that may get tokens."""
        self._left_tokens = self.max_num_batched_tokens - self.speculation.draft_slots
        seqs, interval, limit = self.running, self.rules.interval, self.long_prefill_token_threshold
        many = len(seqs) + len(self.waiting)
        self._threshold = self.rules.threshold.in_force(limit, many, self.max_num_batched_tokens)
        interval.is_held = interval.holds(seqs)
        if interval.is_held:
            seqs = [seq for seq in seqs if seq.has_sampled]
        if self._latest:
            resting = {seq for batch in self._latest for seq in batch.sampled}
            seqs = [seq for seq in seqs if seq not in resting]
        return seqs

    def _serve(self, seqs: list[Sequence], batch: Batch) -> None:
        """Give running sequences, in this order, the tokens that they know and have not computed, and drafts, as far as
        the limits let them; preempt where there is no room for their blocks."""
        limit, left, slots = self._threshold, self._left_tokens, self.speculation.draft_slots
        cacheable = self.block_manager.cacheable_tokens
        rows, starts, lengths, preempted = batch.seqs, batch.starts, batch.lengths, batch.preempted
        passed_over: list[Sequence] = []
        for seq in seqs:
            if preempted and (seq.status is not RUNNING or seq in passed_over):
                continue
            start, in_flight, drafts = seq.num_computed_tokens, seq.num_in_flight, seq.num_drafts
            known = seq.num_tokens + in_flight
            num_tokens = known - start
            if in_flight or drafts:
                num_tokens += drafts
                if known + drafts >= seq.final_length:
                    num_tokens = self._num_before_end(seq, num_tokens)
            if num_tokens > limit:
                num_tokens = limit
            if num_tokens > left:
                num_tokens = left
            if num_tokens <= 0:
                continue
            end = start + num_tokens
            if end > seq.num_block_tokens:
                self._left_tokens = left
                has_room = self._make_room(seq, num_tokens, batch, passed_over)
                left = self._left_tokens
                if not has_room:
                    continue
            rows.append(seq)
            starts.append(start)
            lengths.append(num_tokens)
            left -= num_tokens + slots
            seq.num_computed_tokens, seq.num_scheduled_tokens = end, num_tokens
            if end < known:
                batch.chunks.append(seq)
            else:
                seq.num_in_flight = in_flight + 1
            if end - seq.num_registered_tokens >= cacheable:
                self.block_manager.register(seq, end)
            if not seq.has_sampled:
                batch.prompts.append(seq)
                seq.has_sampled = end >= known
        self._left_tokens = left

    def _num_before_end(self, seq: Sequence, num_tokens: int) -> int:
        """Of so many tokens of a sequence that may come to its end with them, those that it gets: short of the model's
        length; none once its last token is in flight, even if of the drafts in flight none is right."""
        drafts = sum([batch.drafts.get(seq, 0) for batch in self.in_flight])
        if seq.num_in_flight and seq.num_tokens + seq.num_in_flight - drafts >= seq.final_length:
            return 0
        return min(num_tokens, self.max_model_len - 1 - seq.num_computed_tokens)

    def _reach(self, start: int, num_tokens: int) -> int:
        """For so many tokens from `start` on there have to be blocks when `num_tokens` are computed."""
        return min(num_tokens + self.speculation.num_lookahead_tokens, self.max_model_len - start)

    def _make_room(self, seq: Sequence, num_tokens: int, batch: Batch, passed_over: list[Sequence]) -> bool:
        """Extend a block table, preempting for it where too few blocks are free; False if the sequence had to go.
        Those behind it that get nothing for that are added to `passed_over`."""
        manager, place, num_before = self.block_manager, seq.admission_index, 0
        if self.speculation.num_lookahead_tokens:
            num_tokens = self._reach(seq.num_computed_tokens, num_tokens)
        missing = manager.num_missing(seq, num_tokens)
        while seq.status is RUNNING and missing > manager.num_free_blocks:
            victim = (self._victim or self.waiting.victim).choose(self._running.keys(), seq)
            if victim not in self._running:
                raise ValueError(f"the victim rule chose {victim}, expected a running sequence")
            num_before += not self._preempt(victim, batch) and victim.admission_index < place
        has_room = seq.status is RUNNING
        if not has_room and self.rules.self_preemption_ends_pass:
            num_before = len(self._running)
        elif not self.rules.victim_before_skips:
            num_before = 0
        if num_before:
            passed_over += [other for other in self._running if other.admission_index > place][:num_before]
        if has_room and missing > 0:
            block_ids = manager.take(missing)
            manager.grow(seq, block_ids)
            batch.grown.append((seq, block_ids))
        return has_room

    def _admit(self, batch: Batch) -> None:
        """Admit from the head of the waiting queue while it fits; nobody in a step with a preemption. A head that was
        preempted while a pipeline computes tokens of it keeps its place, and those behind it are tried."""
        passed_over: list[Sequence] = []
        most = 0 if batch.prompts or self.speculation.choose is not None else self.speculation.most
        self._padding = (most if batch else 0, most)
        while not batch.preempted:
            budget = self._left_tokens
            if self.pipeline_parallel_size > 1 and self.has_place(budget):
                head = self.waiting.peek()
                if any([head in before.seqs for before in self.in_flight]):
                    passed_over.append(self.waiting.pop_next())
                    continue
            found = self.find_admission(budget)
            if found is None:
                break
            seq, hits, num_tokens = found
            self.waiting.pop_next()
            if self._loads is not None and self._loads(seq, hits):
                continue
            start = seq.num_computed_tokens or len(hits) * self.block_manager.block_size
            seq.num_drafts = num_drafts = max(0, start + num_tokens - seq.num_tokens)
            if not seq.block_table:
                self.block_manager.admit(seq, hits, self._reach(start, num_tokens))
            seq.num_block_tokens -= self.speculation.num_lookahead_tokens
            seq.status, seq.num_computed_tokens = RUNNING, seq.num_cached_tokens
            seq.admission_index = self._num_admitted
            self._num_admitted += 1
            self._running[seq] = None
            self._passed_over.pop(seq, None)
            self._serve([seq], batch)
            batch.admitted.append(Row(seq, start, num_tokens, seq.has_sampled, True, num_drafts))
        for seq in reversed(passed_over):
            self.waiting.push_preempted(seq)
            self._passed_over[seq] = None

    def has_place(self, budget: int) -> bool:
        """Does somebody wait, for whom there are tokens in the step and a place among those that run?"""
        return budget > 0 and len(self._running) < self.max_num_seqs and len(self.waiting) > 0

    def find_admission(self, budget: int) -> tuple[Sequence, list[int], int] | None:
        """Who is admitted next with so many tokens left in the step: the sequence, its cached blocks and the number of
        its tokens; None if nobody is. A refusal is remembered while running sequences do no more than grow, so that a
        waiting prompt is not looked up in every step. With drafts, one token to compute is padded to the length of
        rows with drafts, by placeholders that are never right."""
        if not self.has_place(budget):
            return None
        seq, manager, refusal = self.waiting.peek(), self.block_manager, self.refusal
        if seq.num_in_flight:
            return None
        no_limit = self.max_num_partial_prefills == ENDLESS
        num_partial = 0 if no_limit else sum([not other.has_sampled for other in self._running])
        limit, is_held = self._threshold, self.rules.interval.is_held
        facts = seq, seq.num_tokens, budget, num_partial, limit, is_held, self._num_admitted, self._num_released
        if refusal is not None and facts == refusal.facts and not manager.is_stored(refusal.last_hash):
            return None
        hits = seq.block_table or manager.find_hits(seq)
        start = seq.num_computed_tokens or len(hits) * manager.block_size
        missing = seq.num_tokens - start
        padding = self._padding[min(1, len(hits))] if missing == 1 else 0
        if start + padding + 2 > self.max_model_len:
            padding = 0
        num_tokens = min(missing + padding, most := min(limit, budget))
        reach = self._reach(start, num_tokens)
        is_cut = min(missing + padding, limit) > budget and (padding > 0 or not self.enable_chunked_prefill)
        if is_held and missing > 1:
            num_hits = manager.blocks_for(seq.num_tokens - 1)
        elif is_cut or (num_tokens < missing and num_partial >= self.max_num_partial_prefills):
            num_hits = len(hits) + manager.blocks_for(missing + padding - most)
        elif not seq.block_table and (lacking := self.admission.lacks(manager, seq, hits, reach, not self._running)):
            num_hits = len(hits) + lacking
        else:
            return seq, hits, num_tokens
        if padding:
            return None  # with fewer hits it would not be padded, and might fit
        may_hit = manager.prefix_cache is not None and num_hits <= (seq.num_tokens - 1) // manager.block_size
        self.refusal = Refusal(facts, num_hits, seq.block_hashes[num_hits - 1] if may_hit else None)
        return None

    def _preempt(self, seq: Sequence, batch: Batch) -> bool:
        """Take a running sequence's blocks away; it will compute them again when it is admitted again. What it got in
        this very step is taken back, so nobody can hit a block that no step computes; had it got any?"""
        samples, had_row = seq not in batch.chunks, batch.remove(seq)
        if had_row:
            seq.num_computed_tokens -= seq.num_scheduled_tokens
            self._left_tokens += seq.num_scheduled_tokens + self.speculation.draft_slots
            seq.num_in_flight -= int(samples)
        self.block_manager.unregister(seq, seq.num_computed_tokens)
        self._release(seq)
        seq.status, seq.has_sampled = SequenceStatus.WAITING, False
        seq.num_computed_tokens = seq.num_scheduled_tokens = seq.num_drafts = 0
        seq.num_preemptions += 1
        self.waiting.push_preempted(seq)
        batch.preempted.append(seq)
        return had_row

    def postprocess(
        self, seqs: Batch | list[Sequence], token_ids: Runs | Seq[Any] | None, eos_token_id: int | None = None
    ) -> list[Sequence]:
        """Hand the sampled tokens of the oldest batch in flight to its sequences; those that end with them.

        `seqs` is that batch, or the list that it holds; `token_ids` has a token for each of `batch.sampled`, in order,
        or the runs of a step that verified drafts, or is None in a simulation. ValueError for anything else.
        `eos_token_id` ends a sequence that heeds it."""
        batch = self.in_flight[0] if self.in_flight else None
        if batch is None or (seqs is not batch and seqs is not batch.seqs):
            raise ValueError("postprocess takes the oldest batch in flight, or the list it holds, and each once")
        eos, sampled = -1 if eos_token_id is None else eos_token_id, batch.sampled
        if isinstance(token_ids, Runs):
            runs: Runs | None = token_ids
        else:
            runs = Runs(token_ids, [1] * len(sampled)) if batch.drafts else None
        tokens = checked_tokens(token_ids, sampled, len(sampled)) if runs is None else self._accept(batch, runs, eos)
        self.in_flight.popleft()
        may_stop = tokens is not None and eos in tokens
        may_fill, cacheable = batch.is_ahead or self.speculation.most > 0, self.block_manager.cacheable_tokens
        ended: list[Sequence] = []
        for place, seq in enumerate(sampled):
            if seq.status is FINISHED:
                continue
            num_tokens = seq.num_tokens = seq.num_tokens + 1
            in_flight = seq.num_in_flight = seq.num_in_flight - 1
            reason = "length" if num_tokens >= seq.final_length else None
            if tokens is not None:
                token_id = tokens[place]
                seq.token_ids.append(token_id)
                if (may_stop or seq.stop_token_ids) and seq.sampling_params.stops(token_id, eos):
                    reason = "stop"
            if may_fill and seq.num_computed_tokens - in_flight - seq.num_registered_tokens >= cacheable:
                self.block_manager.register(seq, seq.num_computed_tokens - in_flight)
            if reason is not None:
                self._end(seq, reason)
                ended.append(seq)
        for place, number in enumerate((runs and runs.proposed) or ()):
            if number and sampled[place].status is RUNNING:
                sampled[place].num_drafts = number
                batch.proposed.append((sampled[place], number))
        return ended

    def _accept(self, batch: Batch, runs: Runs, eos: int) -> list[Any] | None:
        """Hand what comes before the last token of each run, or before the token that ends the sequence, to it, and
        take rejected drafts back, and those behind the end; the last tokens, None in a simulation."""
        tokens, first, last = self._checked_runs(batch, runs), 0, []
        for place, seq in enumerate(batch.sampled):
            length, num_drafts = runs.lengths[place], batch.drafts.get(seq, 0)
            kept = 0 if seq.status is FINISHED else min(length, seq.final_length - seq.num_tokens)
            run = [] if tokens is None else tokens[first : first + kept]
            stops = [seq.sampling_params.stops(token_id, eos) for token_id in run]
            if True in stops:
                kept = stops.index(True) + 1
            if num_drafts:
                batch.runs.append((seq, length, kept))
            if kept:
                seq.token_ids += run[: kept - 1]
                seq.num_tokens += kept - 1
                seq.num_in_flight -= num_drafts
                if seq.status is RUNNING:  # else it was preempted, and computes all of it again
                    seq.num_computed_tokens -= num_drafts + 1 - kept
            last.append(run[kept - 1] if kept and run else 0)
            first += length
        return None if tokens is None else last

    def _checked_runs(self, batch: Batch, runs: Runs) -> list[Any] | None:
        """The tokens of all runs; ValueError if runs or proposals are not as many or as long as they can be."""
        (token_ids, lengths, proposed), asked = runs, batch.num_drafts_asked
        most = [1 + batch.drafts.get(seq, 0) for seq in batch.sampled]
        if len(lengths) != len(most) or not all([1 <= length <= most[place] for place, length in enumerate(lengths)]):
            raise ValueError(f"runs of {[*lengths]} tokens, expected one of 1 to each of {most}")
        expected = 0 if self.speculation.is_async else len(most)
        if proposed is not None and (len(proposed) != expected or not all([0 <= n <= asked for n in proposed])):
            raise ValueError(f"{[*proposed]} drafts were proposed, expected {expected} numbers from 0 to {asked}")
        return checked_tokens(token_ids, batch.sampled, sum(lengths))

    def _end(self, seq: Sequence, reason: str) -> None:
        if seq.status is RUNNING:
            self._release(seq)
            self._left.append(seq)
        else:
            self.waiting.remove(seq)
            self.refusal = None
            self._passed_over.pop(seq, None)
        seq.status, seq.finish_reason = FINISHED, reason

    def _release(self, seq: Sequence) -> None:
        """Take a running sequence's place and its blocks."""
        self.block_manager.deallocate(seq)
        self._num_released += 1
        del self._running[seq]

    def refusal_of(self, seq: Sequence) -> str | None:
        """Why `seq` can never be served; None if it can. Its last generated token needs no KV, but
        its drafts beside it do: with a pool of fewer, one that has to give way to itself might never get a token."""
        if seq.num_prompt_tokens == 0:
            return "the prompt has no tokens"
        if seq.num_prompt_tokens >= self.max_model_len:
            return f"prompt of {seq.num_prompt_tokens} tokens, but max_model_len is {self.max_model_len}"
        manager, ahead = self.block_manager, self.speculation.most + self.speculation.num_lookahead_tokens
        most = min(seq.final_length - 1 + ahead, self.max_model_len)
        if manager.num_blocks is not None and manager.blocks_for(most) > manager.num_blocks:
            return f"needs {manager.blocks_for(most)} blocks of {manager.block_size}, the pool has {manager.num_blocks}"
        if not self.enable_chunked_prefill and most > self.max_num_batched_tokens:
            limit = f"max_num_batched_tokens is {self.max_num_batched_tokens} and chunked prefill is off"
            return f"may have to compute {most} tokens in a step, but {limit}"
        return None

    def check_integrity(self) -> None:
        """Raise AssertionError, with the values, if an invariant of pool, cache or queues does not hold."""
        manager = self.block_manager
        manager.check_integrity()
        assert len(self._running) <= self.max_num_seqs, f"{len(self._running)} running > {self.max_num_seqs}"
        orders = [seq.admission_index for seq in self._running]
        assert orders == sorted(orders), f"not in the order of admission: {orders}"
        ahead = manager.blocks_for(2 * self.speculation.most + self.speculation.num_lookahead_tokens)
        for seq in self._running:
            computed, least = seq.num_computed_tokens, seq.num_computed_tokens - seq.num_in_flight
            assert seq.status is RUNNING and computed > 0 and least <= seq.num_tokens, f"running: {seq}"
            assert not seq.has_token_ids or len(seq.token_ids) == seq.num_tokens, f"{len(seq.token_ids)} ids: {seq}"
            missing = manager.num_missing(seq, 0)
            fits = missing <= 0 and (self._loads is not None or -ahead <= missing)
            assert fits, f"{seq} holds {-missing} blocks ahead, expected 0 to {ahead}"
            assert 0 <= seq.num_drafts <= self.speculation.most, f"{seq.num_drafts} drafts wait: {seq}"
            assert seq.num_cached_tokens < seq.num_tokens, f"nothing left to compute: {seq}"
            if manager.prefix_cache is not None:
                behind = manager.block_size + manager.prefix_cache.hash_lookahead_tokens
                right = least - behind < seq.num_registered_tokens <= min(seq.num_tokens, computed)
                assert right, f"{seq} has {seq.num_registered_tokens} tokens registered"
        for seq in self.waiting:
            has_nothing = self._loads is not None or not (seq.block_table or seq.num_drafts or seq.num_computed_tokens)
            assert seq.status is SequenceStatus.WAITING and has_nothing, f"waiting: {seq}"


def checked_tokens(token_ids: Seq[Any] | None, sampled: list[Sequence], number: int) -> list[Any] | None:
    """The tokens of a step as a list, so many for those that sample; None in a simulation. ValueError if they are not
    as many, not 4-byte integers, or none for sequences with token ids."""
    if token_ids is None:
        for seq in sampled:
            if seq.has_token_ids:
                raise ValueError("token_ids is None, expected a token for each sequence, as they have token ids")
        return None
    if len(token_ids) != number:
        raise ValueError(f"{len(token_ids)} tokens for a batch that samples {number}")
    try:
        packed = array("I", token_ids)
        return token_ids if isinstance(token_ids, list) else packed.tolist()
    except (OverflowError, TypeError) as error:
        raise ValueError(f"tokens are {list(token_ids)}, expected integers of 4 bytes") from error
