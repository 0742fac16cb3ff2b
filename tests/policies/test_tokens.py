"""Tokens: every sequence gets those that were sampled for it, whoever joins, leaves or is preempted meanwhile."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence as Seq

import pytest

from twinserve.policies import BlockManager, Core, PrefixCache, SamplingParams, Scheduler, Sequence
from twinserve.traces.runs.digest import Digest

EOS = 0


def build_core(rng: random.Random, depth: int, compositions: Seq[str] = ("mixed", "prefill-first")) -> Core:
    scheduler = Scheduler(
        BlockManager(rng.choice([40, 400]), rng.choice([1, 2, 4, 8])),
        rng.choice([4, 100]),
        composition=rng.choice(compositions),
        max_num_batched_tokens=rng.choice([8, 200]),
        enable_chunked_prefill=True,
        long_prefill_token_threshold=rng.choice([0, 3]),
        prefix_cache=PrefixCache() if rng.random() < 0.8 else None,
    )
    return Core(scheduler, pipeline_depth=depth, eos_token_id=EOS)


def any_sequence(rng: random.Random, number: int) -> Sequence:
    params = SamplingParams(
        max_tokens=rng.randint(1, 40), ignore_eos=rng.random() < 0.5, stop_token_ids=(5,) * (number % 3 == 0)
    )
    return Sequence([1000 * number + k for k in range(rng.randint(1, 12))], params, seq_id=number)


def token_array(tokens: list[int]) -> array[int]:
    return array("I", tokens)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("hand_over", [list, token_array], ids=["list", "array"])
def test_every_sequence_has_the_tokens_that_were_sampled_for_it(depth, hand_over):
    preemptions = 0
    for seed in range(40):
        rng = random.Random(seed)
        core = build_core(rng, depth)
        expected: dict[Sequence, list[int]] = {}
        left = rng.randint(10, 60)
        while left or not core.is_idle:
            while left and rng.random() < 0.6:
                left -= 1
                seq = any_sequence(rng, left)
                expected[seq] = list(seq.token_ids)
                core.ingest(seq, 0)
            if core.sequences and rng.random() < 0.05:
                core.abort(rng.choice(sorted(core.sequences)), 0)
            if core.can_decide:
                preemptions += len(core.decide(0).preempted)
            if core.must_commit:
                sampled = core.in_flight[0].sampled
                tokens = [rng.choice([EOS, 5, *range(100, 200)]) for _ in sampled]
                for seq, token_id in zip(sampled, tokens, strict=True):
                    if not seq.is_finished:
                        expected[seq].append(token_id)
                core.commit(hand_over(tokens), 0)
        for seq, tokens in expected.items():
            assert seq.token_ids == tokens and seq.num_tokens == len(tokens), f"seed {seed}: {seq}"
            assert seq.completion_token_ids == tokens[seq.num_prompt_tokens :], f"seed {seed}: {seq}"
    assert preemptions > 10


@pytest.mark.parametrize("ahead", [2, 4])
def test_tokens_find_their_sequences_however_many_batches_are_in_flight(ahead):
    """Decodes that the budget does not always reach are left out of some of the batches in flight."""
    for seed in range(40):
        rng = random.Random(seed)
        scheduler = build_core(rng, 1, ["mixed"]).scheduler
        expected: dict[Sequence, list[int]] = {}
        for number in range(25):
            seq = any_sequence(rng, number)
            expected[seq] = list(seq.token_ids)
            assert scheduler.add(seq) or seq.refusal
        idle = 0
        while not scheduler.is_finished():
            if len(scheduler.in_flight) <= ahead and rng.random() < 0.6:
                idle = 0 if scheduler.schedule() else idle + 1
                assert idle < 100, f"seed {seed}: nothing is scheduled"
            elif scheduler.in_flight:
                batch = scheduler.in_flight[0]
                tokens = [rng.randrange(100, 1 << 20) for _ in batch.sampled]
                for seq, token_id in zip(batch.sampled, tokens, strict=True):
                    if not seq.is_finished:
                        expected[seq].append(token_id)
                scheduler.postprocess(batch, tokens, EOS)
        for seq, tokens in expected.items():
            assert seq.token_ids == tokens, f"seed {seed}: {seq}"


@pytest.mark.parametrize("depth", [0, 1])
def test_two_deciders_with_the_same_calls_stay_equal(depth):
    """One is given its tokens as lists, the other as arrays; rows are read at once of one, and late of the other."""
    for seed in range(20):
        rng = random.Random(seed)
        cores = build_core(random.Random(seed), depth), build_core(random.Random(seed), depth)
        digests = Digest(), Digest()
        rows, late = [], []
        left = 40
        while left or not cores[0].is_idle:
            if left:
                left -= 1
                for core in cores:
                    core.ingest(any_sequence(random.Random(100 * seed + left), left), 0)
            if cores[0].can_decide:
                batches = [core.decide(0) for core in cores]
                assert digests[0].of(batches[0]) == digests[1].of(batches[1]), f"seed {seed}: {batches[0].decision}"
                rows.append([(row.seq.seq_id, *row[1:]) for row in batches[0].rows])
                late.append(batches[1])
            if cores[0].must_commit:
                tokens = [rng.choice([EOS, 5, *range(100, 200)]) for _ in cores[0].in_flight[0].sampled]
                ended = [core.commit(kind(tokens), 0) for core, kind in zip(cores, (list, token_array), strict=True)]
                assert [seq.token_ids for seq in ended[0]] == [seq.token_ids for seq in ended[1]], f"seed {seed}"
        assert cores[1].is_idle
        assert [[(row.seq.seq_id, *row[1:]) for row in batch.rows] for batch in late] == rows, f"seed {seed}"


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([-1], "tokens are .-1., expected integers of 4 bytes"),
        ([1 << 32], "expected integers of 4 bytes"),
        ([1, 2], "2 tokens for a batch that samples 1"),
        ([], "0 tokens for a batch that samples 1"),
        (None, "token_ids is None, expected a token for each sequence"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_before_anything_changes(tokens, words):
    core = build_core(random.Random(1), 0)
    core.ingest(Sequence([1, 2], SamplingParams(max_tokens=9), seq_id=0), 0)
    core.decide(0)
    core.commit([7], 0)
    batch = core.decide(0)
    with pytest.raises(ValueError, match=words):
        core.commit(tokens, 0)
    assert core.in_flight[0] is batch and core.sequences[0].num_in_flight == 1
    core.commit([9], 0)
    assert core.sequences[0].completion_token_ids == [7, 9]
