"""Scheduler: what a step computes, for whom, and what happens when room is short."""

import pytest
from side_by_side import SideBySide
from slow_model import Rules

from twinserve.policies import (
    BlockManager,
    PrefixCache,
    SamplingParams,
    Scheduler,
    Sequence,
    SequenceStatus,
    VllmAdmission,
)


def sequence(prompt: int, max_tokens: int = 4, *, seq_id: int | None = None, first: int = 0) -> Sequence:
    return Sequence(
        list(range(first, first + prompt)), SamplingParams(max_tokens=max_tokens, ignore_eos=True), seq_id=seq_id
    )


def mixed(num_blocks: int = 64, block_size: int = 4, budget: int = 16, **settings) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size),
        settings.pop("max_num_seqs", 8),
        composition="mixed",
        max_num_batched_tokens=budget,
        enable_chunked_prefill=True,
        **settings,
    )


def rows(batch) -> list[tuple[int, int, int]]:
    return [(row.seq.seq_id, row.start, row.num_tokens) for row in batch.rows]


def step(scheduler: Scheduler, token: int = 1000):
    batch = scheduler.schedule()
    if batch:
        scheduler.postprocess(batch, [token] * len(batch.sampled))
    scheduler.check_integrity()
    return batch


def test_an_empty_scheduler_decides_an_empty_batch():
    seqs, is_prefill = Scheduler(BlockManager(4, 4)).schedule()
    assert (seqs, is_prefill) == ([], False)


def test_prefill_first_computes_prompts_alone_before_it_decodes():
    scheduler = Scheduler(BlockManager(64, 4))
    scheduler.add(sequence(5, seq_id=0))
    seqs, is_prefill = scheduler.schedule()
    assert ([seq.seq_id for seq in seqs], is_prefill) == ([0], True)
    scheduler.postprocess(seqs, [1000])
    scheduler.add(sequence(6, seq_id=1, first=100))
    batch = step(scheduler)
    assert (rows(batch), batch.is_prefill) == ([(1, 0, 6)], True), "the running decode waits for the new prompt"
    batch = step(scheduler)
    assert (rows(batch), batch.is_prefill) == ([(0, 5, 1), (1, 6, 1)], False)


def test_prefill_first_goes_on_with_a_chunked_prompt_before_it_decodes():
    scheduler = Scheduler(BlockManager(64, 4), max_num_batched_tokens=8, enable_chunked_prefill=True)
    scheduler.add(sequence(3, seq_id=0))
    scheduler.add(sequence(18, seq_id=1, first=100))
    assert [rows(step(scheduler)) for _ in range(4)] == [
        [(0, 0, 3), (1, 0, 5)],
        [(1, 5, 8)],
        [(1, 13, 5)],
        [(0, 3, 1), (1, 18, 1)],
    ]


def test_mixed_gives_running_sequences_their_token_and_the_rest_of_the_budget_to_a_prompt():
    scheduler = mixed(budget=8)
    scheduler.add(sequence(3, seq_id=0))
    scheduler.add(sequence(14, seq_id=1, first=100))
    assert [rows(step(scheduler)) for _ in range(3)] == [
        [(0, 0, 3), (1, 0, 5)],
        [(0, 3, 1), (1, 5, 7)],
        [(0, 4, 1), (1, 12, 2)],
    ]


def test_a_chunk_that_does_not_reach_the_last_token_samples_nothing():
    scheduler = mixed(budget=8)
    scheduler.add(sequence(12, seq_id=0))
    first, second = step(scheduler), step(scheduler)
    assert (first.sampled, [seq.seq_id for seq in second.sampled]) == ([], [0])


def test_a_last_chunk_of_one_token_is_prompt_work_not_a_decode():
    scheduler = mixed(budget=8)
    scheduler.add(sequence(9, seq_id=0))
    step(scheduler)
    batch = step(scheduler)
    assert rows(batch) == [(0, 8, 1)]
    assert (batch.num_prompt_tokens, batch.num_decode_tokens, batch.is_prefill) == (1, 0, True)


def test_max_num_seqs_bounds_what_runs():
    scheduler = mixed(max_num_seqs=2)
    for i in range(4):
        scheduler.add(sequence(2, seq_id=i, first=10 * i))
    step(scheduler)
    assert (len(scheduler.running), len(scheduler.waiting)) == (2, 2)


def test_the_last_running_is_preempted_for_room_and_comes_back_first_with_its_own_blocks():
    scheduler = mixed(num_blocks=6, prefix_cache=PrefixCache())
    for i in range(3):
        scheduler.add(sequence(7, 9, seq_id=i, first=100 * i))
    preempted, resumed = [], []
    while not scheduler.is_finished():
        batch = step(scheduler)
        assert not (batch.preempted and batch.admitted), "nobody is admitted in a step with a preemption"
        preempted += [seq.seq_id for seq in batch.preempted]
        resumed += [(row.seq.seq_id, row.start) for row in batch.admitted if row.seq.num_preemptions]
    assert preempted[0] == 2, "the pool took three prompts; the last admitted made room"
    assert resumed[0][1] > 0, "its own blocks were still cached"
    assert len(scheduler.block_manager.free_block_ids) == 6


def test_a_request_that_can_never_fit_is_refused_with_the_reason():
    scheduler = mixed(num_blocks=4, max_model_len=64)
    for seq, reason in [
        (sequence(14, 4), "needs 5 blocks of 4, the pool has 4"),
        (sequence(64), "prompt of 64 tokens, but max_model_len is 64"),
        (Sequence([]), "the prompt has no tokens"),
    ]:
        assert not scheduler.add(seq)
        assert (seq.status, seq.finish_reason, seq.refusal) == (SequenceStatus.FINISHED, "refused", reason)
    assert scheduler.add(sequence(14, 3)), "the last generated token needs no room"
    assert len(scheduler.waiting) == 1


