"""The group of decodes: its members' tokens and rows are theirs, whoever joins, leaves or is moved meanwhile."""

from __future__ import annotations

import random
from array import array
from collections import defaultdict
from collections.abc import Sequence as Seq

import pytest

from twinserve.policies import BlockManager, Core, PrefixCache, SamplingParams, Scheduler, Sequence, decode_group
from twinserve.policies.decode_group import DecodeGroup
from twinserve.policies.sequence import token_bytes

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


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("reads", [0.0, 0.2], ids=["unread", "read"])
def test_every_sequence_has_the_tokens_that_were_sampled_for_it(depth, reads, monkeypatch):
    """What is read in between changes nothing; `unread` sequences are first asked for their tokens at their end.

    In half of the runs, the tokens of a few steps are as many as are kept in one place.
    """
    for seed in range(40):
        rng = random.Random(seed)
        monkeypatch.setattr(decode_group, "_MOST_TOKENS", (1 << 20) if seed % 2 else 16)
        core = build_core(rng, depth)
        expected: dict[Sequence, list[int]] = {}
        number = 0
        left = rng.randint(10, 150)
        while left or not core.is_idle:
            while left and rng.random() < 0.6:
                left, number = left - 1, number + 1
                params = SamplingParams(
                    max_tokens=rng.randint(1, 40),
                    ignore_eos=rng.random() < 0.5,
                    stop_token_ids=(5,) * (number % 3 == 0),
                )
                seq = Sequence([1000 * number + k for k in range(rng.randint(1, 12))], params, seq_id=number)
                expected[seq] = list(seq.token_ids)
                core.ingest(seq, 0)
            if core.sequences and rng.random() < 0.05:
                core.abort(rng.choice(sorted(core.sequences)), 0)
            if core.can_decide:
                core.decide(0)
            if core.must_commit:
                sampled = core.in_flight[0].sampled
                tokens = [rng.choice([EOS, 5, *range(100, 200)]) for _ in sampled]
                for seq, token_id in zip(sampled, tokens, strict=True):
                    if not seq.is_finished:
                        expected[seq].append(token_id)
                core.commit(array("I", tokens) if rng.random() < 0.5 else tokens, 0)
                core.scheduler.check_integrity()
            for seq in core.scheduler.running:
                if rng.random() < reads:
                    assert seq.token_ids == expected[seq], f"seed {seed}: {seq}"
        for seq, tokens in expected.items():
            assert seq.token_ids == tokens and seq.num_tokens == len(tokens), f"seed {seed}: {seq}"


def test_rows_read_late_are_those_of_the_decision():
    """After members left, joined and were preempted, a batch still says who was in it, and from which position on."""
    for seed in range(30):
        rng = random.Random(seed)
        once, late = build_core(random.Random(seed), 1), build_core(random.Random(seed), 1)
        rows: dict[int, list] = defaultdict(list)
        kept: list = []
        number = 0
        while number < 60 or not once.is_idle:
            for core in (once, late) if number < 60 else ():
                params = SamplingParams(max_tokens=1 + number % 17)
                core.ingest(Sequence([number] * (1 + number % 7), params, seq_id=number), 0)
            number += 1
            if once.can_decide:
                batch = once.decide(0)
                rows[batch.decision] = [(row.seq.seq_id, *row[1:]) for row in batch.rows]
                kept.append(late.decide(0))
            if once.must_commit:
                tokens = [rng.randrange(30) for _ in range(once.in_flight[0].num_sampled)]
                once.commit(tokens, 0)
                late.commit(tokens, 0)
        for batch in kept:
            assert [(row.seq.seq_id, *row[1:]) for row in batch.rows] == rows[batch.decision], f"seed {seed}"
            assert batch.seqs is batch.seqs and len(batch.sampled) == batch.num_sampled


def test_tokens_that_do_not_fit_are_refused_before_anything_changes():
    core = build_core(random.Random(1), 0)
    core.ingest(Sequence([1, 2], SamplingParams(max_tokens=9), seq_id=0), 0)
    for tokens in ([7], [8]):
        core.decide(0)
        core.commit(tokens, 0)
    batch = core.decide(0)
    for wrong, words in (([-1], "expected integers of 4 bytes"), ([1, 2], "2 tokens for"), (None, "token_ids is None")):
        with pytest.raises(ValueError, match=words):
            core.commit(wrong, 0)
        assert core.in_flight[0] is batch
    core.commit([9], 0)
    assert core.sequences[0].completion_token_ids == [7, 8, 9]


def test_a_step_looks_at_members_whose_block_begins_or_is_full_and_at_no_others():
    manager = BlockManager(4000, 16)
    scheduler = Scheduler(manager, prefix_cache=PrefixCache())
    for number in range(64):
        scheduler.add(Sequence([number] * (1 + number % 16), SamplingParams(max_tokens=200, ignore_eos=True)))
    served: list[int] = []
    cache = manager.prefix_cache
    extend_each, register_each = manager.extend_each, cache.register_each
    manager.extend_each = lambda seqs: (served.append(len(seqs)), extend_each(seqs))[1]  # type: ignore
    cache.register_each = lambda blocks, *args: (served.append(len(blocks)), register_each(blocks, *args))[1]  # type: ignore
    for number in range(100):
        if number == 20:
            manager.extend = manager.register = None  # type: ignore
        batch = scheduler.schedule()
        scheduler.postprocess(batch, [5] * batch.num_sampled)
    assert set(served[40:]) == {4}, "of 64 members, 4 begin a block and 4 fill one in each step"


@pytest.mark.parametrize("ahead", [2, 4])
def test_tokens_find_their_sequences_however_many_batches_are_in_flight(ahead):
    """Decodes that the budget does not always reach leave the group and join it again with batches in flight."""
    for seed in range(60):
        rng = random.Random(seed)
        scheduler = build_core(rng, 1, ["mixed"]).scheduler
        expected: dict[Sequence, list[int]] = {}
        for number in range(25):
            params = SamplingParams(max_tokens=rng.randint(5, 60), ignore_eos=True)
            seq = Sequence([1000 * number + k for k in range(rng.randint(1, 12))], params, seq_id=number)
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
            scheduler.check_integrity()
        for seq, tokens in expected.items():
            assert seq.is_finished and seq.token_ids == tokens, f"seed {seed}: {seq}"


def test_blocks_are_found_in_their_places_though_somebody_left_between_two_plans():
    group, seqs = DecodeGroup(2), [Sequence([first, 2, 3]) for first in (10, 20, 30)]
    for order, seq in enumerate(seqs):
        seq.admission_index, seq.computed = order, 2
        group.join(seq)
    assert [seq for seq, _, _ in group.full_blocks(0)] == seqs
    group.leave(seqs[0])
    for tokens in ([5, 6], [7, 8], [9, 4]):
        group.receive(group.plan(), array("I", tokens))
    assert [(seq, end) for seq, end, _ in group.full_blocks(2)] == [(seqs[1], 4), (seqs[2], 4)]
    for tokens in ([1, 2], [3, 3]):
        group.receive(group.plan(), array("I", tokens))
    assert group.full_blocks(4) == [(seqs[1], 6, token_bytes([7, 9])), (seqs[2], 6, token_bytes([8, 4]))]
