"""The rules that differ between versions of vLLM, each by itself: what it does, and that it can be mixed."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from twinserve.orders import LeastUrgent, Priority
from twinserve.policies import (
    Batch,
    BlockManager,
    Core,
    PrefixCache,
    SamplingParams,
    Scheduler,
    Sequence,
    VllmAdmission,
)
from twinserve.policies.vllm_rules import (
    LongPrefillThreshold,
    PrefillInterval,
    VllmRules,
)
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.settings.vllm_versions import CHANGED, NEWEST, VERSIONS, build_rules, nearest_version


def scheduler(num_blocks: int | None = None, block_size: int = 4, **given) -> Scheduler:
    """One that serves mixed batches of 64 tokens, first come first served; the least urgent makes room."""
    usual = {"composition": "mixed", "max_num_batched_tokens": 64, "enable_chunked_prefill": True}
    usual |= {"admission": VllmAdmission(reserve_full_prompt=False), "victim": LeastUrgent(Priority())}
    return Scheduler(BlockManager(num_blocks, block_size), 8, **usual | given)


def rules(
    *,
    ends_pass: bool = False,
    skips: bool = False,
    binds_alone: bool = False,
    adaptive: bool = False,
    interval: int = 1,
) -> VllmRules:
    return VllmRules(
        PrefillInterval(interval),
        self_preemption_ends_pass=ends_pass,
        victim_before_skips=skips,
        threshold=LongPrefillThreshold(binds_alone=binds_alone, adaptive=adaptive),
    )


def request(key: int, num_prompt: int, max_tokens: int = 10, priority: int = 0) -> Sequence:
    """A request whose tokens are no other's."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Sequence([100 * key + 1 + i for i in range(num_prompt)], params, seq_id=key, priority=priority)


def step(one: Scheduler) -> Batch:
    """A decision and its result."""
    batch = one.schedule()
    if batch:
        one.postprocess(batch, [7] * batch.num_sampled)
    return batch


def given(batch: Batch) -> dict[int, int]:
    """Tokens by request."""
    return {row.seq.seq_id: row.num_tokens for row in batch.rows}


# --- a sequence that has to make room by going itself ---


@pytest.mark.parametrize(("ends_pass", "served"), [(True, {0: 1}), (False, {0: 1, 2: 1})])
def test_those_behind_one_that_had_to_go_itself_are_served_unless_it_ends_the_pass(ends_pass, served):
    """Request 1 needs a block for its next token and is the least urgent; 0 and 2 need none."""
    one = scheduler(8, rules=rules(ends_pass=ends_pass))
    for seq in (request(0, 6), request(1, 12, priority=9), request(2, 9)):
        assert one.add(seq)
    assert given(step(one)) == {0: 6, 1: 12, 2: 9} and one.block_manager.num_free_blocks == 0
    batch = step(one)
    assert [seq.seq_id for seq in batch.preempted] == [1] and given(batch) == served


# --- a victim that stood before the sequence that needed room ---


@pytest.mark.parametrize(("skips", "served"), [(True, {1: 1, 3: 1}), (False, {1: 1, 2: 1, 3: 1})])
def test_a_victim_that_stood_before_and_had_got_nothing_costs_the_next_its_turn_where_that_is_the_rule(skips, served):
    """Request 0, the least urgent, is held as it is in its prompt; request 1 needs its block."""
    one = scheduler(4, rules=rules(skips=skips, interval=9), long_prefill_token_threshold=4)
    for seq in (request(0, 12, 4, priority=9), request(1, 4), request(2, 3), request(3, 3)):
        assert one.add(seq)
    assert given(step(one)) == {0: 4, 1: 4, 2: 3, 3: 3} and one.block_manager.num_free_blocks == 0
    batch = step(one)
    assert [seq.seq_id for seq in batch.preempted] == [0] and given(batch) == served


@pytest.mark.parametrize("skips", [True, False])
def test_a_victim_that_had_got_tokens_in_the_step_costs_nobody_a_turn(skips):
    one = scheduler(4, rules=rules(skips=skips))
    for seq in (request(0, 3, 4, priority=9), request(1, 4), request(2, 3), request(3, 3)):
        assert one.add(seq)
    assert given(step(one)) == {0: 3, 1: 4, 2: 3, 3: 3}
    batch = step(one)
    assert [seq.seq_id for seq in batch.preempted] == [0] and given(batch) == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("skips", [True, False])
def test_a_victim_that_stood_behind_costs_nobody_a_turn(skips):
    one = scheduler(4, rules=rules(skips=skips, interval=9), long_prefill_token_threshold=4)
    for seq in (request(0, 4), request(1, 12, 4, priority=9), request(2, 3), request(3, 3)):
        assert one.add(seq)
    assert given(step(one)) == {0: 4, 1: 4, 2: 3, 3: 3}
    batch = step(one)
    assert [seq.seq_id for seq in batch.preempted] == [1] and given(batch) == {0: 1, 2: 1, 3: 1}


# --- the threshold ---


