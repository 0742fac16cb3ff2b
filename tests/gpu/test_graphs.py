"""The CUDA path: one graph launch a step, nothing waited for, kernels as right as those of transformers."""

from __future__ import annotations

import gc
from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from engine_judge import GREEDY, judge_of
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.llm import LLM
from twinserve.engine.models import source
from twinserve.engine.models.loader import adopt_model
from twinserve.engine.verify import verify
from twinserve.policies import SamplingParams, Sequence
from twinserve.settings.build_core import Settings

pytestmark = pytest.mark.gpu

decoding = pytest.mark.parametrize("attention", ["flash", "triton"])


@decoding
def test_fifty_decode_steps_are_fifty_graph_launches_and_wait_for_nothing_but_tokens(qwen3, serving, attention):
    llm = serving(qwen3, attention, pipeline_depth=1)
    llm.warm_up()
    core = llm.settings.build_core()
    params = SamplingParams(temperature=0.7, max_tokens=200, ignore_eos=True)
    for number in range(8):
        core.ingest(Sequence([5 + number] * 20, params), 0)
    launched, grown = [], []

    def step() -> None:
        batch = core.decide(0)
        grown.append(bool(batch.grown))
        launched.append(llm.runner.launch(batch))
        if core.must_commit:
            core.commit(launched.pop(0).result(), 0)

    for _ in range(4):
        step()
    grown.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(50):
                step()
            counted: Counter[str] = Counter()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counted.update({event.key: event.count for event in profiler.key_averages()})
    assert counted["cudaGraphLaunch"] == 50
    assert counted["aten::item"] == counted["aten::_local_scalar_dense"] == counted["cudaStreamSynchronize"] == 0
    assert counted["cudaEventSynchronize"] <= 51
    assert counted["cudaDeviceSynchronize"] <= 1, "the profiler's own, at its end"
    # Tokens come back in every step; something goes to the device only where a block table grew.
    assert counted["Memcpy DtoH (Device -> Pinned)"] == 50
    assert counted["Memcpy HtoD (Pinned -> Device)"] == sum(grown)
    core.commit(launched.pop(0).result(), 0)


def largest_errors(logits: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """The mean and the largest error of log-probabilities."""
    errors = (F.log_softmax(logits.float(), -1) - F.log_softmax(reference.float(), -1)).abs()
    return errors.mean().item(), errors.amax().item()


@pytest.mark.parametrize("attention", ["flash", "triton"])
def test_log_probabilities_in_bfloat16_are_as_near_to_float32_as_those_of_transformers(attention):
    if attention == "flash":
        pytest.importorskip("flash_attn")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=4096, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=2048, tie_word_embeddings=True,
        initializer_range=0.05,
    )  # fmt: skip
    theirs: Any = Qwen3ForCausalLM(config).to(torch.bfloat16).cuda().eval()
    settings = Settings(max_num_seqs=8, max_num_batched_tokens=2048, max_model_len=1024, num_gpu_blocks=256)
    llm = LLM(
        adopt_model(theirs, device="cuda"), device="cuda", settings=settings, attention=attention,
        graph_options=GraphOptions(captured="none"),
    )  # fmt: skip
    prompts = [torch.randint(0, 4096, (length,)).tolist() for length in (3, 17, 200, 311, 640, 33)]
    seen: list[torch.Tensor] = []
    decoder, run = llm.runner._decoder, llm.runner._decoder.run  # type: ignore[union-attr]
    decoder.run = lambda step, out: seen.append(run(step, out).clone()) or seen[-1]  # type: ignore[func-returns-value, method-assign]
    completions = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True))
    assert len(seen) == 24
    exact: Any = Qwen3ForCausalLM(config).float().cuda().eval()
    exact.load_state_dict({name: weight.float() for name, weight in theirs.state_dict().items()})
    ours, own = [], []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.tensor([prompt + completion.token_ids[:-1]], device="cuda")
        with torch.inference_mode():
            reference = exact(ids).logits[0, len(prompt) - 1 :]
            half = theirs(ids).logits[0, len(prompt) - 1 :]
        own.append(largest_errors(half, reference))
        # Decodes lie by length, the longest first; the first step has the prompts as they came.
        by_length = sorted(range(len(prompts)), key=lambda place: -len(prompts[place])).index(number)
        mine = torch.stack([seen[0][number], *(step[by_length] for step in seen[1:])])
        ours.append(largest_errors(mine, reference))
    means = [sum(errors[0] for errors in found) / len(found) for found in (ours, own)]
    tops = [max(errors[1] for errors in found) for found in (ours, own)]
    assert means[0] <= 1.05 * means[1], f"mean error {means[0]} against {means[1]} of transformers"
    assert tops[0] <= 1.25 * tops[1], f"largest error {tops[0]} against {tops[1]} of transformers"
    llm.close()


