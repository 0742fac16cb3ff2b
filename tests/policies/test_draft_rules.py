"""vLLM 0.33's rules of drafts one by one, each in the smallest case that shows it; recorded scenarios hold them all."""

from __future__ import annotations

from itertools import count

import pytest

from twinserve.policies import Batch, BlockManager, PrefixCache, Runs, SamplingParams, Scheduler, Sequence, Speculation


class Walk:
    """A scheduler of drafts, and what its steps give; blocks have 4 tokens."""

    def __init__(self, most: int = 3, *, blocks: int | None = None, ahead: int = 0, slots: int = 0, **values):
        is_async, caching = values.pop("is_async", False), values.pop("caching", False)
        speculation = Speculation(most, None, ahead, slots, is_async)
        cache = PrefixCache() if caching else None
        rest = {"composition": "mixed", "enable_chunked_prefill": True, "prefix_cache": cache}
        self.most, self.is_async = most, is_async
        self.scheduler = Scheduler(BlockManager(blocks, 4), speculation=speculation, **rest | values)
        self._token = count(1000)

    def add(self, prompt: int | list[int], most: int = 40) -> Sequence:
        tokens = [next(self._token) for _ in range(prompt)] if isinstance(prompt, int) else prompt
        seq = Sequence(tokens, SamplingParams(max_tokens=most))
        assert self.scheduler.add(seq), seq.refusal
        return seq

    def decide(self) -> Batch:
        return self.scheduler.schedule()

    def end(self, batch: Batch, made: dict[Sequence, int] | None = None, proposed: int | None = None) -> None:
        """End a step: runs of so many tokens, else of one; and so many drafts for each that sampled, else the most."""
        lengths = [(made or {}).get(seq, 1) for seq in batch.sampled]
        drafts = None if self.is_async else [self.most if proposed is None else proposed] * len(lengths)
        self.scheduler.postprocess(batch, Runs([next(self._token) for _ in range(sum(lengths))], lengths, drafts))

    def step(self, made: dict[Sequence, int] | None = None, proposed: int | None = None) -> Batch:
        batch = self.decide()
        self.end(batch, made, proposed)
        return batch


def rows(batch: Batch) -> list[tuple[int, int, int]]:
    """Of each row the first token, the tokens, and the drafts among them."""
    return [(row.start, row.num_tokens, row.num_drafts) for row in batch.rows]


@pytest.mark.parametrize(
    ("budget", "second", "waiting"),
    [
        (7, [(2, 4, 3), (3, 3, 2)], [0, 0, 0]),
        (8, [(2, 4, 3), (3, 4, 3)], [0, 0, 3]),
        (9, [(2, 4, 3), (3, 4, 3), (2, 1, 0)], [0, 0, 0]),
    ],
)
def test_a_cut_takes_drafts_first_and_loses_them_and_who_gets_nothing_keeps_them(budget, second, waiting):
    walk = Walk(max_num_batched_tokens=budget)
    seqs = [walk.add(length) for length in ((2, 3) if budget == 7 else (2, 3, 2))]
    walk.step()
    batch = walk.decide()
    assert rows(batch) == second
    assert [seq.num_drafts for seq in seqs] == waiting[: len(seqs)]


def test_the_threshold_cuts_a_row_with_drafts_as_it_cuts_a_prompt():
    walk = Walk(long_prefill_token_threshold=2)
    walk.add(2), walk.add(2)
    walk.step()
    assert rows(walk.decide()) == [(2, 2, 1), (2, 2, 1)]


def test_the_models_length_cuts_drafts_and_what_is_left_of_the_answer_does_not():
    walk = Walk(max_model_len=6)
    walk.add(3)
    walk.step()
    assert rows(walk.decide()) == [(3, 2, 1)], "the last place but one"
    walk = Walk()
    walk.add(3, most=2)
    walk.step()
    assert rows(walk.decide()) == [(3, 4, 3)], "though one token is wanted"


@pytest.mark.parametrize(("budget", "admitted"), [(8, 2), (9, 3)])
def test_each_row_costs_its_slots_beside_its_tokens_and_a_pass_goes_on_while_more_than_these_are_left(budget, admitted):
    walk = Walk(2, slots=1, max_num_batched_tokens=budget)
    for length in (2, 3, 1):
        walk.add(length)
    assert len(walk.decide()) == admitted


def test_a_victim_gives_its_tokens_and_its_slot_back():
    """The second goes though it had its row, for the first, which has come before and is served again behind it."""

    class Last:
        def choose(self, running, seq):
            return next(iter(running))

    walk = Walk(1, slots=1, blocks=4, max_num_batched_tokens=30, victim=Last())
    first, second = walk.add(7, most=4), walk.add(8, most=2)
    walk.step(proposed=0)
    left = walk.scheduler._left_tokens
    batch = walk.decide()
    assert batch.preempted == [first] and rows(batch) == [(8, 1, 0)]
    assert walk.scheduler._left_tokens == 30 - 1 - 2 != left, "one row of one token and its slot"
    assert second in batch.seqs