def test_the_threshold_does_not_bind_a_request_that_is_alone():
    one = scheduler(long_prefill_token_threshold=5)
    one.add(request(0, 40))
    assert given(step(one)) == {0: 40}


def test_the_threshold_of_the_older_version_binds_a_request_that_is_alone():
    one = scheduler(long_prefill_token_threshold=5, rules=rules(binds_alone=True))
    one.add(request(0, 40))
    assert given(step(one)) == {0: 5}


def test_one_that_waits_counts_where_the_threshold_asks_whether_a_request_is_alone():
    one = Scheduler(
        BlockManager(None, 4), 1, composition="mixed", enable_chunked_prefill=True, long_prefill_token_threshold=5
    )
    one.add(request(0, 40))
    one.add(request(1, 40))
    assert given(step(one)) == {0: 5}
    one.abort(one.waiting.peek())
    assert given(step(one)) == {0: 35}


@pytest.mark.parametrize(("num_requests", "most"), [(2, 32), (4, 16), (7, 9), (8, 8), (16, 8)])
def test_an_adaptive_threshold_is_no_less_than_the_budgets_share_of_each(num_requests, most):
    one = scheduler(long_prefill_token_threshold=8, rules=rules(adaptive=True))
    for key in range(num_requests):
        one.add(request(key, 40))
    assert given(step(one))[0] == most


def test_an_adaptive_threshold_of_zero_stays_none():
    one = scheduler(rules=rules(adaptive=True))
    one.add(request(0, 40))
    one.add(request(1, 40))
    assert given(step(one)) == {0: 40, 1: 24}


def test_a_head_that_did_not_fit_is_looked_at_again_when_the_threshold_has_changed():
    """Nobody was admitted or has left, but with more who wait each may get fewer tokens."""
    one = scheduler(12, long_prefill_token_threshold=8, rules=rules(adaptive=True))
    one.add(request(0, 26, 5))
    step(one)
    one.add(request(1, 40, 5))
    assert given(step(one)) == {0: 1} and one.block_manager.num_free_blocks == 5, "of 8 blocks for 32 tokens"
    for key in range(2, 8):
        one.add(request(key, 40, 5))
    assert given(step(one)) == {0: 1, 1: 8, 2: 8}


# --- the interval ---


def test_between_two_steps_with_prompt_work_there_are_decodes_alone():
    one = scheduler(long_prefill_token_threshold=4, rules=rules(interval=3))
    one.add(request(0, 4))
    one.add(request(1, 12))
    tokens = [given(step(one)) for _ in range(8)]
    assert tokens == [{0: 4, 1: 4}, {0: 1}, {0: 1}, {0: 1, 1: 4}, {0: 1}, {0: 1}, {0: 1, 1: 4}, {0: 1, 1: 1}]


def test_an_admission_is_held_like_a_running_prompt():
    one = scheduler(rules=rules(interval=3))
    one.add(request(0, 4))
    assert given(step(one)) == {0: 4}
    one.add(request(1, 6))
    assert [given(step(one)) for _ in range(3)] == [{0: 1}, {0: 1}, {0: 1, 1: 6}]


def test_an_admission_with_one_token_left_is_not_held_and_does_not_begin_the_interval_again():
    one = scheduler(rules=rules(interval=4), prefix_cache=PrefixCache())
    one.add(request(0, 9))
    assert given(step(one)) == {0: 9}
    twin = Sequence([1 + i for i in range(9)], SamplingParams(max_tokens=50, ignore_eos=True), seq_id=1)
    one.add(twin)
    assert given(step(one)) == {0: 1, 1: 1}
    one.add(request(2, 6))
    assert [given(step(one)) for _ in range(3)] == [{0: 1, 1: 1}, {0: 1, 1: 1}, {0: 1, 1: 1, 2: 6}]


def test_a_prompt_that_got_tokens_and_was_preempted_in_the_same_step_begins_the_interval_again():
    one = scheduler(3, long_prefill_token_threshold=4, rules=rules(interval=2))
    one.add(request(0, 12, 1, priority=9))
    one.add(request(1, 3))
    assert [given(step(one)) for _ in range(2)] == [{0: 4, 1: 3}, {1: 1}]
    batch = step(one)
    assert [seq.seq_id for seq in batch.preempted] == [0] and given(batch) == {1: 1}
    assert one.rules.interval.num_since == 0
    assert (given(step(one)), one.rules.interval.num_since) == ({1: 1}, 1), "0 is held though it waits"


def test_whether_the_queue_drains_is_not_judged_in_a_step_that_preempts():
    one = scheduler(3, long_prefill_token_threshold=4, rules=rules(interval=2))
    one.add(request(0, 12, 1, priority=9))
    one.add(request(1, 3))
    batches = [step(one) for _ in range(3)]
    assert batches[-1].preempted and len(one.waiting) == 1 and not one.rules.interval.is_saturated


