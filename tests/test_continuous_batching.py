"""Cycle 4: many requests at once, each leaving the batch when it ends and entering as soon as there is room."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from guide_models import SUBJECTS, Subject, subject

from twinserve.engine.continuous_batching import run_continuous_batching
from twinserve.engine.inference import generate_naive
from twinserve.engine.model_runner import ModelRunner
from twinserve.policies import BlockManager, SamplingParams, Scheduler, Sequence, SequenceStatus

NUM_BLOCKS, BLOCK_SIZE = 64, 16


class WatchedRunner:
    """A ModelRunner that notes its batches: the sequences of each, and whether it is a prefill."""

    def __init__(self, of: Subject):
        self.inner = ModelRunner(of.model, of.tokenizer, "cpu", num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        self.batches: list[tuple[list[Sequence], bool]] = []

    def run(self, seqs: list[Sequence], is_prefill: bool) -> list[int]:
        self.batches.append((list(seqs), is_prefill))
        return self.inner.run(seqs, is_prefill)


@pytest.fixture
def runner_of() -> Iterator[Callable[[Subject], WatchedRunner]]:
    """Makes runners of a subject's model, and closes them."""
    made: list[WatchedRunner] = []

    def make(of: Subject) -> WatchedRunner:
        made.append(WatchedRunner(of))
        return made[-1]

    yield make
    for runner in made:
        runner.inner.close()


def scheduler_of(max_num_seqs: int = 256, **settings) -> Scheduler:
    return Scheduler(BlockManager(NUM_BLOCKS, BLOCK_SIZE), max_num_seqs, **settings)


def request(of: Subject, prompt: str, max_tokens: int) -> Sequence:
    """A greedy request."""
    return Sequence(of.tokenizer.encode(prompt), SamplingParams(temperature=0.0, max_tokens=max_tokens))


def step(scheduler: Scheduler, runner: WatchedRunner, of: Subject) -> list[Sequence]:
    """One turn of the guide's loop; the sequences of its batch."""
    seqs, is_prefill = scheduler.schedule()
    scheduler.postprocess(seqs, runner.run(seqs, is_prefill), of.tokenizer.eos_token_id)
    scheduler.check_integrity()
    return seqs


def check_alone(of: Subject, seq: Sequence) -> None:
    """Assert that a greedy request got what it gets when nothing runs beside it."""
    prompt = of.tokenizer.decode(seq.token_ids[: seq.num_prompt_tokens])
    alone = generate_naive(of.model, of.tokenizer, prompt, seq.sampling_params.max_tokens, temperature=0.0)
    assert of.tokenizer.decode(seq.token_ids) == alone


@pytest.mark.parametrize("name", SUBJECTS)
def test_continuous_batching_basic(name, runner_of):
    """Several requests share every batch, enter while others run, and each gets what it gets alone."""
    of = subject(name)
    prompts = (*of.prompts, of.ending_prompt)
    scheduler, runner = scheduler_of(), runner_of(of)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    results = run_continuous_batching(scheduler, runner, prompts, of.tokenizer, sampling_params=params)

    alone = [generate_naive(of.model, of.tokenizer, prompt, 12, temperature=0.0) for prompt in prompts]
    assert [results[seq_id] for seq_id in sorted(results)] == alone
    sizes = [(len(seqs), is_prefill) for seqs, is_prefill in runner.batches]
    assert sizes[:2] == [(len(prompts), True), (len(prompts), False)], "all of them, in one batch"
    assert len(sizes) == 12, "as many steps as the longest needs, not as all of them need"
    assert scheduler.is_finished() and len(scheduler.block_manager.free_block_ids) == NUM_BLOCKS

    tiny = subject("tiny")
    check_who_enters_while_others_run(tiny, runner_of(tiny), "prefill-first")
    check_who_enters_while_others_run(tiny, runner_of(tiny), "mixed")
    check_what_the_model_is_given(tiny, runner_of(tiny))


def check_who_enters_while_others_run(of: Subject, runner: WatchedRunner, composition: str) -> None:
    """A request that comes while another runs is in the next batch, and then both are in every one."""
    scheduler = scheduler_of(composition=composition)
    early, late = request(of, of.prompts[0], 8), request(of, of.ending_prompt, 4)
    scheduler.add(early)
    assert not scheduler.is_finished()
    assert [step(scheduler, runner, of) for _ in range(3)] == [[early]] * 3
    assert late.status is SequenceStatus.WAITING and not scheduler.is_finished()
    scheduler.add(late)
    assert step(scheduler, runner, of) == ([early, late] if composition == "mixed" else [late])
    assert early.status is late.status is SequenceStatus.RUNNING
    assert step(scheduler, runner, of) == [early, late]
    while not scheduler.is_finished():
        step(scheduler, runner, of)
    for seq in (early, late):
        assert seq.status is SequenceStatus.FINISHED
        check_alone(of, seq)


