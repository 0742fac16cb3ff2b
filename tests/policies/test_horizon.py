"""Horizon: decisions that repeat one another, made at once, are those made one by one, and there could not be more."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from twinserve.orders import CacheAware, Priority, ShortestJob
from twinserve.policies import (
    Batch,
    BlockManager,
    Core,
    CoreListener,
    FirstCome,
    PrefixCache,
    SamplingParams,
    Scheduler,
    Sequence,
    VllmAdmission,
)
from twinserve.policies.vllm_rules import LongPrefillThreshold, PrefillInterval, VllmRules
from twinserve.sim.horizon import advance, horizon
from twinserve.traces.runs.digest import Digest, exceptions_of

STEP_NS = 10
ANSWERED = -1
ORDERS = (FirstCome, Priority, ShortestJob, lambda: Priority(ageing=3), CacheAware)

ROOM = {
    "num_blocks": None, "max_model_len": None, "max_num_partial_prefills": None, "order": FirstCome, "interval": 1
}  # fmt: skip
"""Settings under which nobody waits but for places and tokens."""


def settings_of(rng: random.Random) -> dict[str, Any]:
    """Settings under which much happens."""
    size = rng.choice([1, 2, 3, 4, 8])
    return {
        "block_size": size,
        "num_blocks": rng.choice([None, 6, 12, 40, 40]),
        "max_num_seqs": rng.choice([2, 8, 16]),
        "composition": rng.choice(["mixed", "prefill-first"]),
        "max_num_batched_tokens": rng.choice([3, 8, 20, 64]),
        "long_prefill_token_threshold": rng.choice([0, 0, 2, 6]),
        "max_num_partial_prefills": rng.choice([None, None, 1, 2]),
        "max_model_len": rng.choice([None, 30]),
        "caches": rng.random() < 0.8,
        "order": rng.choice(ORDERS),
        "reserve": rng.random() < 0.6,
        "watermark": rng.choice([0, 0, 2]),
        "depth": rng.choice([0, 1]),
        "binds_alone": rng.random() < 0.5,
        "adaptive": rng.random() < 0.5,
        "interval": rng.choice([1, 1, 2, 5]),
    }


def build_core(values: dict[str, Any], listener: CoreListener) -> Core:
    scheduler = Scheduler(
        BlockManager(values["num_blocks"], values["block_size"]),
        values["max_num_seqs"],
        composition=values["composition"],
        max_num_batched_tokens=values["max_num_batched_tokens"],
        enable_chunked_prefill=True,
        long_prefill_token_threshold=values["long_prefill_token_threshold"],
        max_num_partial_prefills=values["max_num_partial_prefills"],
        max_model_len=values["max_model_len"],
        prefix_cache=PrefixCache() if values["caches"] else None,
        order=values["order"](),
        admission=VllmAdmission(reserve_full_prompt=values["reserve"], watermark_blocks=values["watermark"]),
        rules=VllmRules(
            PrefillInterval(values["interval"]),
            threshold=LongPrefillThreshold(binds_alone=values["binds_alone"], adaptive=values["adaptive"]),
        ),
    )
    return Core(scheduler, pipeline_depth=values["depth"], listener=listener)


@dataclass
class Arrival:
    """A request without tokens; those with the same text have prompts that begin alike, and of
    ANSWERED answers that go on as longer prompts do."""

    at_ns: int
    number: int
    prompt_tokens: int
    max_tokens: int
    text: int
    priority: int
    salt: str

    def sequence(self) -> Sequence:
        def key(num_tokens: int) -> int:
            own = num_tokens > self.prompt_tokens and self.text != ANSWERED
            return (1 << 40) * (1 + self.number) + num_tokens if own else 1000 * self.text + num_tokens

        return Sequence(
            None,
            SamplingParams(max_tokens=self.max_tokens, ignore_eos=True),
            seq_id=self.number,
            num_prompt_tokens=self.prompt_tokens,
            prefix_key=key,
            priority=self.priority,
            salt=self.salt,
        )


def arrivals_of(rng: random.Random) -> list[Arrival]:
    gap = rng.choice([5, 40, 400])
    now, arrivals = 0, []
    for number in range(rng.randint(3, 25)):
        now += rng.randrange(gap)
        text = rng.choice([0, 0, 1, 100 + number])
        lengths = rng.randint(1, 40), rng.choice([1, 2, rng.randint(1, 15), rng.randint(1, 60)])
        arrivals.append(Arrival(now, number, *lengths, text, rng.randrange(3), rng.choice(["", "", "other"])))
    return arrivals


def fields(batch: Batch) -> tuple:
    """What a decision is, but for the lengths that grow."""
    rows = tuple((row.seq.seq_id, row.num_tokens, row.samples, row.is_prompt) for row in batch.rows)
    return rows, batch.usual_tokens, batch.num_waiting, batch.num_running, len(exceptions_of(batch))


def totals(batch: Batch) -> tuple:
    return (
        batch.decision,
        batch.seen,
        batch.committed,
        batch.num_tokens,
        batch.num_prompt_tokens,
        batch.num_kv_tokens,
        batch.num_attention_pairs,
        batch.num_sampled,
        batch.num_used_blocks,
        batch.is_prefill,
        batch.is_ahead,
        [seq.seq_id for seq in batch.skipped],
        [(row.seq.seq_id, row.start) for row in batch.rows],
        [seq.seq_id for seq in batch.sampled],
    )


def state(core: Core) -> tuple:
    """All that later decisions depend on, and the batches in flight."""
    scheduler = core.scheduler
    manager = scheduler.block_manager
    cache = manager.prefix_cache
    running = [
        (seq.seq_id, seq.num_tokens, seq.num_computed_tokens, seq.num_in_flight, seq.block_table, seq.block_hashes)
        for seq in scheduler.running
    ]
    cached = None
    if cache is not None:
        ids = range(len(manager.blocks))
        cached = [cache.get(i) and (cache.get(i).hash, cache.get(i).content) for i in ids], cache.hash_to_block_id
    return (
        running,
        [(seq.seq_id, seq.num_tokens, seq.num_in_flight) for seq in scheduler.waiting],
        list(manager.free_block_ids),
        cached,
        [totals(batch) for batch in core.in_flight],
        (scheduler.rules.interval.num_since, scheduler.rules.interval.is_saturated, scheduler.rules.interval.is_held),
    )


class Log(CoreListener):
    """Keeps each decision's digest and growth; of repeated ones, the last digest and each one's growth."""

    def __init__(self) -> None:
        self.digest = Digest()
        self.digests: dict[int, int] = {}
        self.grown: dict[int, list] = {}
        self.committed_batches = 0
        self.longest = 0

    def decided(self, batch):
        self.digests[batch.decision] = self.digest.of(batch)
        self.grown[batch.decision] = [(seq.seq_id, list(ids)) for seq, ids in batch.grown]

    def repeated(self, batch, spans, grown, num_committed, latest):
        self.digests[latest.decision] = self.digest.grow(latest, [(seq, ids) for _, seq, ids in grown])
        for number in range(1, len(spans) + 1):
            blocks = [(seq.seq_id, list(ids)) for step, seq, ids in grown if step == number]
            self.grown[batch.decision + number] = blocks
        self.committed_batches += num_committed
        self.longest = max(self.longest, len(spans) + 1)

    def committed(self, batch):
        self.committed_batches += 1


@dataclass
class Run:
    """Serves arrivals on a clock of equal steps; with `leaps`, repeated decisions are made at once."""

    arrivals: list[Arrival]
    values: dict[str, Any]
    leaps: bool
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    def __post_init__(self) -> None:
        self.log = Log()
        self.core = build_core(self.values, self.log)
        self.states: dict[int, tuple] = {}
        self.times: dict[int, tuple] = {}
        self.fields: dict[int, tuple] = {}
        self.changes: set[int] = set()
        self.admitting: set[int] = set()
        self.seen: dict[int, int] = {}
        self.is_exact: dict[int, bool] = {}
        self.horizons: dict[int, int] = {}
        self.seqs: list[Sequence] = []

    def _may_be_short(self, batch: Batch) -> bool:
        """Is it a decision whose horizon need not be the most, by the words of its docstring?"""
        scheduler, interval = self.core.scheduler, self.core.scheduler.rules.interval
        if interval.is_held or interval.holds(scheduler.running):
            return True
        rows = [[(row.seq, *row[2:]) for row in one.rows] for one in self.core.in_flight]
        if any(rows[0] != others for others in rows):
            return True
        if not scheduler.waiting:
            return False
        text = self.arrivals[scheduler.waiting.peek().seq_id].text
        shares = any(self.arrivals[seq.seq_id].text == text for seq in scheduler.running if not seq.has_sampled)
        return shares or self.values["order"] is CacheAware

    def serve(self) -> Run:
        core, coming, now = self.core, list(self.arrivals), 0
        while coming or not core.is_idle:
            if core.is_idle:
                now = max(now, coming[0].at_ns)
            while coming and coming[0].at_ns <= now:
                seq = coming.pop(0).sequence()
                self.seqs.append(seq)
                core.ingest(seq, now)
            if core.can_decide:
                self._decide(now, coming)
            if core.must_commit:
                now = max(now, core.in_flight[0].end_ns or 0)
                core.commit(None, now)
                core.scheduler.check_integrity()
        self.times = {
            seq.seq_id: (seq.first_scheduled_ns, seq.first_token_ns, seq.finish_ns, seq.finish_reason)
            for seq in self.seqs
        }
        return self

    def _decide(self, now: int, coming: list[Arrival]) -> None:
        core = self.core
        ends = [batch.end_ns or 0 for batch in core.in_flight]
        batch = core.decide(now)
        batch.start_ns = max([now, *ends])
        batch.end_ns = batch.start_ns + STEP_NS
        if batch.admitted or batch.left or batch.preempted:
            self.changes.add(batch.decision)
        if batch.admitted:
            self.admitting.add(batch.decision)
        self.seen[batch.decision] = batch.seen
        self.is_exact[batch.decision] = not (core.can_decide or batch.preempted or self._may_be_short(batch))
        self.fields[batch.decision] = fields(batch)
        steps = self.horizons[batch.decision] = horizon(core, batch, 1000)
        assert steps >= 1
        if self.leaps and steps > 1:
            ends.append(batch.end_ns)
            spans = []
            for _ in range(1, self.rng.choice([steps, steps, self.rng.randint(1, steps)])):
                decided = max(now, ends[-1 - core.pipeline_depth])
                if coming and decided >= coming[0].at_ns:
                    break
                spans.append((decided, max(decided, ends[-1]), max(decided, ends[-1]) + STEP_NS))
                ends.append(spans[-1][2])
            if spans:
                advance(core, spans)
        core.scheduler.check_integrity()
        self.states[core.in_flight[-1].decision] = state(core)


@pytest.mark.parametrize("block", range(10))
def test_repeated_decisions_made_at_once_are_those_made_one_by_one(block):
    """Blocks, hashes, the order of eviction, digests, times: at the end of each leap all is as step by step."""
    leapt = 0
    for seed in range(40 * block, 40 * block + 40):
        rng = random.Random(seed)
        arrivals, values = arrivals_of(rng), settings_of(rng)
        single = Run(arrivals, values, leaps=False).serve()
        leaping = Run(arrivals, values, leaps=True).serve()
        leapt = max(leapt, leaping.log.longest)
        assert leaping.times == single.times, f"seed {seed}: {values}"
        for decision, found in leaping.states.items():
            assert found == single.states[decision], f"seed {seed}, decision {decision}: {values}"
        assert leaping.log.grown == single.log.grown, f"seed {seed}: {values}"
        assert leaping.log.digests.items() <= single.log.digests.items(), f"seed {seed}: {values}"
        assert leaping.log.committed_batches == single.log.committed_batches
    assert leapt > 10, "some leaps were long"


@pytest.mark.parametrize("depth", [0, 1])
def test_blocks_of_one_content_are_shown_to_the_cache_in_the_order_in_which_they_become_full(depth):
    """A prompt holds what another request answers meanwhile: of two alike blocks the cache knows the first."""
    for seed in range(40):
        rng = random.Random(seed)
        values = settings_of(rng) | ROOM | {
            "max_num_seqs": 8, "composition": "mixed", "max_num_batched_tokens": 8, "caches": True, "depth": depth,
            "long_prefill_token_threshold": rng.choice([1, 2, 3]), "adaptive": False,
        }  # fmt: skip
        lengths = ((rng.randint(1, 12), 50), (rng.randint(20, 60), 20))
        arrivals = [Arrival(0, number, *both, ANSWERED, 0, "") for number, both in enumerate(lengths)]
        single, leaping = (Run(arrivals, values, leaps=leaps).serve() for leaps in (False, True))
        assert leaping.log.longest > 3
        for decision, found in leaping.states.items():
            assert found == single.states[decision], f"seed {seed}, decision {decision}: {values}"


def repetitions(run: Run, decision: int) -> int | None:
    """How many decisions from this one on were the same; None if something came from outside before that shows."""
    count = 1
    if decision in run.admitting:
        return 1
    while True:
        later = decision + count
        if run.seen.get(later) != run.seen[decision]:
            return None
        if later in run.changes or run.fields[later] != run.fields[decision]:
            return count
        count += 1


@pytest.mark.parametrize("block", range(10))
def test_the_horizon_is_as_far_as_decisions_are_the_same_and_no_farther(block):
    """Step by step, decisions are compared; a horizon that is always 1, or one too short or too long, fails."""
    exact = long = 0
    for seed in range(1000 + 40 * block, 1040 + 40 * block):
        rng = random.Random(seed)
        arrivals, values = arrivals_of(rng), settings_of(rng)
        run = Run(arrivals, values, leaps=False).serve()
        for decision, steps in run.horizons.items():
            count = repetitions(run, decision)
            if count is None:
                continue
            assert steps <= count, f"seed {seed}, decision {decision}: {steps} > {count}: {values}"
            if run.is_exact[decision]:
                exact += 1
                long += count > 5
                assert steps == count, f"seed {seed}, decision {decision}: {steps} < {count}: {values}"
    assert exact > 800 and long > 100, (exact, long)


def one_request(depth: int) -> tuple[Core, Batch]:
    """A Core that serves one long answer, and its latest decision, the first or second that decodes."""
    values = settings_of(random.Random(0)) | ROOM
    values |= {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 0, "depth": depth}
    core = build_core(values, CoreListener())
    core.ingest(Arrival(0, 0, 4, 50, 0, 0, "").sequence(), 0)
    core.decide(0)
    if depth:
        core.decide(0)
    core.commit(None, 1)
    batch = core.decide(1)
    assert horizon(core, batch, 20) == 20
    return core, batch


def second_decision(values: dict[str, Any], arrival: Arrival) -> tuple[Core, Batch]:
    """A Core that serves one request, whose first step has ended, and its decision behind that."""
    core = build_core(values, CoreListener())
    core.ingest(arrival.sequence(), 0)
    core.decide(0)
    core.commit(None, 1)
    return core, core.decide(1)


def test_there_is_no_horizon_while_the_next_step_can_be_decided():
    core, batch = one_request(depth=1)
    core.commit(None, 2)
    assert core.can_decide
    assert horizon(core, batch, 20) == 1


def test_there_is_no_horizon_while_a_request_is_to_be_aborted():
    core, batch = one_request(depth=0)
    core.abort(0, 2)
    assert horizon(core, batch, 20) == 1


def test_only_the_latest_decision_has_a_horizon():
    core, batch = one_request(depth=1)
    older = core.in_flight[0]
    assert older is not batch and not (older.admitted or older.preempted)
    assert horizon(core, older, 20) == 1


def test_there_is_no_horizon_once_somebody_has_come_whose_coming_cuts_chunks_otherwise():
    values = settings_of(random.Random(0)) | ROOM | {
        "max_num_seqs": 1, "composition": "mixed", "max_num_batched_tokens": 64, "depth": 0,
        "long_prefill_token_threshold": 2, "adaptive": True,
    }  # fmt: skip
    core, batch = second_decision(values, Arrival(0, 0, 640, 5, 0, 0, ""))
    assert (batch.lengths, horizon(core, batch, 20)) == ([64], 8)
    core.ingest(Arrival(1, 1, 640, 5, 0, 0, "").sequence(), 1)
    assert horizon(core, batch, 20) == 1
    core.commit(None, 2)
    assert core.decide(2).lengths == [32], "there is no place for it, and its share of the budget is left for it"


def test_there_is_no_horizon_once_so_many_wait_that_the_head_fits_with_what_it_gets_now():
    values = settings_of(random.Random(0)) | ROOM | {
        "block_size": 4, "num_blocks": 6, "max_num_seqs": 8, "composition": "mixed", "max_num_batched_tokens": 64,
        "depth": 0, "reserve": False, "watermark": 0, "long_prefill_token_threshold": 2, "binds_alone": False,
        "caches": False,
    }  # fmt: skip
    core, batch = second_decision(values, Arrival(0, 0, 6, 14, 0, 0, ""))
    assert (batch.lengths, horizon(core, batch, 9)) == ([1], 9), "alone it may compute as many tokens as it likes"
    core.ingest(Arrival(1, 1, 20, 2, 0, 0, "").sequence(), 1)
    assert horizon(core, batch, 9) == 1
    core.commit(None, 2)
    assert [row.num_tokens for row in core.decide(2).admitted] == [2], "for 20 there were too few blocks"


@pytest.mark.parametrize("leaps", [False, True])
def test_a_leap_with_somebody_waiting_leaves_an_interval_saturated(leaps):
    values = (
        settings_of(random.Random(0)) | ROOM | {"max_num_seqs": 1, "composition": "mixed", "interval": 2, "depth": 0}
    )
    core = build_core(values, CoreListener())
    core.ingest(Arrival(0, 0, 4, 50, 0, 0, "").sequence(), 0)
    for now_ns in range(3):
        core.decide(now_ns)
        core.commit(None, now_ns)
    batch, interval = core.decide(3), core.scheduler.rules.interval
    assert not (interval.is_held or interval.is_saturated)
    core.ingest(Arrival(1, 1, 4, 5, 0, 0, "").sequence(), 3)
    assert horizon(core, batch, 3) == 3, "there is no place for it"
    if leaps:
        advance(core, [(4, 4, 5), (5, 5, 6)])
    else:
        for now_ns in (4, 5):
            core.commit(None, now_ns)
            core.decide(now_ns)
    assert interval.is_saturated, "the next that is admitted need not wait for the interval"


@pytest.mark.parametrize("has_ids", [True, False])
@pytest.mark.parametrize(("num_prompt", "budget", "is_chunk"), [(4, 64, False), (40, 3, True)])
def test_there_is_no_horizon_where_any_token_may_stop_a_sequence(has_ids, num_prompt, budget, is_chunk):
    core = Core(
        Scheduler(
            BlockManager(None, 4), max_num_batched_tokens=budget, enable_chunked_prefill=True, composition="mixed"
        ),
        pipeline_depth=0,
    )
    params = SamplingParams(max_tokens=50)
    keys = {} if has_ids else {"num_prompt_tokens": num_prompt, "prefix_key": lambda length: length}
    core.ingest(Sequence(list(range(num_prompt)) if has_ids else None, params, seq_id=0, **keys), 0)
    first = core.decide(0)
    core.commit([7] * len(first.sampled) if has_ids else None, 1)
    batch = core.decide(1)
    assert bool(batch.chunks) is is_chunk and not batch.admitted
    assert (horizon(core, batch, 10) == 1) is has_ids