def test_a_step_without_tokens_does_not_count_in_the_interval():
    core = Core(scheduler(rules=rules(interval=3)), pipeline_depth=1)
    core.ingest(request(0, 4, 2), 0)
    for _ in range(2):
        core.decide(0)
        if len(core.in_flight) > 1:
            core.commit([7], 0)
    since = core.scheduler.rules.interval.num_since
    assert not core.decide(0) and core.scheduler.rules.interval.num_since == since, "its last token is in flight"


def test_nothing_is_held_while_nothing_decodes():
    one = scheduler(long_prefill_token_threshold=4, rules=rules(interval=5, binds_alone=True))
    one.add(request(0, 12))
    assert [given(step(one)) for _ in range(3)] == [{0: 4}] * 3


def test_a_queue_that_does_not_drain_ends_the_holding():
    one = scheduler(max_num_batched_tokens=8, rules=rules(interval=5))
    for key in range(4):
        one.add(request(key, 8))
    assert [given(step(one)) for _ in range(3)] == [{0: 8}, {0: 1, 1: 7}, {0: 1, 1: 1, 2: 6}]


def test_a_head_that_was_held_is_admitted_when_the_interval_is_over_though_nothing_else_has_changed():
    one = scheduler(rules=rules(interval=4), prefix_cache=PrefixCache())
    one.add(request(0, 5))
    step(one)
    one.add(request(1, 6))
    tokens = [given(step(one)) for _ in range(4)]
    assert tokens == [{0: 1}, {0: 1}, {0: 1}, {0: 1, 1: 6}]


# --- which version ---


def test_the_default_is_the_newest_version_held():
    assert Settings().vllm_version == NEWEST == "0.33" == list(VERSIONS)[-1]


def values_of(settings: Settings) -> tuple[bool, bool, bool, bool, int]:
    own = settings.build_rules()
    threshold = own.threshold
    return (
        own.self_preemption_ends_pass,
        own.victim_before_skips,
        threshold.binds_alone,
        threshold.adaptive,
        own.interval.steps,
    )


def test_settings_build_the_rules_of_their_version_and_each_can_be_set_by_itself():
    assert values_of(Settings()) == (False, False, False, False, 1)
    assert values_of(Settings(vllm_version="0.24")) == (True, True, True, False, 1)
    for index, rule in enumerate(CHANGED):
        for version, others in (("0.24", True), ("0.33", False)):
            mixed = Settings.load({"vllm_version": version, rule.setting: not others})
            expected = [others] * 3
            expected[index] = not others
            assert values_of(mixed)[:3] == tuple(expected)
    own = Settings(vllm_version="0.24", long_prefill_token_threshold_adaptive=True, prefill_schedule_interval=4)
    assert values_of(own) == (True, True, True, True, 4)


def test_rules_are_built_anew_for_each_core_as_an_interval_counts():
    settings = Settings(prefill_schedule_interval=3)
    assert settings.build_rules().interval is not settings.build_rules().interval


def test_max_num_active_seqs_bounds_the_running_requests_in_place_of_max_num_seqs():
    assert Settings(max_num_seqs=9, max_num_active_seqs=3).build_core().scheduler.max_num_seqs == 3
    assert Settings(max_num_seqs=9).build_core().scheduler.max_num_seqs == 9
    with pytest.raises(InputError, match="max_num_active_seqs is 10, expected at most max_num_seqs"):
        Settings.load({"max_num_seqs": 9, "max_num_active_seqs": 10})


def test_a_version_that_is_not_held_is_refused():
    with pytest.raises(ValidationError, match="0.24"):
        Settings(vllm_version="0.30")


@pytest.mark.parametrize(
    ("version", "nearest"),
    [
        ("0.24.0", "0.24"),
        ("0.24.1", "0.24"),
        ("0.32.9", "0.24"),
        ("0.33.0", "0.33"),
        ("1.0", "0.33"),
        ("0.9.2", "0.24"),
    ],
)
def test_a_log_of_another_version_is_decided_by_the_newest_rules_held_that_are_no_newer(version, nearest):
    assert nearest_version(version) == nearest


def test_each_changed_rule_says_since_when():
    assert [(rule.since, rule.date) for rule in CHANGED] == [("0.33", "2026-11-01")] * 3
    assert len({rule.setting for rule in CHANGED}) == len(CHANGED) and build_rules("0.24").self_preemption_ends_pass


# --- a pipeline of ranks ---


def test_in_a_pipeline_of_two_ranks_a_sequence_that_samples_rests_in_the_next_step():
    core = Core(scheduler(pipeline_parallel_size=2), pipeline_depth=2)
    core.ingest(request(0, 4, 3), 0)
    core.ingest(request(1, 60, 3), 0)
    batches = [given(core.decide(0)) for _ in range(3)]
    assert batches == [{0: 4, 1: 60}, {}, {0: 1, 1: 1}]


# --- a rule of one's own ---


def test_a_rule_of_ones_own_is_an_ordinary_class():
    class Half(LongPrefillThreshold):
        def in_force(self, threshold, num_requests, budget):
            return budget // 2

    one = scheduler(rules=VllmRules(PrefillInterval(), threshold=Half()))
    one.add(request(0, 50))
    assert given(step(one)) == {0: 32}
