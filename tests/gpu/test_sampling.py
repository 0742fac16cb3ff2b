"""Sampling on the CUDA path: what rows behind the graph sample, as the eager path samples it."""

from __future__ import annotations

import random

import pytest
import torch

from twinserve.engine.sampler import sample
from twinserve.policies import Batch, Row, SamplingParams, Sequence

pytestmark = pytest.mark.gpu

every_depth = pytest.mark.parametrize("pipeline_depth", [0, 1])
PROMPTS = [[5 + number] * 3 + [7 * place % 400 for place in range(17 + 3 * number)] for number in range(10)]
TIGHT = {"block_size": 16, "num_gpu_blocks": 12, "max_num_batched_tokens": 30, "max_num_seqs": 6}
"""Settings under which these prompts are computed in chunks and some of them are preempted."""


def mixed(temperature: float) -> list[SamplingParams]:
    """Every setting beside every other, and rows that have none."""
    return [
        SamplingParams(
            temperature,
            40,
            seed=number,
            ignore_eos=True,
            top_k=(0, 40)[number % 2],
            top_p=(1.0, 1.0, 0.9, 0.6, 1.0)[number % 5],
            min_p=(0.0, 0.0, 0.03)[number % 3],
            repetition_penalty=(1.0, 1.5, 0.8)[number % 3],
            presence_penalty=(0.0, 0.0, 0.0, 1.0)[number % 4],
            frequency_penalty=(0.0, 1.5, -0.5, 0.0, 0.0)[number % 5],
            logprobs=(None, None, 0, 5)[number % 4],
        )
        for number in range(len(PROMPTS))
    ]


def launches_of(llm, monkeypatch) -> list[Batch]:
    """The batches that `llm` launches from now on."""
    batches, launch = list[Batch](), llm.runner.launch
    monkeypatch.setattr(llm.runner, "launch", lambda batch: batches.append(batch) or launch(batch))
    return batches


@every_depth
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_mixed_batch_samples_what_the_eager_path_samples(qwen3, serving, monkeypatch, pipeline_depth, temperature):
    eager = serving(qwen3, "sdpa, eager", block_size=16, num_gpu_blocks=256)
    graphs = serving(qwen3, "triton", pipeline_depth=pipeline_depth, **TIGHT)
    params = mixed(temperature)
    batches = launches_of(graphs, monkeypatch)
    found = graphs.generate(PROMPTS, params)
    assert any(batch.preempted for batch in batches)
    expected = eager.generate(PROMPTS, params)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one, other, param in zip(found, expected, params, strict=True):
        assert_logprobs(one.logprobs, other.logprobs, param.logprobs)
    plain = [SamplingParams(temperature, 40, seed=number, ignore_eos=True) for number in range(len(PROMPTS))]
    assert all(
        one.token_ids != other.token_ids
        for one, other, param in zip(found, graphs.generate(PROMPTS, plain), params, strict=True)
        if param.repetition_penalty == 1.5 or param.frequency_penalty
    )


def assert_logprobs(found, expected, count: int | None) -> None:
    """Assert that two paths gave the same log-probabilities of the same 40 tokens."""
    if count is None:
        assert found is expected is None
        return
    assert len(found) == len(expected) == 40
    for one, other in zip(found, expected, strict=True):
        assert len(one.top) == count
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-3)
        # Of two that are nearly as probable, either may come first.
        assert len({token_id for token_id, _ in one.top} ^ {token_id for token_id, _ in other.top}) <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [3.0, 0.5], ids=["few are likely", "many are likely"])