def test_blocks_are_held_for_what_is_drafted_behind_a_row_but_not_beyond_the_models_length():
    for limit, blocks in ((None, 3), (8, 2)):
        walk = Walk(3, ahead=3, max_model_len=limit)
        seq = walk.add(7, most=1)
        walk.decide()
        assert len(seq.block_table) == blocks


def test_that_all_of_a_prompt_fits_is_judged_without_what_is_drafted_behind_it():
    walk = Walk(3, ahead=3, blocks=8, long_prefill_token_threshold=4, max_num_batched_tokens=20)
    walk.add(20, most=4)
    walk.step(proposed=0)
    second = walk.add(8, most=1)
    batch = walk.decide()
    assert [row.seq for row in batch.admitted] == [second], "8 tokens and 2 blocks are free; 11 would need 3"
    assert walk.scheduler.block_manager.num_free_blocks == 0


def test_a_preemption_drops_drafts_and_who_comes_back_has_none_before_it_has_sampled_again():
    walk = Walk(1, blocks=4)
    first, second = walk.add(4, most=10), walk.add(4, most=10)
    walk.step()
    while not (batch := walk.decide()).preempted:
        assert second.num_drafts == 0
        walk.end(batch, {first: 2, second: 2} if batch.drafts else None)
    assert batch.preempted == [second] and second.num_drafts == 0
    assert rows(batch) == [(8, 2, 1)], "no draft of the first is dropped for want of blocks"
    walk.end(batch)
    while second not in (batch := walk.decide()).seqs:
        walk.end(batch)
    assert rows(batch) == [(0, second.num_tokens, 0)]
    walk.end(batch)
    assert rows(walk.decide())[0][2] == 1


def test_what_a_run_filled_is_registered_of_one_that_ends_with_it_too():
    walk = Walk(caching=True)
    seq = walk.add([1, 2, 3], most=5)
    walk.step()
    walk.step({seq: 4})
    assert seq.is_finished and len(seq.token_ids) == 8
    again = walk.add([*seq.token_ids[:4], 7])
    assert [row.start for row in walk.decide().admitted] == [4] and again.num_cached_tokens == 4


PADDED = {
    "alone and nothing is hit": ({}, 1, None, [(0, 1, 0)]),
    "behind a hit": ({}, 5, None, [(4, 4, 3)]),
    "beside a row, nothing is hit": ({}, 1, "row", [(0, 4, 3)]),
    "beside a prompt that runs": ({"max_num_batched_tokens": 10}, 5, "prompt", [(4, 1, 0)]),
    "no room in the model's length": ({"max_model_len": 8}, 5, None, [(4, 1, 0)]),
    "room in the model's length": ({"max_model_len": 9}, 5, None, [(4, 4, 3)]),
    "no budget for all of it": ({"max_num_batched_tokens": 4}, 5, "row", []),
    "two tokens are left": ({}, 6, None, [(4, 2, 0)]),
}


@pytest.mark.parametrize("case", PADDED)
def test_an_admission_of_one_token_is_padded(case):
    values, length, beside, expected = PADDED[case]
    walk = Walk(caching=True, **values)
    text = [1, 2, 3, 4, 5, 6]
    walk.add(text[:4], most=1)
    walk.step(proposed=0)
    if beside is not None:
        walk.add(4 if beside == "row" else 12, most=3)
        walk.step(proposed=0)
    walk.add(text[:length] if length > 1 else 1, most=2)
    batch = walk.decide()
    assert [(row.start, row.num_tokens, row.num_drafts) for row in batch.admitted] == expected
    if batch.drafts:
        with pytest.raises(ValueError, match="expected one of 1 to each of"):
            walk.end(batch, {batch.sampled[-1]: 5})
        walk.end(batch)
        assert batch.runs[-1][1:] == (1, 1)


def test_ahead_of_results_the_last_token_in_flight_is_told_as_if_no_draft_in_flight_were_right():
    for most, third in ((2, []), (3, [(6, 3, 2)])):
        walk = Walk(2, is_async=True)
        walk.add(3, most=most)
        assert rows(walk.decide()) == [(0, 3, 0)]
        assert rows(walk.decide()) == [(3, 3, 2)]
        assert rows(walk.decide()) == third


def test_a_run_that_comes_behind_a_preemption_is_kept_up_to_its_end_and_takes_nothing_back():
    walk = Walk(2, is_async=True, blocks=6, caching=True)
    first, second = walk.add(7, most=12), walk.add(7, most=4)
    earlier = walk.decide()
    while not (batch := walk.decide()).preempted:
        walk.end(earlier)
        earlier = batch
    assert batch.preempted == [second] and second in earlier.drafts
    known, in_flight = second.num_tokens, second.num_in_flight
    walk.end(earlier, {first: 3, second: 3})
    assert (second.num_tokens, second.num_computed_tokens, second.num_registered_tokens) == (known + 3, 0, 0)
    assert second.num_in_flight == in_flight - 3 == 0
    walk.scheduler.check_integrity()