def check_what_the_model_is_given(of: Subject, runner: WatchedRunner) -> None:
    """Prompts padded to one length, with a mask that tells padding; later the last token of each."""
    scheduler = scheduler_of()
    seqs = [request(of, prompt, 4) for prompt in (*of.prompts, of.ending_prompt)]
    for seq in seqs:
        scheduler.add(seq)
    batch = scheduler.schedule()
    input_ids, attention_mask = runner.inner.prepare_prefill(batch.seqs)
    longest = max(seq.num_tokens for seq in seqs)
    assert input_ids.shape == attention_mask.shape == (len(seqs), longest)
    assert attention_mask.sum(dim=1).tolist() == [seq.num_tokens for seq in seqs]
    for row, mask, seq in zip(input_ids, attention_mask.bool(), seqs, strict=True):
        assert row[mask].tolist() == seq.token_ids

    scheduler.postprocess(batch.seqs, runner.run(*batch), None)
    last = runner.inner.prepare_decode(scheduler.schedule().seqs)
    assert torch.equal(last, torch.tensor([[seq.token_ids[-1]] for seq in seqs]))


def test_short_request_finishes_first(runner_of):
    """The short request leaves at once: its blocks are free and its place is taken while the long one runs on."""
    of = subject("tiny")
    scheduler, runner = scheduler_of(max_num_seqs=2), runner_of(of)
    long, short, next_one = request(of, of.prompts[0], 30), request(of, of.prompts[1], 3), request(of, of.prompts[2], 5)
    for seq in (long, short, next_one):
        scheduler.add(seq)

    assert [step(scheduler, runner, of) for _ in range(3)] == [[long, short]] * 3
    assert short.status is SequenceStatus.FINISHED and short.num_completion_tokens == 3
    assert long.status is SequenceStatus.RUNNING and long.num_completion_tokens == 3
    assert short.block_table == []
    assert scheduler.block_manager.used_block_ids == set(long.block_table), "the others are free"
    assert scheduler.running == [long]

    assert step(scheduler, runner, of) == [next_one], "its place is taken in the very next step"
    assert step(scheduler, runner, of) == [long, next_one]
    while not scheduler.is_finished():
        assert short not in step(scheduler, runner, of)
    for seq in (long, short, next_one):
        assert seq.num_completion_tokens == seq.sampling_params.max_tokens
        check_alone(of, seq)
    check_that_an_ending_text_is_short(of, runner_of(of))


def check_that_an_ending_text_is_short(of: Subject, runner: WatchedRunner) -> None:
    """A request that meets its end-of-sequence token has its text before those that came earlier."""
    prompts = (*of.prompts, of.ending_prompt)
    params = SamplingParams(temperature=0.0, max_tokens=50)
    results = run_continuous_batching(scheduler_of(), runner, prompts, of.tokenizer, sampling_params=params)
    assert list(results)[0] == max(results), "the last that came is the first that ends"
    num_new = of.num_new(of.ending_prompt, results[max(results)])
    assert results[max(results)] == of.tokenizer.decode(of.greedy(of.ending_prompt, 50))
    sizes = [len(seqs) for seqs, _ in runner.batches]
    assert sizes == [4] * num_new + [3] * (50 - num_new)


def test_the_guides_parameters_are_the_default(runner_of):
    of = subject("tiny")
    runner = runner_of(of)
    run_continuous_batching(scheduler_of(), runner, of.prompts, of.tokenizer)
    assert {seq.sampling_params for seqs, _ in runner.batches for seq in seqs} == {SamplingParams(1.0, max_tokens=50)}


def test_seeded_draws_are_those_of_naive_generation(runner_of):
    of = subject("tiny")
    params = SamplingParams(temperature=2.0, max_tokens=12, seed=5)
    results = run_continuous_batching(scheduler_of(), runner_of(of), of.prompts, of.tokenizer, sampling_params=params)
    alone = [generate_naive(of.model, of.tokenizer, prompt, 12, temperature=2.0, seed=5) for prompt in of.prompts]
    assert [results[seq_id] for seq_id in sorted(results)] == alone


def test_a_prompt_that_can_never_be_served_has_no_text(runner_of):
    of = subject("tiny")
    params = SamplingParams(temperature=0.0, max_tokens=3)
    prompts = ["", of.prompts[0]]
    results = run_continuous_batching(scheduler_of(), runner_of(of), prompts, of.tokenizer, sampling_params=params)
    assert list(results.values()) == [generate_naive(of.model, of.tokenizer, of.prompts[0], 3, temperature=0.0)]