@pytest.mark.parametrize(
    ("options", "execution"),
    [
        ({"dtype": "float32"}, "graphs"),
        ({"dtype": "float32", "execution": "eager"}, "eager"),
        ({"dtype": "bfloat16"}, "graphs"),
        ({"dtype": "float16"}, "graphs"),
        ({"dtype": "bfloat16", "attention": "flash"}, "graphs"),
        ({"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, "graphs"),
        ({"dtype": "bfloat16", "quantization": "int8"}, "graphs"),
        ({"dtype": "bfloat16", "quantization": "fp8"}, "graphs"),
    ],
)
def test_what_serves_is_what_is_verified(monkeypatch, tmp_path, options, execution):
    """Its log-probabilities are those of graphs that were replayed, and agree; with a wrong weight they do not."""
    from twinserve.engine.graphs.graph_runner import GraphRunner

    if options.get("attention") == "flash":
        pytest.importorskip("flash_attn")
    judge_of("qwen3").model.save_pretrained(tmp_path)
    replays = Counter[str]()
    run = GraphRunner._run

    def watched(self: Any, step: Any, *others: Any) -> Any:
        replays["graphs" if step.size in self._graphs else "launches"] += 1
        return run(self, step, *others)

    monkeypatch.setattr(GraphRunner, "_run", watched)
    report = verify(tmp_path, device="cuda", max_tokens=8, **options)
    assert report.agrees, report
    assert report.execution == execution
    assert (replays["graphs"] > 100 and not replays["launches"]) if execution == "graphs" else not replays
    load = source.load_model

    def load_wrong(*args: Any, **kwargs: Any) -> Any:
        decoder = load(*args, **kwargs)
        decoder.layers[3].mlp_norm.weight.fill_(1.0)
        return decoder

    monkeypatch.setattr(source, "load_model", load_wrong)
    assert not verify(tmp_path, device="cuda", max_tokens=8, **options).agrees


@pytest.mark.parametrize("block_size", [16, 48, 256])
def test_any_multiple_of_16_tokens_is_a_block(qwen3, serving, block_size):
    llm = serving(qwen3, "triton", block_size=block_size, num_gpu_blocks=60, max_num_batched_tokens=64, max_num_seqs=5)
    prompts = [[3 + place % 400 for place in range(length)] for length in (1, 60, 129, 300)]
    for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        logits = qwen3.model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 1e-3


@pytest.mark.parametrize("attention", ["flash", "triton", "sdpa"])
@pytest.mark.parametrize("name", ["qwen2-windows", "mistral-window", "qwen3-windows", "qwen2-yarn"])
def test_windows_and_long_rotations_over_chunks_and_decodes(serving, name, attention):
    judge = judge_of(name)
    if attention == "flash" and judge.model.config.head_dim != 64:
        pytest.skip("flash-attn has no heads of this size")
    llm = serving(judge, attention, num_gpu_blocks=16, max_num_batched_tokens=64, max_num_seqs=5)
    prompts = [[3 + place % 400 for place in range(length)] for length in (1, 19, 60, 129, 300, 700)]
    texts = [
        (prompt, completion.token_ids)
        for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True)
    ]  # fmt: skip
    found, least = [], []
    half = deepcopy(judge.model).bfloat16() if attention == "flash" else judge.model
    for prompt, tokens in texts:
        logits, own = (
            model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1] for model in (judge.model, half)
        )
        best = logits.max(-1).values
        found += (best - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]).tolist()
        least += (best - logits.gather(1, own.argmax(-1)[:, None])[:, 0]).tolist()
    if attention == "flash":  # in bfloat16: the tokens are as good as those of transformers in bfloat16
        assert sum(found) <= 1.5 * sum(least) and max(found) <= 2 * max(least)
    else:
        assert max(found) < 1e-3


