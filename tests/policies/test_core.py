"""Core: the order of calls, and deciding one step ahead of the results."""

import random

import pytest

from twinserve.policies import BlockManager, Core, PrefixCache, SamplingParams, Scheduler, Sequence
from twinserve.traces.runs.digest import Digest

EOS = 0


def core(depth: int = 0, *, num_blocks: int = 64, budget: int = 32, composition: str = "mixed", listener=None) -> Core:
    scheduler = Scheduler(
        BlockManager(num_blocks, 4),
        8,
        composition=composition,
        max_num_batched_tokens=budget,
        enable_chunked_prefill=True,
        prefix_cache=PrefixCache(),
    )
    return Core(scheduler, pipeline_depth=depth, eos_token_id=EOS, listener=listener)


def sequence(prompt: int, max_tokens: int, *, seq_id: int, first: int = 1) -> Sequence:
    return Sequence(list(range(first, first + prompt)), SamplingParams(max_tokens=max_tokens), seq_id=seq_id)


def test_a_decision_beyond_the_pipeline_depth_raises():
    for depth in (0, 1):
        one = core(depth)
        one.ingest(sequence(4, 9, seq_id=0), 0)
        for _ in range(depth + 1):
            one.decide(0)
        with pytest.raises(RuntimeError, match=f"pipeline_depth is {depth}"):
            one.decide(0)


def test_commit_without_a_batch_in_flight_raises():
    with pytest.raises(RuntimeError, match="without a batch"):
        core().commit([], 0)


def test_one_step_ahead_a_sequence_decodes_on_without_its_last_token():
    one = core(1)
    one.ingest(sequence(4, 3, seq_id=0), 0)
    first, second = one.decide(0), one.decide(0)
    assert [(row.start, row.num_tokens, row.samples) for row in second.rows] == [(4, 1, True)]
    assert one.commit([11], 1) == []
    third = one.decide(1)
    assert [row.start for row in third.rows] == [5]
    one.commit([12], 2)
    fourth = one.decide(2)
    assert not fourth, "its last token is in flight, so there is nothing to compute"
    assert [seq.completion_token_ids for seq in one.commit([13], 3)] == [[11, 12, 13]]
    one.commit([], 3)
    assert one.is_idle
    assert first.decision == 0 and fourth.decision == 3


def test_one_step_ahead_a_stop_is_found_late_and_the_row_after_it_is_discarded():
    one = core(1)
    one.ingest(sequence(4, 9, seq_id=0), 0)
    one.decide(0)
    one.decide(0)
    (stopped,) = one.commit([EOS], 1)
    assert (stopped.finish_reason, stopped.completion_token_ids) == ("stop", [EOS])
    assert one.must_commit
    assert one.commit([99], 2) == []
    assert stopped.completion_token_ids == [EOS]
    assert one.is_idle
    assert len(one.scheduler.block_manager.free_block_ids) == 64


def test_one_step_ahead_blocks_are_hashed_to_known_tokens_only():
    one = core(1)
    one.ingest(sequence(7, 9, seq_id=0), 0)
    cache = one.scheduler.block_manager.prefix_cache
    one.decide(0)
    one.decide(0)
    assert len(cache) == 1, "the second block is filled by a token in flight"
    one.commit([50], 1)
    one.decide(1)
    assert len(cache) == 2
    assert cache.lookup([*range(1, 8), 50], 4)[1] == 8
    one.scheduler.check_integrity()


def test_one_step_ahead_a_preempted_sequence_gets_its_token_in_flight_before_it_comes_back():
    one = core(1, num_blocks=4, budget=64)
    for i in range(2):
        one.ingest(sequence(7, 8, seq_id=i, first=1 + 100 * i), 0)
    seen_in_flight = False
    steps = 0
    while not one.is_idle:
        if one.can_decide:
            batch = one.decide(steps)
            for seq in batch.preempted:
                seen_in_flight |= seq.num_in_flight > 0
            for row in batch.admitted:
                assert row.seq.num_in_flight == int(row.samples), "nothing was in flight when it was admitted"
            one.scheduler.check_integrity()
        if one.must_commit:
            sampled = one.in_flight[0].sampled
            one.commit([1000 + seq.num_completion_tokens for seq in sampled], steps)
        steps += 1
    assert seen_in_flight


