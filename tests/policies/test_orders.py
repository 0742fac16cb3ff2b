"""Orders, victims, admission, salts: who is next, who gives way, who shares blocks with whom."""

import pytest

from twinserve.orders import CacheAware, Priority, ShortestJob
from twinserve.policies import (
    IS_COMPILED,
    BlockManager,
    FirstCome,
    LastAdmitted,
    PrefixCache,
    SamplingParams,
    Scheduler,
    Sequence,
    VllmAdmission,
)
from twinserve.settings.build_core import Settings
from twinserve.settings.vllm_versions import build_rules


def sequence(prompt: int, max_tokens: int = 4, *, seq_id: int, first: int | None = None, **labels) -> Sequence:
    first = 1000 * seq_id if first is None else first
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Sequence(list(range(first, first + prompt)), params, seq_id=seq_id, **labels)


def mixed(num_blocks: int = 64, budget: int = 64, max_num_seqs: int = 8, **settings) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, 4),
        max_num_seqs,
        composition="mixed",
        max_num_batched_tokens=budget,
        enable_chunked_prefill=True,
        **settings,
    )


def step(scheduler: Scheduler):
    batch = scheduler.schedule()
    if batch:
        scheduler.postprocess(batch, [5] * len(batch.sampled))
    scheduler.check_integrity()
    return batch


def admissions(scheduler: Scheduler) -> list[int]:
    """The ids of all that wait, in the order in which they are admitted, one at a time."""
    admitted = []
    while not scheduler.is_finished():
        admitted += [row.seq.seq_id for row in step(scheduler).admitted]
    return admitted


def one_at_a_time(order) -> Scheduler:
    return mixed(max_num_seqs=1, order=order, prefix_cache=PrefixCache())


def test_sequences_are_numbered_as_they_come_in_and_refused_ones_are_not():
    scheduler = mixed(num_blocks=4)
    seqs = [sequence(3, seq_id=7), sequence(90, seq_id=8), sequence(3, seq_id=9)]
    assert [scheduler.add(seq) for seq in seqs] == [True, False, True]
    assert [seq.arrival_index for seq in seqs] == [0, -1, 1]


def test_priority_admits_the_most_urgent_first_and_equals_as_they_came():
    scheduler = one_at_a_time(Priority())
    for seq_id, priority in enumerate([2, 0, 1, 0, -1]):
        scheduler.add(sequence(3, seq_id=seq_id, priority=priority))
    assert [seq.seq_id for seq in scheduler.waiting] == [4, 1, 3, 2, 0]
    assert admissions(scheduler) == [4, 1, 3, 2, 0]


def test_shortest_job_admits_the_fewest_known_tokens_first():
    scheduler = one_at_a_time(ShortestJob())
    for seq_id, prompt in enumerate([9, 3, 6, 3]):
        scheduler.add(sequence(prompt, seq_id=seq_id))
    assert admissions(scheduler) == [1, 3, 2, 0]


@pytest.mark.parametrize(
    ("order", "late"), [(Priority, {"priority": 0}), (ShortestJob, {"prompt": 2})], ids=["priority", "shortest"]
)
def test_with_ageing_later_arrivals_pass_a_sequence_a_bounded_number_of_times(order, late):
    """The first is 1 worse than the others, so `ageing` arrivals outweigh it."""
    passed = {}
    for ageing in (0, 3):
        scheduler = one_at_a_time(order(ageing=ageing))
        scheduler.add(sequence(3, seq_id=0, priority=1))
        for seq_id in range(1, 9):
            scheduler.add(sequence(late.get("prompt", 3), seq_id=seq_id, priority=late.get("priority", 1)))
        passed[ageing] = admissions(scheduler).index(0)
        assert scheduler.waiting.starvation_free == (ageing > 0)
    assert passed == {0: 8, 3: 2}, "an equal measure goes by arrival: two pass, the third does not"


def test_the_victim_of_priority_is_the_least_urgent_wherever_it_runs():
    scheduler = mixed(num_blocks=6, order=Priority())
    for seq_id, priority in enumerate([5, 0, 1]):
        scheduler.add(sequence(7, 9, seq_id=seq_id, priority=priority))
    preempted = []
    while not preempted:
        preempted = [seq.seq_id for seq in step(scheduler).preempted]
    assert preempted == [0], "it was admitted last, though it came first, but a later one would go by LastAdmitted too"
    assert [seq.seq_id for seq in scheduler.running] == [1, 2]


