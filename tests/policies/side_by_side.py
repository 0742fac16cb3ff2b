"""The policies and the slow model, driven by the same calls and compared after each."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

import pytest
from slow_model import FINISHED, RUNNING, Request, Rules, SlowModel, Step

from twinserve.orders import CacheAware, Priority, ShortestJob
from twinserve.policies import (
    Batch,
    BlockManager,
    Core,
    CoreListener,
    FirstCome,
    PrefixCache,
    Runs,
    SamplingParams,
    Scheduler,
    Sequence,
    SequenceStatus,
    Speculation,
    VllmAdmission,
)
from twinserve.policies.vllm_rules import LongPrefillThreshold, PrefillInterval, VllmRules
from twinserve.sim.horizon import advance, horizon

EOS = 0
STATUS = {SequenceStatus.WAITING: "waiting", SequenceStatus.RUNNING: "running", SequenceStatus.FINISHED: "finished"}


class WeakHash:
    """A hash of very few values; counts how often different content got an equal one."""

    def __init__(self, num_values: int = 2):
        self.num_values = num_values
        self.content: dict[int, set[bytes]] = {}

    def __call__(self, data: bytes, seed: int) -> int:
        value = sum(data) % self.num_values
        self.content.setdefault(value, set()).add(data)
        return value

    @property
    def num_collisions(self) -> int:
        return sum(len(content) - 1 for content in self.content.values())


def build_order(rules: Rules) -> FirstCome | Priority | ShortestJob | CacheAware:
    """The waiting queue that the rules describe."""
    if rules.order == "fcfs":
        return FirstCome()
    if rules.order == "cache-aware":
        return CacheAware(window=rules.window, patience=rules.patience)
    return {"priority": Priority, "shortest": ShortestJob}[rules.order](ageing=rules.ageing)


def build_scheduler(rules: Rules, hash: str | Callable[[bytes, int], int] = "xxh64") -> Scheduler:
    """The Scheduler that the rules describe."""
    speculation = None
    if rules.most_drafts:
        speculation = Speculation(rules.most_drafts, None, rules.lookahead, rules.draft_slots, rules.is_async)
    return Scheduler(
        BlockManager(rules.num_blocks, rules.block_size),
        rules.max_num_seqs,
        composition=rules.composition,
        max_num_batched_tokens=rules.budget,
        enable_chunked_prefill=rules.chunked,
        long_prefill_token_threshold=rules.threshold,
        max_num_partial_prefills=rules.max_partial_prefills,
        max_model_len=rules.max_model_len,
        prefix_cache=PrefixCache(hash=hash, hash_lookahead_tokens=rules.key_lookahead) if rules.caching else None,
        order=build_order(rules),
        admission=VllmAdmission(reserve_full_prompt=rules.reserve_full_prompt, watermark_blocks=rules.watermark_blocks),
        pipeline_parallel_size=rules.ranks,
        rules=VllmRules(
            PrefillInterval(rules.interval),
            rules.self_ends,
            rules.victim_skips,
            LongPrefillThreshold(binds_alone=rules.binds_alone, adaptive=rules.adaptive),
        ),
        speculation=speculation,
    )


class SideBySide:
    """A Scheduler and a slow model that must agree after every call.

    Attributes:
        seen: counts the rare things that happened.
        pairs: all requests on both sides, by their number.
        live: those that had not ended when they were last compared.
        in_flight: both sides of each batch in flight.
    """

    def __init__(self, rules: Rules, hash: str | Callable[[bytes, int], int] = "xxh64", *, simulated: bool = False):
        self.rules = rules
        self.simulated = simulated
        self.texts: list[list[int]] = []
        self._prefixes: dict[tuple[int, ...], int] = {}
        self.hash = hash
        self.scheduler = build_scheduler(rules, hash)
        self.model = SlowModel(rules)
        self.manager = self.scheduler.block_manager
        self.pairs: list[tuple[Sequence, Request]] = []
        self.live: list[tuple[Sequence, Request]] = []
        self._ended_horizon: Step | None = None
        self._is_disturbed = False
        self.in_flight: deque[tuple[Batch, Step]] = deque()
        self.seen: Counter[str] = Counter()

    # --- calls ---

    def add(
        self,
        tokens: list[int],
        max_tokens: int,
        *,
        ignore_eos: bool = False,
        stop_tokens: tuple[int, ...] = (),
        priority: int = 0,
        salt: str = "",
    ) -> None:
        """A new request for both sides; in a simulation they are told only which prefixes are equal."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, stop_token_ids=stop_tokens)
        key, known = len(self.pairs), len(tokens)
        prefix_key = None
        if self.simulated:
            self.texts.append([*tokens, *range(10_000 * (key + 1), 10_000 * (key + 1) + max_tokens)])
            prefix_key = partial(self._prefix_key, key)
            tokens = []
        seq = Sequence(
            None if self.simulated else list(tokens),
            params,
            seq_id=key,
            num_prompt_tokens=known,
            prefix_key=prefix_key,
            priority=priority,
            salt=salt,
        )
        request = Request(
            key, list(tokens), known, max_tokens, ignore_eos, stop_tokens, prefix_key, priority=priority, salt=salt
        )
        accepted = self._add(seq)
        assert accepted == self.model.add(request), f"request {key}: accepted is {accepted}, {seq.refusal}"
        self.seen["refused"] += not accepted
        self.pairs.append((seq, request))
        self.live.append((seq, request))

    def _prefix_key(self, key: int, num_tokens: int) -> int:
        return self._prefixes.setdefault(tuple(self.texts[key][:num_tokens]), len(self._prefixes))

    def text_of(self, key: int) -> list[int]:
        """The tokens that a request knows by now."""
        request = self.pairs[key][1]
        return self.texts[key][: request.known] if self.simulated else request.tokens

    def abort(self, key: int) -> None:
        """End a request that is being served."""
        seq, request = self.pairs[key]
        self.seen["abort in flight"] += request.in_flight > 0
        self.scheduler.abort(seq)
        self.model.abort(request)

    def decide(self) -> tuple[Batch, Step]:
        """Decide a step on both sides, and compare what was decided."""
        waiting_free = set(self.model.free)
        batch, step = self._decide()
        self._compare_decision(batch, step)
        for row in step.admitted:
            self.seen["hit of a free block"] += bool(set(row.request.table[: row.request.registered]) & waiting_free)
            self.seen["hit of a live block"] += row.start > 0 and row.request.table[0] not in waiting_free
            self.seen["resumed with hits"] += row.request.preemptions > 0 and row.start > 0
        if not (step.rows or step.preempted):
            self._decide_again()
        self.seen["held back"] += step.is_held and any(not request.has_sampled for request in self.model.running)
        self.seen["admitted while held"] += step.is_held and bool(step.admitted)
        self.seen["kept waiting"] += self.model.kept_waiting and self.rules.interval > 1
        self.seen["turn lost"] += step.turns_lost
        self.seen["served behind one that went"] += step.served_behind
        self.seen["padded admission"] += step.padded
        self.seen["drafts cut"] += sum(row.samples and 0 < row.num_drafts < self.rules.most_drafts for row in step.rows)
        self.seen["set aside"] += len(self.model.set_aside)
        self.seen["preemption"] += len(step.preempted)
        self.seen["row taken back"] += step.taken_back
        self.seen["preempted in flight"] += sum(request.in_flight > 0 for request in step.preempted)
        self.seen["preemption that leaves no rows"] += bool(step.preempted and not step.rows)
        self.seen["chunk of one token"] += sum(
            row.is_prompt and row.num_tokens == 1 and row.start > 0 for row in step.rows
        )
        return batch, step

    def most_lengths(self) -> list[int]:
        """The longest that the runs of the oldest batch in flight can be."""
        return [1 + row.num_drafts for row in self.in_flight[0][1].rows if row.samples]

    def commit(self, tokens: list[int], lengths: list[int] | None = None, proposed: list[int] | None = None) -> None:
        """Hand the output of the oldest batch in flight to both sides; a simulation has no tokens."""
        given = None if self.simulated else tokens
        batch, step = self.in_flight[0]
        assert [seq.seq_id for seq in batch.sampled] == [request.key for request in step.sampled]
        self.seen["stopped late"] += sum(request.status == FINISHED for request in step.sampled)
        self._see_drafts(step, lengths)
        known = [request.known for request in step.sampled]
        ours = self._commit(batch, given if lengths is None else Runs(given, lengths, proposed))
        finished = self.model.commit(given, lengths, proposed) if step.rows else []
        for request, before, length in zip(step.sampled, known, lengths or [], strict=False):
            self.seen["end inside a run"] += request in finished and request.known - before < length
        self.in_flight.popleft()
        assert [seq.seq_id for seq in ours] == [request.key for request in finished]
        self.seen["ended while waiting"] += sum(
            request.preemptions > 0 and not request.has_sampled for request in finished
        )

    def _see_drafts(self, step: Step, lengths: list[int] | None) -> None:
        rows = [row for row in step.rows if row.samples]
        for row, length in zip(rows, lengths or [], strict=False):
            self.seen["draft accepted"] += length > 1
            self.seen["draft rejected"] += length <= row.num_drafts
            self.seen["run that comes late"] += length > 1 and row.request.status == "waiting"

    def reset(self) -> None:
        """Forget every cached prefix, unless blocks are in use."""
        self._disturb()
        done = self.model.reset()
        assert self.manager.reset_prefix_cache() == done
        self.seen["reset"] += done
        self.seen["reset refused"] += not done
        if done and self.rules.caching:
            assert len(self.manager.prefix_cache or ()) == 0 and not self.manager.used_block_ids

    def lookup(self, tokens: list[int]) -> None:
        """The cache finds, of these tokens, what the model holds."""
        request = Request(-1, tokens, len(tokens), 1, known=len(tokens) + 1)
        cache = self.manager.prefix_cache
        if cache is not None:
            assert cache.lookup(tokens, self.rules.block_size)[0] == self.model.hits(request)

    def _disturb(self) -> None:
        """Something came from outside: what would have been decided next may not be."""
        self._ended_horizon = None
        self._is_disturbed = True

    # --- the Scheduler's way; Core has another ---

    def _add(self, seq: Sequence) -> bool:
        return self.scheduler.add(seq)

    def _decide(self) -> tuple[Batch, Step]:
        batch, step = self.scheduler.schedule(), self.model.decide()
        if batch or step.rows:
            self.in_flight.append((batch, step))
        return batch, step

    def _decide_again(self) -> None:
        """After a decision that does nothing, another one does nothing either."""
        before = self.state()
        again = self.scheduler.schedule()
        assert not (again or again.admitted or again.preempted or again.left)
        assert self.state() == before

    def _commit(self, batch: Batch, tokens: Runs | list[int] | None) -> list[Sequence]:
        return self.scheduler.postprocess(batch, tokens, self.rules.eos)

    # --- comparing ---

    def _compare_decision(self, batch: Batch, step: Step) -> None:
        admitted = [(r.request.key, r.start, r.num_tokens, r.samples, r.is_prompt, r.num_drafts) for r in step.admitted]
        assert [(row.seq.seq_id, *row[1:]) for row in batch.admitted] == admitted
        assert [seq.seq_id for seq in batch.preempted] == [request.key for request in step.preempted]
        assert [seq.seq_id for seq in batch.left] == [request.key for request in step.left]
        grown = [(row.request.key, row.new_blocks) for row in step.rows if row.new_blocks and row not in step.admitted]
        assert [(seq.seq_id, list(ids)) for seq, ids in batch.grown] == grown
        self._compare_totals(batch, step)
        decodes = self.rules.composition == "mixed" or not any(row.is_prompt for row in step.rows)
        with_row = {row.request.key for row in step.rows}
        without = [request.key for request in self.model.running if request.key not in with_row]
        assert (batch.usual_tokens, [seq.seq_id for seq in batch.skipped]) == (int(decodes), without * decodes)
        used = {"num_waiting": len(self.model.waiting), "num_running": len(self.model.running)}
        used["num_used_blocks"] = len(self.model.used())
        assert {name: getattr(batch, name) for name in used} == used
        # Laws, whatever the model says.
        budget = math.inf if self.rules.budget is None else self.rules.budget
        assert batch.num_tokens <= budget, f"{batch.num_tokens} tokens, the budget is {budget}"
        assert all(row.num_drafts < row.num_tokens for row in batch.rows), "a row of drafts alone"
        assert len(self.scheduler.running) <= self.rules.max_num_seqs
        assert not (batch.admitted and batch.preempted), "nobody is admitted in a step with a preemption"
        if batch.admitted and len(self.scheduler.running) > 1:
            assert self.manager.num_free_blocks >= self.rules.watermark_blocks, "an admission went below the watermark"

    def _compare_totals(self, batch: Batch, step: Step) -> None:
        """What executors and latency models read of a batch in flight."""
        expected_rows = [
            (r.request.key, r.start, r.num_tokens, r.samples, r.is_prompt, r.num_drafts) for r in step.rows
        ]
        assert [(row.seq.seq_id, *row[1:]) for row in batch.rows] == expected_rows
        seqs, is_prefill = batch
        assert [seq.seq_id for seq in seqs] == [row.request.key for row in step.rows]
        assert is_prefill == any(row.is_prompt and (row.num_tokens > 1 or row.samples) for row in step.rows)
        totals = {
            "num_tokens": step.num_tokens,
            "num_prompt_tokens": sum(row.num_tokens for row in step.rows if row.is_prompt),
            "num_kv_tokens": sum(row.start + row.num_tokens for row in step.rows),
            "num_attention_pairs": sum(sum(range(row.start + 1, row.start + row.num_tokens + 1)) for row in step.rows),
        }
        assert {name: getattr(batch, name) for name in totals} == totals
        assert len(batch) == len(step.rows)

    def compare(self, *, reads_tokens: bool = True) -> None:
        """Everything that can be seen from outside is equal on both sides, and the policies' own invariants hold.

        Reading a sequence's tokens makes it fetch them from where they came in, and so do the invariants; without that,
        they stay there until they are needed.
        """
        scheduler, model, manager = self.scheduler, self.model, self.manager
        assert [seq.seq_id for seq in scheduler.running] == [request.key for request in model.running]
        assert len(scheduler.waiting) == len(model.waiting)
        assert [seq.seq_id for seq in scheduler.waiting] == [request.key for request in model.queue()]
        if model.waiting:
            assert scheduler.waiting.peek().seq_id == model.head().key
        for seq, request in self.live:
            self._compare_request(seq, request, reads_tokens)
        self.live = [pair for pair in self.live if pair[1].status != FINISHED]
        assert list(manager.free_block_ids) == model.free
        assert set(manager.used_block_ids) == model.used()
        if manager.prefix_cache is not None:
            cached = {block for block in range(model.num_blocks_made) if block in manager.prefix_cache}
            assert cached == set(model.holds)
        if reads_tokens:
            scheduler.check_integrity()
        self.seen["eviction of a cached block"] = max(self.seen["eviction of a cached block"], model.evictions)
        self.seen["one prefix on several blocks"] += any(len(blocks) > 1 for blocks in model.holders_of.values())
        if isinstance(self.hash, WeakHash):
            self.seen["collision"] = self.hash.num_collisions

    def _compare_request(self, seq: Sequence, request: Request, reads_tokens: bool) -> None:
        ours: tuple = (seq.num_tokens, seq.num_in_flight, seq.block_table, STATUS[seq.status], seq.finish_reason)
        theirs: tuple = (request.known, request.in_flight, request.table, request.status, request.reason)
        if request.status == RUNNING:
            ours, theirs = (*ours, seq.num_drafts), (*theirs, request.drafts)
        assert ours == theirs, f"request {request.key}"
        if reads_tokens or request.status == FINISHED:
            assert list(seq.token_ids) == request.tokens, f"request {request.key}"
        assert seq.num_preemptions == request.preemptions, f"request {request.key}"
        if request.status != FINISHED:
            assert seq.num_computed_tokens == request.computed, f"request {request.key}"
        if request.status == RUNNING:
            assert seq.num_cached_tokens == request.cached, f"request {request.key}"

    def state(self) -> object:
        """What the policies hold, as a value that can be compared with a later one."""
        sequences = [
            (seq.status, seq.num_tokens, seq.num_computed_tokens, seq.num_in_flight, list(seq.block_table))
            for seq, _ in self.live
        ]
        order = [seq.seq_id for seq in self.scheduler.running], [seq.seq_id for seq in self.scheduler.waiting]
        cached = {block for block in range(self.model.num_blocks_made) if block in (self.manager.prefix_cache or ())}
        return sequences, order, list(self.manager.free_block_ids), cached


