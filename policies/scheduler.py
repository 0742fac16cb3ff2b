"""Scheduler: which sequences compute how many tokens in the next step."""

from __future__ import annotations

import math
from array import array
from bisect import insort
from collections import deque
from collections.abc import Sequence as Seq
from itertools import repeat
from typing import NamedTuple

from twinserve.policies.batch import Batch, Row
from twinserve.policies.block_manager import BlockManager
from twinserve.policies.decode_group import DecodeGroup, View
from twinserve.policies.orders import Admission, FirstCome, Order, Victim, VllmAdmission
from twinserve.policies.prefix_cache import PrefixCache
from twinserve.policies.sequence import Sequence, SequenceStatus, by_admission

COMPOSITIONS = ("prefill-first", "mixed")

Ends = dict[Sequence, str]  # who ends, and why


class Refusal(NamedTuple):
    """Why the next sequence was not admitted: what was looked at, and how many hits might change that.

    While the facts are the same, blocks only become fewer; `last_hash` is that of the last hit needed, None if it can
    never be one.
    """

    facts: tuple
    num_hits: int
    last_hash: int | None


class Scheduler:
    """Continuous batching over paged KV: admission, composition, chunking, preemption by recomputation.

    The first two parameters alone give prefill-first batches without budget, chunks or cache. With
    `composition="mixed"`, `enable_chunked_prefill=True` and a budget, it decides what vLLM's V1 scheduler decides.

    Running sequences are either `alone` (prompts being computed, and for a step or two whoever is out of step) or in
    the `group`, whose members get one token in every step that decodes. A decision walks over those alone and over the
    members that begin or complete a block; the others cost nothing.

    Args:
        composition: "prefill-first" (a step computes prompts or decodes, prompts first) or "mixed" (both at once).
        max_num_batched_tokens: token budget of a step; None is none.
        enable_chunked_prefill: a prompt larger than what is left of the budget is computed in several steps.
        long_prefill_token_threshold: the most tokens of one sequence in a step; 0 is no limit.
        max_num_partial_prefills: while so many running sequences have prompt tokens left to compute, nobody is admitted
            who would be one more of them; None is no limit.
        max_model_len: the most tokens (prompt and generated) of a sequence; generation ends there.
        order, admission, victim: who is admitted next, whether it fits, and who is preempted for room; by default first
            come, vLLM's rule, and the order's own rule.

    Attributes:
        waiting: sequences not yet admitted, or preempted; the `order`.
        in_flight: decided batches that `postprocess` has not seen, oldest first. Under prefill-first, at most one when
            the next is decided.
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
        prefix_cache: PrefixCache | None = None,
        order: Order | None = None,
        admission: Admission | None = None,
        victim: Victim | None = None,
    ):
        if composition not in COMPOSITIONS:
            raise ValueError(f"composition is {composition!r}, expected one of {', '.join(COMPOSITIONS)}")
        self.block_manager = block_manager
        self.composition = composition
        self.enable_chunked_prefill = enable_chunked_prefill
        self.max_num_seqs = _limit("max_num_seqs", max_num_seqs)
        self.max_num_batched_tokens = _limit("max_num_batched_tokens", max_num_batched_tokens)
        self.max_num_partial_prefills = _limit("max_num_partial_prefills", max_num_partial_prefills)
        self.long_prefill_token_threshold = _limit("long_prefill_token_threshold", long_prefill_token_threshold or None)
        self.max_model_len = _limit("max_model_len", max_model_len)
        self.waiting: Order = FirstCome() if order is None else order
        self.admission: Admission = VllmAdmission() if admission is None else admission
        self.in_flight: deque[Batch] = deque()
        self.alone: list[Sequence] = []
        self.refusal: Refusal | None = None
        self.group = DecodeGroup(block_manager.block_size)
        self._victim = victim
        self._running: dict[Sequence, None] = {}
        self._left: list[Sequence] = []
        self._told: list[Sequence] = []  # those alone that got a token by the result at hand
        self._num_added = self._num_admitted = self._num_released = 0
        if prefix_cache is not None:
            block_manager.bind(prefix_cache)
        if hasattr(self.waiting, "bind"):
            self.waiting.bind(block_manager)

    @property
    def running(self) -> list[Sequence]:
        """The admitted sequences, in the order of their admission."""
        return list(self._running)

    @property
    def num_running(self) -> int:
        """How many sequences are running."""
        return len(self._running)

    # --- what comes in ---

    def add(self, seq: Sequence) -> bool:
        """Put a new sequence into the waiting queue, or refuse one that can never be served.

        A refused sequence is FINISHED with `finish_reason` "refused" and `refusal` in words; the result is then False.

        Raises:
            ValueError: it was added before.
        """
        if seq.arrival_index >= 0 or seq.is_finished:
            raise ValueError(f"{seq} cannot be added: it was added before, expected a new sequence")
        most = seq.num_prompt_tokens + seq.sampling_params.max_tokens
        seq.final_length = int(min(most, self.max_model_len))
        seq.refusal = self._refusal(seq)
        if seq.refusal is not None:
            seq.status, seq.finish_reason = SequenceStatus.FINISHED, "refused"
            return False
        seq.block_size = self.block_manager.block_size
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
        return not self.waiting and not self._running

    # --- the decision ---

    def schedule(self) -> Batch:
        """Decide the next step. The decision counts as launched: computed tokens include it from now on."""
        batch = Batch(1 if self.composition == "mixed" else 0)
        self.serve_running(batch, prompts=True)
        self._admit(batch)
        if not (batch.usual_tokens or batch.explicit):
            preempted, batch = batch.preempted, Batch(1)
            batch.preempted = preempted
            self.serve_running(batch, prompts=False)
        group = self.group
        batch.alone = self.alone.copy()
        if batch.usual_tokens and (batch.explicit or group.view.seqs):
            batch.clock, batch.view = group.planned, group.plan()
        batch.count(group.num_kv_tokens)
        batch.left, self._left = self._left, []
        batch.num_waiting = len(self.waiting)
        batch.num_running = len(self._running)
        batch.num_used_blocks = self.block_manager.num_used_blocks
        if batch:
            self.in_flight.append(batch)
        return batch

    def serve_running(self, batch: Batch, *, prompts: bool) -> None:
        """Give running sequences their tokens, in the order of their admission, preempting for room.

        Only those alone and the members that begin or complete a block need a look. If a sequence has to make room by
        going itself, those behind it get nothing in this step.
        """
        decodes, seqs = bool(batch.usual_tokens), self.alone
        if decodes and (seqs or self.in_flight):
            self._regroup()
        if seqs:
            seqs = [seq for seq in self.alone if (decodes if seq.has_sampled else prompts)]
        if decodes and self.group.view.seqs:
            if self._budget_suffices(seqs):
                seqs = self._serve_members(seqs, batch)
            else:
                self._leave_out(self.group.behind(-1))
                seqs = [seq for seq in self.alone if seq.has_sampled or prompts]
        for seq in seqs:
            if seq.status is SequenceStatus.RUNNING and not self._serve(seq, batch):
                if decodes:
                    self._leave_out(self.group.behind(seq.admission_index))
                return

    def _serve(self, seq: Sequence, batch: Batch) -> bool:
        """Give a running sequence its tokens; False if it had to go for want of room."""
        num_tokens = 1
        if seq.group is None:
            num_tokens = int(min(self._wanted_tokens(seq), self._budget_left(batch)))
            if num_tokens <= 0:
                return True
        manager = self.block_manager
        missing = manager.num_missing(seq, num_tokens)
        while missing > manager.num_free_blocks:
            victim = (self._victim or self.waiting.victim).choose(self._running.keys(), seq)
            if victim not in self._running:
                raise ValueError(f"the victim rule chose {victim}, expected a running sequence")
            self._preempt(victim, batch)
            if victim is seq:
                return False
        if missing > 0:
            batch.grown.append((seq, manager.extend(seq, num_tokens)))
        if seq.group is None:
            self._launch(seq, num_tokens, batch)
        else:
            self.group.hand_over(seq, seq.num_tokens)
            manager.register(seq, seq.base + self.group.next_registered)
        return True

    def _serve_members(self, seqs: list[Sequence], batch: Batch) -> list[Sequence]:
        """Serve the members that are due, at once if nothing stands in between; who is still to be served, in order."""
        group, manager = self.group, self.block_manager
        beginning, clock = group.beginning(group.planned), group.next_registered
        comes_first = not seqs or seqs[0].admission_index > group.view.orders[-1]
        if comes_first and len(beginning) <= manager.num_free_blocks:
            if beginning:
                batch.grown += manager.extend_each(beginning)
            self._register_members(clock)
            return seqs
        completing = group.beginning(clock) if clock > group.registered else []
        return sorted(dict.fromkeys(beginning + completing + seqs), key=by_admission)

    def _register_members(self, clock: int, alone: Seq[Sequence] = ()) -> None:
        """Let the cache know, in running order, the blocks that are full of known tokens: the members' at `clock`, and
        those of `alone`."""
        group, manager, cache = self.group, self.block_manager, self.block_manager.prefix_cache
        while group.registered < clock:
            group.registered += 1
            if group.num_with_tokens or cache is not None:
                blocks = group.full_blocks(group.registered)
                if alone and blocks and group.registered == clock:
                    blocks += [(seq, seq.computed - seq.in_flight, b"") for seq in alone]
                    blocks.sort(key=lambda block: by_admission(block[0]))
                    alone = ()
                if blocks and cache is not None:
                    cache.register_each(blocks, manager.block_size, manager.register)
        for seq in alone:
            manager.register(seq, seq.computed - seq.in_flight)

    def _regroup(self) -> None:
        """Let sequences that decode in step into the group, and members whose last token is in flight out of it."""
        group = self.group
        self._leave_out(list(group.ends.get(group.planned, ())))
        ahead, num_members, manager = group.planned - group.known, len(group.view.seqs), self.block_manager
        for seq in self.alone:
            if seq.has_sampled and seq.in_flight == ahead and seq.known + ahead < seq.final_length:
                full = (seq.computed - group.planned + group.registered) // manager.block_size
                if manager.prefix_cache is None or seq.num_registered_blocks >= full:
                    group.join(seq)
        if len(group.view.seqs) > num_members:
            self.alone = [seq for seq in self.alone if seq.group is None]

    def _budget_suffices(self, seqs: list[Sequence]) -> bool:
        """Does every member get its token, whatever the sequences `seqs` beside them take?"""
        orders, budget = self.group.view.orders, self.max_num_batched_tokens
        if seqs and seqs[0].admission_index < orders[-1]:
            return len(orders) + sum(map(self._wanted_tokens, seqs)) <= budget
        return len(orders) <= budget

    def _leave_out(self, seqs: list[Sequence]) -> None:
        """Take members that get no token in this step as a matter of course out of the group."""
        for seq in seqs:
            self.group.leave(seq)
            insort(self.alone, seq, key=by_admission)

    def _admit(self, batch: Batch) -> None:
        """Admit from the head of the waiting queue while it fits; nobody in a step with a preemption."""
        while self.waiting and len(self._running) < self.max_num_seqs and not batch.preempted:
            budget = self._budget_left(batch)
            if budget <= 0:
                return
            seq = self.waiting.peek()
            found = None if seq.in_flight else self.find_room(seq, budget)
            if found is None:
                return
            hits, num_tokens = found
            self.waiting.pop_next()
            self.block_manager.admit(seq, hits, num_tokens)
            seq.status = SequenceStatus.RUNNING
            seq.computed = seq.num_cached_tokens
            seq.admission_index = self._num_admitted
            self._num_admitted += 1
            self._running[seq] = None
            self.alone.append(seq)
            batch.admitted.append(self._launch(seq, num_tokens, batch))

    def find_room(self, seq: Sequence, budget: float) -> tuple[list[int], int] | None:
        """The cached blocks and the number of tokens with which `seq` can be admitted; None if it cannot be.

        Decides nothing. A refusal is remembered for as long as nothing but the growth of running sequences has
        happened, so that a waiting prompt is not looked up in every step.
        """
        manager, cache, refusal = self.block_manager, self.block_manager.prefix_cache, self.refusal
        is_limited = self.max_num_partial_prefills < math.inf
        num_partial = sum(not other.has_sampled for other in self.alone) if is_limited else 0
        facts = seq, seq.known, budget, num_partial, self._num_admitted, self._num_released
        known_hashes = {} if cache is None else cache.hash_to_block_id
        if refusal is not None and facts == refusal.facts and refusal.last_hash not in known_hashes:
            return None
        hits = manager.find_hits(seq)
        missing = seq.known - len(hits) * manager.block_size
        most = min(self.long_prefill_token_threshold, budget)
        num_tokens = int(min(missing, most))
        is_cut = min(missing, self.long_prefill_token_threshold) > budget and not self.enable_chunked_prefill
        if is_cut or (num_tokens < missing and num_partial >= self.max_num_partial_prefills):
            num_hits = len(hits) + math.ceil((missing - most) / manager.block_size)
        elif lacking := self.admission.lacks(manager, seq, hits, num_tokens, not self._running):
            num_hits = len(hits) + lacking
        else:
            return hits, num_tokens
        may_hit = cache is not None and num_hits <= (seq.known - 1) // manager.block_size
        self.refusal = Refusal(facts, num_hits, seq.block_hashes[num_hits - 1] if may_hit else None)
        return None

    def _budget_left(self, batch: Batch) -> float:
        """Tokens of the step that nobody has been given yet, the members' own ones set aside."""
        members = len(self.group.view.seqs) if batch.usual_tokens else 0
        return self.max_num_batched_tokens - members - batch.num_tokens

    def _wanted_tokens(self, seq: Sequence) -> int:
        """Tokens that a sequence on its own may compute, the one in flight included; none if that is its last."""
        known = seq.known + seq.in_flight
        if seq.in_flight and known >= seq.final_length:
            return 0
        return min(known - seq.computed, self.long_prefill_token_threshold)  # type: ignore[return-value]

    def _launch(self, seq: Sequence, num_tokens: int, batch: Batch) -> Row:
        """Add the row of a sequence on its own to the batch and count its tokens as computed."""
        start = seq.computed
        computed = start + num_tokens
        samples = computed == seq.known + seq.in_flight
        row = Row(seq, start, num_tokens, samples, not seq.has_sampled)
        batch.explicit.append(row)
        batch.orders.append(seq.admission_index)
        batch.num_tokens += num_tokens
        seq.computed, seq.scheduled = computed, num_tokens
        if samples:
            seq.in_flight += 1
            seq.has_sampled = True
        self.block_manager.register(seq, min(computed, seq.known))
        return row

    def _preempt(self, seq: Sequence, batch: Batch) -> None:
        """Take a running sequence's blocks away; it will compute them again when it is admitted again.

        What it got in this very step is taken back, so nobody can hit a block that no step computes.
        """
        row = batch.remove(seq)
        self.block_manager.unregister(seq, seq.num_computed_tokens if row is None else row.start)
        self._release(seq)
        if row is not None:
            seq.in_flight -= row.samples
        seq.status = SequenceStatus.WAITING
        seq.computed = seq.scheduled = 0
        seq.has_sampled = False
        seq.num_preemptions += 1
        self.waiting.push_preempted(seq)
        batch.preempted.append(seq)

    # --- the result ---

    def postprocess(
        self, seqs: Batch | list[Sequence], token_ids: Seq[int] | None, eos_token_id: int | None = None
    ) -> list[Sequence]:
        """Hand the sampled tokens of the oldest batch in flight to its sequences; those that end with them.

        `seqs` is that batch, or the list that it holds; `token_ids` has a token for each of `batch.sampled`, in order,
        or is None in a simulation, which has no tokens. Anything else raises ValueError. `eos_token_id` ends a
        sequence, unless its `ignore_eos` is set.
        """
        group, batch = self.group, self.in_flight[0] if self.in_flight else None
        if batch is None or (seqs is not batch and seqs is not batch.seqs):
            raise ValueError("postprocess takes the oldest batch in flight, or the list it holds, and each once")
        if token_ids is not None and len(token_ids) != batch.num_sampled:
            raise ValueError(f"{len(token_ids)} tokens for a batch that samples {batch.num_sampled}")
        if token_ids is None and batch.num_members and group.num_with_tokens:
            raise ValueError("token_ids is None, expected a token for each sequence, as they have token ids")
        of_members, own = batch.split(token_ids)
        packed = _packed(of_members) if of_members else None
        self.in_flight.popleft()
        ends: Ends = {}
        if batch.view is not None:
            group.receive(batch.view, packed)
            self._find_ends(batch, batch.view, of_members, eos_token_id, ends)
        for row in batch.explicit:
            if row.samples:
                self._take_token(row.seq, next(own), eos_token_id, ends)
        alone = sorted((seq for seq in self._told if seq.status is SequenceStatus.RUNNING), key=by_admission)
        self._told.clear()
        self._register_members(group.known, alone)
        ended = sorted(ends, key=by_admission)
        for seq in ended:
            self._end(seq, ends[seq])
        return ended

    def _find_ends(self, batch: Batch, view: View, tokens: Seq[int] | None, eos: int | None, ends: Ends) -> None:
        """Note which members end with these tokens, and hand theirs to those that have left the group since."""
        group = self.group
        for seq in group.ends.get(group.known, ()):
            ends[seq] = "length"
        if isinstance(tokens, array):
            tokens = tokens.tolist()
        stops = {eos, *group.stops}
        if view is group.view and (tokens is None or stops.isdisjoint(tokens)):
            return
        for seq, token_id in zip(view.seqs, repeat(None) if tokens is None else tokens, strict=False):
            if seq.group is None or seq.since > batch.clock:
                self._take_token(seq, token_id, eos, ends)
            elif token_id in stops and _stops(seq, token_id, eos):
                ends[seq] = "stop"

    def _take_token(self, seq: Sequence, token_id: int | None, eos: int | None, ends: Ends) -> None:
        """Hand a token to a sequence whose row stood alone, or that has left the group since; note if it ends."""
        if seq.is_finished:
            return
        seq.take_token(token_id)
        if seq.group is None:
            seq.in_flight -= 1
            self._told.append(seq)
            if seq.known >= seq.final_length:
                ends[seq] = "length"
        if _stops(seq, token_id, eos):
            ends[seq] = "stop"

    def _end(self, seq: Sequence, reason: str) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self._release(seq)
            self._left.append(seq)
        else:
            self.waiting.remove(seq)
        seq.status, seq.finish_reason = SequenceStatus.FINISHED, reason

    def _release(self, seq: Sequence) -> None:
        """Take a running sequence's place and its blocks."""
        if seq.group is None:
            self.alone.remove(seq)
        else:
            self.group.leave(seq)
        self.block_manager.deallocate(seq)
        self._num_released += 1
        del self._running[seq]

    def _refusal(self, seq: Sequence) -> str | None:
        """Why `seq` can never be served; None if it can. Its last generated token needs no KV."""
        if seq.num_prompt_tokens == 0:
            return "the prompt has no tokens"
        if seq.num_prompt_tokens >= self.max_model_len:
            return f"prompt of {seq.num_prompt_tokens} tokens, but max_model_len is {self.max_model_len}"
        most = seq.final_length - 1
        manager = self.block_manager
        if manager.num_blocks is not None and manager.blocks_for(most) > manager.num_blocks:
            return f"needs {manager.blocks_for(most)} blocks of {manager.block_size}, the pool has {manager.num_blocks}"
        if not self.enable_chunked_prefill and most > self.max_num_batched_tokens:
            return f"may have to compute {most} tokens in a step, but max_num_batched_tokens is " + (
                f"{self.max_num_batched_tokens} and chunked prefill is off"
            )
        return None

    def check_integrity(self) -> None:
        """Raise AssertionError, with the values, if an invariant of pool, cache, group or queues does not hold."""
        manager = self.block_manager
        manager.check_integrity()
        self.group.check_integrity()
        assert len(self._running) <= self.max_num_seqs, f"{len(self._running)} running > {self.max_num_seqs}"
        orders = [seq.admission_index for seq in self._running]
        assert orders == sorted(orders), f"not in the order of admission: {orders}"
        alone = [seq for seq in self._running if seq.group is None]
        assert alone == self.alone, f"alone: {self.alone}, but running outside the group: {alone}"
        assert len(alone) + len(self.group.view.seqs) == len(orders), f"{self.group.view.seqs} is not all that runs"
        for seq in self._running:
            known, computed = seq.num_tokens + seq.num_in_flight, seq.num_computed_tokens
            assert seq.status is SequenceStatus.RUNNING and 0 < computed <= known, f"running: {seq}"
            needed = manager.blocks_for(computed)
            assert len(seq.block_table) == needed, f"{seq} holds {len(seq.block_table)} blocks, needs {needed}"
            assert seq.num_cached_tokens < seq.num_tokens, f"nothing left to compute: {seq}"
            if manager.prefix_cache is not None:
                least, most = computed - seq.num_in_flight, min(seq.num_tokens, computed)
                right = least // manager.block_size <= seq.num_registered_blocks <= most // manager.block_size
                assert right, f"{seq} has {seq.num_registered_blocks} blocks registered"
        for seq in self.waiting:
            assert seq.status is SequenceStatus.WAITING and not seq.block_table, f"waiting: {seq}"


def _limit(name: str, value: int | None) -> float:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}, expected an integer >= 1")
    return math.inf if value is None else value


def _packed(token_ids: Seq[int]) -> array[int]:
    try:
        return array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"tokens are {list(token_ids)}, expected integers of 4 bytes") from error


def _stops(seq: Sequence, token_id: int | None, eos_token_id: int | None) -> bool:
    """Does the token end the sequence, whatever its length?"""
    params = seq.sampling_params
    return not params.ignore_eos and token_id is not None and token_id in (eos_token_id, *params.stop_token_ids)