def test_batches_that_do_not_follow_one_another_are_described_afresh(qwen3, serving):
    """The profiler decides steps that it never launches; a run may end with sequences that never leave."""
    llm = serving(qwen3, "triton", num_gpu_blocks=64, max_num_seqs=4)
    prompt = [7] * 30
    expected = llm.generate([prompt], GREEDY)[0].token_ids
    core = llm.settings.build_core()
    for number in range(4):
        core.ingest(Sequence([9 + number] * 10, GREEDY), 0)
    for _ in range(3):
        llm.runner.launch(core.decide(0))
        core.commit([1] * 4, 0)
    other = llm.settings.build_core()
    seq = Sequence(prompt, GREEDY)
    other.ingest(seq, 0)
    other.decide(0)
    other.commit([expected[0]], 0)  # never launched: the KV of the prompt is not there
    with pytest.raises(AssertionError):
        assert_tokens(llm, other, seq, expected)
    again = llm.settings.build_core()
    seq = Sequence(prompt, GREEDY)
    again.ingest(seq, 0)
    assert_tokens(llm, again, seq, expected)


def assert_tokens(llm: LLM, core, seq: Sequence, expected: list[int]) -> None:
    """Assert that a sequence goes on to its end with these tokens."""
    while not core.is_idle:
        core.commit(llm.runner.execute(core.decide(0)), 0)
    assert seq.completion_token_ids == expected


def test_an_engine_that_is_garbage_does_not_end_the_capture_of_another(qwen3, serving):
    settings = Settings(max_num_seqs=8, max_model_len=128, block_size=16, num_gpu_blocks=64)
    gone = LLM(qwen3.model, device="cuda", dtype="float32", settings=settings, attention="triton")
    gone.warm_up()
    gone.itself = gone  # type: ignore[attr-defined]
    gone.close()
    del gone
    llm = serving(qwen3, "triton", max_model_len=128)
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        llm.warm_up()
    finally:
        gc.set_threshold(*thresholds)
    assert len(llm.generate([[5, 6, 7]], GREEDY)[0].token_ids) == GREEDY.max_tokens


@pytest.mark.parametrize(
    ("options", "captured"),
    [
        (GraphOptions(), {True, False}),
        (GraphOptions(captured="decodes"), {False}),
        (GraphOptions(captured="none"), set()),
        (GraphOptions(longest_first=False), {True, False}),
        (GraphOptions(few_rows=False), {True, False}),
    ],
)
def test_whatever_is_switched_off_the_tokens_are_right(qwen3, options, captured):
    settings = Settings(max_num_seqs=8, max_model_len=512, block_size=16, num_gpu_blocks=128)
    llm = LLM(qwen3.model, device="cuda", settings=settings, attention="triton", graph_options=options)
    runner: Any = llm.runner
    places: list[list[int]] = []
    launch = runner.launch

    def watched(batch: Any) -> Any:
        step = launch(batch)
        places.append(list(runner._places))
        return step

    runner.launch = watched
    prompts = [[3 + place % 400 for place in range(length)] for length in (20, 200, 60)]
    for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        logits = qwen3.model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 1e-3
    assert {bool(size.prompts) for size in runner._graphs} == captured
    assert places[-1] == ([2, 0, 1] if options.longest_first else [0, 1, 2])
    llm.close()