def test_an_abort_takes_effect_at_the_next_decision_and_its_token_in_flight_is_discarded():
    one = core(1)
    one.ingest(sequence(4, 9, seq_id=0), 0)
    one.ingest(sequence(4, 9, seq_id=1, first=50), 0)
    one.decide(0)
    assert one.abort(0, 5)
    batch = one.decide(7)
    assert [seq.seq_id for seq in batch.aborted] == [0]
    aborted = batch.aborted[0]
    assert (aborted.finish_reason, aborted.finish_ns) == ("abort", 5)
    one.commit([1, 2], 8)
    assert aborted.completion_token_ids == []
    assert not one.abort(0, 9), "it is not being served any more"
    one.scheduler.check_integrity()


def test_an_abort_of_a_request_that_ends_by_itself_before_the_next_decision_changes_nothing():
    one = core()
    one.ingest(sequence(4, 1, seq_id=0), 0)
    one.decide(0)
    one.abort(0, 1)
    (finished,) = one.commit([9], 2)
    assert finished.finish_reason == "length"
    one.ingest(sequence(4, 1, seq_id=0, first=30), 3)
    assert one.decide(3).aborted == [], "the abort meant the request before"


def test_a_refused_request_is_told_and_not_served():
    one = core(num_blocks=2)
    seq = sequence(30, 4, seq_id=0)
    assert not one.ingest(seq, 3)
    assert (seq.finish_reason, seq.finish_ns, one.is_idle, one.num_ingested) == ("refused", 3, True, 1)


def test_two_sequences_with_one_id_are_refused():
    one = core()
    one.ingest(sequence(4, 4, seq_id=0), 0)
    with pytest.raises(ValueError, match="id 0 is being served"):
        one.ingest(sequence(4, 4, seq_id=0), 0)


def random_run(seed: int, depth: int, composition: str) -> list[int]:
    """Digests of a run with random arrivals, tokens, stops and aborts; integrity holds at every step."""
    rng = random.Random(seed)
    one = core(
        depth,
        num_blocks=rng.choice([6, 12, 40]),
        budget=rng.choice([8, 20, 64]),
        composition=composition,
    )
    left, digests, digest, now = 24, [], Digest(), 0
    while left or not one.is_idle:
        while left and rng.random() < 0.5:
            left -= 1
            first = rng.choice([1, 1, 1, 200, 300])
            one.ingest(sequence(rng.randint(1, 14), rng.randint(1, 9), seq_id=left, first=first), now)
        if one.sequences and rng.random() < 0.05:
            one.abort(rng.choice(sorted(one.sequences)), now)
        if one.can_decide:
            batch = one.decide(now)
            digests.append(digest.of(batch))
            assert batch.num_tokens <= one.scheduler.max_num_batched_tokens
            one.scheduler.check_integrity()
        if one.must_commit:
            one.commit([rng.choice([EOS, *range(400, 420)]) for _ in one.in_flight[0].sampled], now)
            one.scheduler.check_integrity()
        now += 1
    assert len(one.scheduler.block_manager.free_block_ids) == one.scheduler.block_manager.num_blocks
    return digests


@pytest.mark.parametrize("composition", ["mixed", "prefill-first"])
@pytest.mark.parametrize("depth", [0, 1])
def test_random_runs_keep_the_pool_whole_and_are_the_same_twice(depth, composition):
    for seed in range(60):
        digests = random_run(seed, depth, composition)
        assert digests == random_run(seed, depth, composition)
        assert len(set(digests)) == len(digests), "the digest is a chain: no two decisions share one"


def test_a_first_token_comes_once_however_often_a_sequence_is_preempted():
    one = core(num_blocks=5)
    for seq_id in (0, 1):
        one.ingest(sequence(6, 9, seq_id=seq_id, first=1 + 50 * seq_id), 0)
    later = one.sequences[1]
    now, firsts = 0, []
    while not one.is_idle:
        batch = one.decide(now)
        now += 1
        one.commit([77] * batch.num_sampled, now)
        firsts.append(later.first_token_ns)
    assert later.num_preemptions
    assert set(firsts) == {1}