def test_what_is_kept_is_searched_for_as_it_is_sorted_for(dtype, width):
    """Of equal logits too, which 16 bits make many of; and where more is kept than is copied."""
    from twinserve.engine.graphs.device_rows import DeviceRows
    from twinserve.engine.kernels.filtered_sampling import ROOM, sample_filtered_rows
    from twinserve.engine.kernels.sampling import sample_rows

    device, size = torch.device("cuda"), 151_936
    kept = [(0, 0.95, 0.0), (20, 1.0, 0.0), (20, 0.95, 0.0), (1, 0.497, 0.0), (0, 1.0, 0.1), (500, 0.9, 0.01)]
    kept += [(0, 0.9999, 0.0), (3000, 1.0, 0.0), (0, 1e-6, 0.0), (1 << 40, 0.8, 1.0), (0, 1.0, 0.0)]
    params = [
        SamplingParams(temperature, seed=number, top_k=top_k, top_p=top_p, min_p=min_p)
        for number, temperature in enumerate((0.6, 1.0, 1.7, 0.0))
        for top_k, top_p, min_p in kept
    ]
    logits = width * torch.randn(len(params), size, device=device, generator=torch.Generator(device).manual_seed(0))
    logits = logits.to(dtype)
    logits[:, 7::1000] = logits.max()
    rows = DeviceRows(len(params), 1, size, 1, device, random.Random(0))
    seqs = [Sequence([1], param) for param in params]
    rows.apply(rows.changes(Batch(1), [Row(seq, 0, 1, True, True) for seq in seqs]))
    places = torch.tensor(rows.of(seqs), dtype=torch.int32, device=device)
    last, positions = torch.arange(len(params), dtype=torch.int32, device=device), torch.full_like(places, 12)
    out = torch.zeros_like(places)
    near = tuple(torch.empty(len(params), ROOM, dtype=one, device=device) for one in (dtype, torch.int32))
    state = rows.seeds, rows.tokens, rows.computed, out
    blocks = sample_rows(logits, places, last, positions, rows.temperatures, *state)
    unfiltered = out.tolist()
    sample_filtered_rows(logits, places, rows.temperatures, rows.filters, *state, blocks, near)
    assert out.tolist() == sample(logits, params, [13] * len(params)).tolist()
    assert rows.tokens[places.long()].tolist() == out.tolist()
    assert sum(one != other for one, other in zip(out.tolist(), unfiltered, strict=True)) > len(params) // 4


@every_depth
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_of_prompts_are_the_models_own_in_graphs_too(qwen3, serving, pipeline_depth, temperature):
    """Cut into chunks, preempted, beside prompts and decodes that ask for none; as `prompt_logprobs` and `echo` ask."""
    llm = serving(qwen3, "triton", pipeline_depth=pipeline_depth, **TIGHT)
    llm.warm_up()
    core, launched, preempted = llm.settings.build_core(), [], 0
    seqs = [Sequence(prompt, SamplingParams(temperature, 24, seed=7, ignore_eos=True)) for prompt in PROMPTS]
    asked = {seq: number % 4 for number, seq in enumerate(seqs) if number % 3 != 1}
    llm.runner.prompt_asks.update(asked)
    for seq in seqs:
        core.ingest(seq, 0)
    while core.can_decide:
        batch = core.decide(0)
        preempted += len(batch.preempted)
        launched.append(llm.runner.launch(batch))
        while core.must_commit:
            core.commit(launched.pop(0).result(), 0)
    assert core.is_idle and preempted
    assert set(llm.runner.logprobs) == set(asked)
    for seq, count in asked.items():
        prompt = seq.token_ids[: seq.num_prompt_tokens]
        rows = qwen3.model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        heard = llm.runner.logprobs[seq]
        assert sorted(heard) == list(range(1, len(prompt)))
        for place, row in enumerate(rows, 1):
            one, own = heard[place], row[prompt[place]]
            assert one.logprob == pytest.approx(own.item(), abs=1e-3)
            assert abs(one.rank - int((row >= own).sum())) <= 1
            assert [value for _, value in one.top] == pytest.approx(row.topk(count).values.tolist(), abs=1e-3)


def test_what_was_seen_goes_with_its_row(qwen3, serving):
    """A row that is taken over by another sequence begins without the tokens of the one before."""
    llm = serving(qwen3, "triton", num_gpu_blocks=16, max_num_seqs=1)
    strong = SamplingParams(0.0, 30, ignore_eos=True, repetition_penalty=20.0)
    alone = llm.generate([PROMPTS[3]], strong)[0].token_ids
    both = llm.generate([PROMPTS[0], PROMPTS[3]], strong)
    assert both[1].token_ids == alone
    assert len(set(alone) - set(PROMPTS[3])) == 30


def test_special_rows_wait_for_nothing_but_tokens(qwen3, serving):
    llm = serving(qwen3, "triton", pipeline_depth=1)
    llm.warm_up()
    core = llm.settings.build_core()
    for prompt in PROMPTS[:4]:
        params = SamplingParams(
            0.7, 60, ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.5, min_p=0.02, logprobs=3
        )
        core.ingest(Sequence(prompt, params), 0)
    launched: list = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            launched.append(llm.runner.launch(core.decide(0)))
            if core.must_commit:
                core.commit(launched.pop(0).result(), 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    core.commit(launched.pop(0).result(), 0)
