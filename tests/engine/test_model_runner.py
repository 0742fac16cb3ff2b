"""ModelRunner: the guide's calls, the engine's calls, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from engine_judge import GREEDY

from twinserve.engine.model_runner import ModelRunner
from twinserve.policies import BlockManager, Core, SamplingParams, Scheduler, Sequence
from twinserve.settings.errors import InputError

PROMPTS = [[5, 6, 7], [9] * 40, [300, 4], [11, 12, 13, 14, 15, 16, 17]]


@pytest.fixture
def runner(llama):
    runner = ModelRunner(llama.model, None, "cpu", num_blocks=64, block_size=16)
    yield runner
    runner.close()


def schedulers():
    """The guide's scheduler, and one that chunks and caches."""
    chunked = Scheduler(
        BlockManager(64, 16), 3, composition="mixed", max_num_batched_tokens=16, enable_chunked_prefill=True
    )
    return {"guide": Scheduler(BlockManager(64, 16)), "chunked": chunked}


@pytest.mark.parametrize("kind", ["guide", "chunked"])
@pytest.mark.parametrize("call", ["run", "execute"])
def test_run_and_execute_give_the_same_tokens(llama, runner, kind, call):
    scheduler = schedulers()[kind]
    sequences = [Sequence(prompt, SamplingParams(temperature=0.0, max_tokens=10)) for prompt in PROMPTS]
    for seq in sequences:
        scheduler.add(seq)
    while not scheduler.is_finished():
        batch = scheduler.schedule()
        seqs, is_prefill = batch
        tokens = runner.run(seqs, is_prefill) if call == "run" else runner.execute(batch)
        scheduler.postprocess(seqs, tokens, None)
    llama.check_all(sequences)


def test_the_guides_inputs(runner):
    scheduler = Scheduler(BlockManager(64, 16))
    for prompt in PROMPTS:
        scheduler.add(Sequence(prompt, GREEDY))
    seqs, is_prefill = scheduler.schedule()
    assert is_prefill
    input_ids, attention_mask = runner.prepare_prefill(seqs)
    assert input_ids.shape == attention_mask.shape == (4, 40)
    assert attention_mask.sum(1).tolist() == [len(prompt) for prompt in PROMPTS]
    assert [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)] == PROMPTS
    scheduler.postprocess(seqs, runner.run(seqs, is_prefill))
    seqs, is_prefill = scheduler.schedule()
    assert not is_prefill
    assert runner.prepare_decode(seqs).tolist() == [[seq.token_ids[-1]] for seq in seqs]


def test_the_guides_pool_is_of_the_guides_block_size(llama):
    runner = ModelRunner(llama.model, None, "cpu", num_blocks=4)
    assert runner.block_size == Sequence.block_size == 256
    runner.close()


def test_an_own_default_fills_the_budget(llama):
    runner = ModelRunner(llama.model, None, "cpu")
    assert runner.num_blocks == (1 << 30) // (2 * 4 * 256 * 2 * 32 * 4)
    runner.close()


def test_nothing_scheduled_is_refused(runner):
    seq = Sequence([1, 2, 3])
    with pytest.raises(ValueError, match="nothing scheduled"):
        runner.run([seq], True)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(64, 8), (128, 16)])
def test_another_pools_blocks_are_refused(runner, num_blocks, block_size):
    scheduler = Scheduler(BlockManager(num_blocks, block_size))
    scheduler.add(Sequence([3] * (num_blocks * block_size - 100), GREEDY))
    with pytest.raises(ValueError, match="but this runner has 64 blocks of 16"):
        runner.execute(scheduler.schedule())


def test_a_token_that_nobody_samples_is_refused(llama, runner):
    core = Core(Scheduler(BlockManager(64, 16)), pipeline_depth=1)
    core.ingest(Sequence([5, 6, 7], GREEDY), 0)
    core.decide(0)
    second = core.decide(0)
    with pytest.raises(RuntimeError, match="neither known nor sampled"):
        runner.launch(second)


def test_an_empty_batch_ends_in_its_turn(runner):
    core = Core(Scheduler(BlockManager(64, 16)), pipeline_depth=1)
    core.ingest(Sequence([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=1)), 0)
    first, second = runner.launch(core.decide(0)), runner.launch(core.decide(0))
    assert len(first.result()) == 1 and second.result() == []
    assert first.start_ns < first.end_ns <= second.start_ns <= second.end_ns


def test_an_unknown_backend_is_refused(llama):
    with pytest.raises(InputError, match="attention is 'paged', expected one of auto, triton, flash, sdpa"):
        ModelRunner(llama.model, None, "cpu", attention="paged")


def test_launch_copies_what_it_needs(llama, runner):
    scheduler = Scheduler(BlockManager(64, 16))
    seq = Sequence([5, 6, 7], GREEDY)
    scheduler.add(seq)
    batch = scheduler.schedule()
    blocker = runner._queue.submit(lambda: torch.full((20_000_000,), 2.0).exp().argmax()[None])
    step = runner.launch(batch)
    seq.token_ids[:] = [1, 1, 1]
    seq.block_table = [50]
    seq.sampling_params = SamplingParams(temperature=9.0)
    blocker.result()
    assert step.result() == llama.generate([5, 6, 7], 1)