def test_without_chunks_a_prompt_larger_than_the_budget_is_refused():
    scheduler = Scheduler(BlockManager(64, 4), max_num_batched_tokens=8)
    seq = sequence(6, 4)
    assert not scheduler.add(seq)
    assert "chunked prefill is off" in (seq.refusal or "")


def test_generation_ends_at_max_model_len():
    scheduler = mixed(max_model_len=8)
    seq = sequence(5, 100)
    scheduler.add(seq)
    while not scheduler.is_finished():
        step(scheduler)
    assert (seq.num_completion_tokens, seq.finish_reason) == (3, "length")


def test_end_of_sequence_ends_a_request_unless_ignored_and_its_own_stop_tokens_always_do():
    scheduler = mixed()
    seqs = [
        Sequence([1, 2], SamplingParams(max_tokens=9)),
        Sequence([3, 4], SamplingParams(max_tokens=9, stop_token_ids=(77,))),
        Sequence([5, 6], SamplingParams(max_tokens=9, stop_token_ids=(77,), ignore_eos=True)),
        Sequence([7, 8], SamplingParams(max_tokens=9, stop_token_ids=(77,), ignore_eos=True)),
    ]
    for seq in seqs:
        scheduler.add(seq)
    batch = scheduler.schedule()
    finished = scheduler.postprocess(batch, [2, 77, 2, 77], eos_token_id=2)
    assert finished == [*seqs[:2], seqs[3]]
    assert [seq.finish_reason for seq in seqs] == ["stop", "stop", None, "stop"]


def test_a_block_scheduled_in_this_step_is_hit_in_this_step():
    scheduler = mixed(budget=64, prefix_cache=PrefixCache())
    scheduler.add(sequence(10, seq_id=0))
    scheduler.add(sequence(10, seq_id=1))
    batch = step(scheduler)
    assert rows(batch) == [(0, 0, 10), (1, 8, 2)]


def test_a_block_of_known_tokens_can_be_hit_however_many_steps_are_in_flight():
    scheduler = mixed(prefix_cache=PrefixCache())
    seq = sequence(3, 9)
    scheduler.add(seq)
    for _ in range(3):
        scheduler.schedule()
    scheduler.postprocess(scheduler.in_flight[0], [50])
    scheduler.schedule()
    cache = scheduler.block_manager.prefix_cache
    assert cache is not None and cache.lookup([0, 1, 2, 50], 4)[1] == 4
    scheduler.check_integrity()


def test_of_blocks_filled_alike_by_one_result_the_first_in_running_order_serves_hits():
    """Two requests decode the same text; a prompt's step comes between."""
    sides = SideBySide(Rules(num_blocks=30, block_size=1, composition="prefill-first"))

    def add(tokens):
        sides.add(tokens, 6, ignore_eos=True)

    for call in "adadcdcdcadcc":
        if call == "a":
            add([100])
        elif call == "d":
            sides.decide()
        else:
            sides.commit([1] * len(sides.in_flight[0][1].sampled))
    scheduler = sides.scheduler
    first, second = scheduler.running[:2]
    assert first.token_ids == second.token_ids == [100, 1, 1, 1]
    add([100, 1, 1, 5])
    sides.decide()
    assert sides.pairs[-1][0].block_table[:3] == first.block_table != second.block_table
    sides.compare()


def test_abort_frees_blocks_wherever_the_sequence_is():
    scheduler = mixed(max_num_seqs=1)
    running, waiting = sequence(6), sequence(6, first=50)
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler)
    scheduler.abort(waiting)
    scheduler.abort(running)
    scheduler.check_integrity()
    assert scheduler.is_finished()
    assert len(scheduler.block_manager.free_block_ids) == 64
    with pytest.raises(ValueError, match="ended with 'abort'"):
        scheduler.abort(running)


def test_postprocess_takes_the_oldest_batch_once_and_only_that():
    scheduler = mixed()
    scheduler.add(sequence(3))
    batch = scheduler.schedule()
    with pytest.raises(ValueError, match="oldest batch in flight"):
        scheduler.postprocess(list(batch.seqs), [1])
    with pytest.raises(ValueError, match="2 tokens for a batch that samples 1"):
        scheduler.postprocess(batch, [1, 2])
    scheduler.postprocess(batch.seqs, [1])
    with pytest.raises(ValueError, match="oldest batch in flight"):
        scheduler.postprocess(batch.seqs, [1])


def test_the_watermark_keeps_blocks_free_while_something_runs():
    scheduler = mixed(num_blocks=8, admission=VllmAdmission(watermark_blocks=4))
    scheduler.add(sequence(17, 3, seq_id=0))
    scheduler.add(sequence(4, 3, seq_id=1, first=50))
    first, second = step(scheduler), step(scheduler)
    assert [row.seq.seq_id for row in first.admitted] == [0], "alone, it may use the whole pool"
    assert second.admitted == []


def test_a_long_prompt_is_cut_to_the_threshold():
    scheduler = mixed(budget=16, long_prefill_token_threshold=6)
    scheduler.add(sequence(10, seq_id=0))
    scheduler.add(sequence(10, seq_id=1, first=50))
    assert rows(step(scheduler)) == [(0, 0, 6), (1, 0, 6)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"composition": "random"}, "'random', expected one of prefill-first, mixed"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Scheduler(BlockManager(4, 4), **settings)