class Repeats(CoreListener):
    """Keeps what Core said of the decisions that it repeated last."""

    def __init__(self) -> None:
        self.grown: list[list[tuple[int, list[int]]]] = []

    def repeated(self, batch, spans, grown, num_committed, latest):
        numbers = range(1, len(spans) + 1)
        self.grown = [[(seq.seq_id, list(ids)) for step, seq, ids in grown if step == number] for number in numbers]


def repeats(step: Step, before: Step) -> bool:
    """Is a decision the one before it, but for the lengths that have grown?"""
    rows = [
        [(row.request.key, row.num_tokens, row.samples, row.is_prompt) for row in one.rows] for one in (before, step)
    ]
    return rows[0] == rows[1] and not (before.admitted or step.admitted or step.preempted or step.left)


class CoreSideBySide(SideBySide):
    """The same through Core: aborts wait for the next decision, and an empty decision is in flight like any other."""

    def __init__(
        self,
        rules: Rules,
        hash: str | Callable[[bytes, int], int] = "xxh64",
        *,
        depth: int = 0,
        simulated: bool = False,
    ):
        super().__init__(rules, hash, simulated=simulated)
        self.repeats = Repeats()
        self.core = Core(self.scheduler, pipeline_depth=depth, eos_token_id=rules.eos, listener=self.repeats)
        self._aborts: list[Request] = []

    def abort(self, key: int) -> None:
        seq, request = self.pairs[key]
        assert self.core.abort(key, 0) == (request.status != FINISHED)
        self._disturb()
        if request.status != FINISHED and request not in self._aborts:
            self.seen["abort in flight"] += request.in_flight > 0
            self._aborts.append(request)

    def _add(self, seq: Sequence) -> bool:
        self._disturb()
        return self.core.ingest(seq, 0)

    def _decide(self) -> tuple[Batch, Step]:
        batch = self.core.decide(0)
        aborted = [request for request in self._aborts if request.status != FINISHED]
        self._aborts.clear()
        for request in aborted:
            self.model.abort(request)
        assert [seq.seq_id for seq in batch.aborted] == [request.key for request in aborted]
        step = self.model.decide()
        self.in_flight.append((batch, step))
        if self._ended_horizon is not None:
            assert not repeats(step, self._ended_horizon), "the horizon was not the longest"
            self._ended_horizon = None
        self._is_disturbed = False
        return batch, step

    def advance(self, cap: int, share: float) -> None:
        """Make at once a share of the decisions that repeat the latest; the model makes them one by one."""
        latest = self.in_flight[-1][1]
        rows = [[(row.seq, *row[2:]) for row in batch.rows] for batch, _ in self.in_flight]
        is_clear = all(one == rows[0] for one in rows)
        steps = horizon(self.core, self.in_flight[-1][0], cap)
        assert 1 <= steps <= cap
        number = round(share * (steps - 1))
        advance(self.core, [(0, 0, 0)] * number)
        steps_of_model = [step for _, step in self.in_flight]
        grown = []
        for _ in range(number):
            committed = steps_of_model.pop(0)
            assert not (self.model.commit(None) if committed.rows else []), "a sequence ended within the horizon"
            steps_of_model.append(self.model.decide())
            assert repeats(steps_of_model[-1], latest), "the decision is not the one before it"
            grown.append([(row.request.key, row.new_blocks) for row in steps_of_model[-1].rows if row.new_blocks])
        if number:
            assert self.repeats.grown == grown
            self.in_flight = deque(zip(self.core.in_flight, steps_of_model, strict=True))
            for batch, step in self.in_flight:
                self._compare_totals(batch, step)
        # It may be shorter where the steps in flight differ, a decode has a row of its own, nothing is computed or
        # decodes are left out for the budget, and where the head of the queue may be looked at with another answer: its
        # token comes, a hit is computed for it, it is new, or its order may change its mind; and where a prefill
        # interval begins or ends. With drafts every decision is looked at.
        is_clear &= bool(latest.rows) and not latest.preempted and not self._is_disturbed
        is_clear &= self.rules.order != "cache-aware" and not self.rules.most_drafts
        is_clear &= not (self.model.waiting and self.rules.caching)
        is_clear &= not any(request.in_flight for request in self.model.waiting)
        is_clear &= not (latest.is_held or self.model.is_next_held())
        is_clear &= self.rules.budget is None or self.rules.budget >= self.rules.max_num_seqs
        self._ended_horizon = latest if is_clear and number == steps - 1 and steps < cap else None
        self.seen["horizon of many"] += number > 3
        self.seen["horizon that takes blocks"] += any(grown)
        self.seen["horizon with a prompt in chunks"] += number > 0 and any(row.is_prompt for row in latest.rows)
        self.seen["horizon with a refused head"] += number > 0 and bool(self.model.waiting)

    def can_advance(self) -> bool:
        return self.simulated and bool(self.in_flight) and not (self._aborts or self.core.can_decide)

    def _decide_again(self) -> None:
        """Core lets nobody decide twice without an event in between: the decision is in flight, though it is empty."""
        if len(self.in_flight) > self.core.pipeline_depth:
            self.decide_too_early()

    def decide_too_early(self) -> None:
        """A decision beyond the pipeline's depth is refused and changes nothing."""
        before = self.state()
        with pytest.raises(RuntimeError, match="in flight"):
            self.core.decide(0)
        assert self.state() == before

    def _commit(self, batch: Batch, tokens: Runs | list[int] | None) -> list[Sequence]:
        return self.core.commit(tokens, 0)