def test_a_victim_rule_of_ones_own_is_asked_instead_of_the_orders():
    chosen = []

    class Longest:
        def choose(self, running, seq):
            chosen.append(seq.seq_id)
            return max(running, key=lambda other: other.num_tokens)

    scheduler = mixed(num_blocks=6, victim=Longest())
    scheduler.add(sequence(11, 9, seq_id=0))
    scheduler.add(sequence(7, 9, seq_id=1))
    preempted = []
    while not preempted:
        preempted = [seq.seq_id for seq in step(scheduler).preempted]
    assert (preempted, chosen) == ([0], [1]), "the second needed room; the first, not the last, was chosen"


def test_a_victim_that_does_not_run_is_named():
    class Nobody:
        def choose(self, running, seq):
            return sequence(1, seq_id=99)

    scheduler = mixed(num_blocks=2, victim=Nobody())
    scheduler.add(sequence(4, 4, seq_id=0))
    scheduler.add(sequence(4, 4, seq_id=1))
    step(scheduler)
    with pytest.raises(ValueError, match="seq_id=99.* expected a running sequence"):
        step(scheduler)


def test_what_a_victim_got_in_the_same_step_returns_to_the_budget_and_leaves_no_block_behind():
    """Two chunks fill the pool; the one behind is more urgent and takes back what the one before it was given."""
    cache = PrefixCache()
    given = {"long_prefill_token_threshold": 12, "rules": build_rules("0.24")}
    scheduler = mixed(num_blocks=9, order=Priority(), prefix_cache=cache, **given)
    scheduler.add(sequence(28, 2, seq_id=0, priority=3))
    step(scheduler)
    scheduler.add(sequence(8, 9, seq_id=1, priority=0))
    step(scheduler)
    batch = step(scheduler)
    assert [seq.seq_id for seq in batch.preempted] == [0]
    assert [(row.seq.seq_id, row.num_tokens) for row in batch.rows] == [(1, 1)]
    assert (batch.num_tokens, batch.prompts, batch.chunks) == (1, [], [])
    assert [seq.seq_id for seq, _ in batch.grown] == [1]
    assert cache.lookup(list(range(28)), 4)[1] == 24, "its last block was scheduled in that step and never computed"


def test_cache_aware_admits_the_longest_hit_first_and_passes_nobody_over_more_than_its_patience():
    scheduler = one_at_a_time(CacheAware(window=4, patience=2))
    scheduler.add(sequence(17, 1, seq_id=0, first=0))
    assert admissions(scheduler) == [0]
    scheduler.add(sequence(9, 1, seq_id=1))
    for seq_id in range(2, 6):
        scheduler.add(sequence(17, 1, seq_id=seq_id, first=0))
    assert admissions(scheduler) == [2, 3, 1, 4, 5]


def test_cache_aware_looks_no_farther_than_its_window():
    scheduler = one_at_a_time(CacheAware(window=2))
    scheduler.add(sequence(17, 1, seq_id=0, first=0))
    assert admissions(scheduler) == [0]
    for seq_id in (1, 2):
        scheduler.add(sequence(9, 1, seq_id=seq_id))
    scheduler.add(sequence(17, 1, seq_id=3, first=0))
    assert admissions(scheduler) == [1, 3, 2]


@pytest.mark.parametrize("order", [FirstCome, Priority, ShortestJob, CacheAware])
def test_an_aborted_sequence_leaves_the_queue_wherever_it_stands(order):
    scheduler = one_at_a_time(order())
    seqs = [sequence(3, seq_id=seq_id) for seq_id in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    scheduler.abort(seqs[2])
    scheduler.abort(seqs[0])
    assert len(scheduler.waiting) == 2 == len(list(scheduler.waiting))
    assert admissions(scheduler) == [1, 3]


def test_at_most_so_many_running_sequences_have_prompt_tokens_left():
    scheduler = mixed(budget=64, long_prefill_token_threshold=4, max_num_partial_prefills=2)
    for seq_id, prompt in enumerate([12, 12, 12, 3]):
        scheduler.add(sequence(prompt, seq_id=seq_id))
    partial = []
    while not scheduler.is_finished():
        step(scheduler)
        partial.append(sum(not seq.has_sampled for seq in scheduler.running))
        if len(partial) == 1:
            assert [seq.seq_id for seq in scheduler.running] == [0, 1], "a third would be partial; nobody overtakes"
    assert max(partial) == 2


def test_a_prompt_that_ends_in_this_step_is_not_partial():
    scheduler = mixed(budget=64, long_prefill_token_threshold=4, max_num_partial_prefills=1)
    scheduler.add(sequence(12, seq_id=0))
    scheduler.add(sequence(3, seq_id=1))
    assert [row.seq.seq_id for row in step(scheduler).rows] == [0, 1]


def test_a_decode_that_was_admitted_later_is_behind_a_prompt_in_the_running_order_and_gets_its_blocks_after_it():
    """The short prompt decodes before the long one does; order is that of admission."""
    scheduler = mixed(budget=64, long_prefill_token_threshold=4)
    scheduler.add(sequence(12, 9, seq_id=0))
    scheduler.add(sequence(3, 9, seq_id=1))
    orders = []
    while not scheduler.is_finished():
        batch = step(scheduler)
        orders.append([row.seq.seq_id for row in batch.rows])
        if len(batch.grown) == 2:
            assert [seq.seq_id for seq, _ in batch.grown] == [0, 1]
            assert batch.grown[0][1] < batch.grown[1][1]
    assert orders[:4] == [[0, 1]] * 4


def test_sequences_of_different_salts_never_share_blocks():
    scheduler = mixed(prefix_cache=PrefixCache())
    for seq_id, salt in enumerate(["", "a", "b", "a", ""]):
        scheduler.add(sequence(9, 1, seq_id=seq_id, first=0, salt=salt))
    hits = {row.seq.seq_id: row.start for row in step(scheduler).admitted}
    assert hits == {0: 0, 1: 0, 2: 0, 3: 8, 4: 8}


def test_salts_keep_sequences_apart_whatever_the_hash_and_without_token_ids():
    for cache, token_ids in ((PrefixCache(hash=lambda data, seed: 1), list(range(9))), (PrefixCache(), None)):
        scheduler = mixed(prefix_cache=cache)
        for seq_id, salt in enumerate(["a", "b", "a"]):
            key = None if token_ids else lambda num_tokens: num_tokens
            params = SamplingParams(max_tokens=1)
            scheduler.add(Sequence(token_ids, params, seq_id=seq_id, num_prompt_tokens=9, prefix_key=key, salt=salt))
        batch = scheduler.schedule()
        assert [row.start for row in batch.admitted] == [0, 0, 8]
        scheduler.check_integrity()


@pytest.mark.skipif(IS_COMPILED, reason="a method of a compiled class cannot be replaced to count its calls")
def test_a_refused_head_is_not_looked_up_again_until_something_might_let_it_in():
    scheduler = mixed(num_blocks=8, prefix_cache=PrefixCache(), admission=VllmAdmission())
    scheduler.add(sequence(20, 6, seq_id=0))
    step(scheduler)
    scheduler.add(sequence(20, 6, seq_id=1))
    lookups = []
    find_hits = scheduler.block_manager.find_hits
    scheduler.block_manager.find_hits = lambda seq: (lookups.append(seq.seq_id), find_hits(seq))[1]  # type: ignore
    while len(scheduler.running) and scheduler.running[0].seq_id == 0:
        step(scheduler)
    assert lookups == [1]
    step(scheduler)
    assert lookups == [1, 1], "blocks were freed"


@pytest.mark.parametrize(
    ("policy", "order"),
    [("fcfs", FirstCome), ("priority", Priority), ("shortest", ShortestJob), ("cache-aware", CacheAware)],
)
def test_settings_name_the_order(policy, order):
    core = Settings.load({"scheduling_policy": policy}).build_core()
    assert type(core.scheduler.waiting) is order
    assert isinstance(core.scheduler.waiting.victim, LastAdmitted) == (policy != "priority")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Priority(ageing=-1), "ageing is -1"),
        (lambda: CacheAware(window=0), "window is 0"),
        (lambda: CacheAware(patience=0), "patience is 0"),
        (lambda: VllmAdmission(watermark_blocks=-1), "watermark_blocks is -1"),
        (lambda: mixed(max_num_partial_prefills=0), "max_num_partial_prefills is 0"),
        (lambda: Settings.load({"scheduling_ageing": 2}), "scheduling_ageing is 2"),
    ],
)
def test_values_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("watermark", "num_blocks", "blocks"), [(0.019, 100, 1), (0.5, 3, 1), (0.01, 99, 0), (0.1, 50, 5)]
)
def test_a_watermark_is_whole_blocks_never_more_than_its_share(watermark, num_blocks, blocks):
    core = Settings(watermark=watermark, num_gpu_blocks=num_blocks).build_core()
    assert core.scheduler.admission.watermark_blocks == blocks
