"""LLM: settings resolved, prompts completed in order, traces replayed in real time, errors told."""

from __future__ import annotations

import gc
import re
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

import pytest
import torch
from engine_judge import GREEDY, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.llm import LLM
from twinserve.engine.models import adopt_model
from twinserve.engine.online import StepError
from twinserve.engine.options import EngineOptions
from twinserve.policies import SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError, RunError
from twinserve.traces.request import Part, Request, TokenMaker

NO_DEVICES = ["gpu", "meta", "cpu:x", "cuda:01", "cuda:128"]


class Letters:
    """A tokenizer of letters, id 3 being "a"."""

    eos_token_id = 2

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) - ord("a") for letter in text]

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(token_id - 3 + ord("a")) for token_id in token_ids if token_id >= 3)


def test_open_settings_are_resolved(llama, serving):
    settings = serving(llama, num_gpu_blocks=None, block_size=32).settings
    assert settings.max_model_len == 1024
    assert settings.num_gpu_blocks == (1 << 30) // (2 * 4 * 32 * 2 * 32 * 4)
    assert serving(llama, max_model_len=100, num_gpu_blocks=7).settings.num_gpu_blocks == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"settings": Settings.load({"max_model_len": 1025})},
            "max_model_len is 1025, expected at most 1024, the model",
        ),
        (
            {"settings": Settings.load({"enable_chunked_prefill": False, "max_num_batched_tokens": 512})},
            "max_num_batched_tokens is 512, expected at least max_model_len (1024)",
        ),
        (
            {"dtype": "float64"},
            "dtype is 'float64', expected: Input should be 'auto', 'float32', 'bfl",
        ),
        ({"attention": "fast"}, "attention is 'fast', expected: Input should be 'auto', 'triton', 'flash' or 'sdpa'"),
        ({"execution": "graph"}, "execution is 'graph', expected: Input should be 'auto', 'graphs' or 'eager'"),
        ({"load_format": "empty"}, "load_format is 'empty', expected: Input should be 'auto' or 'dummy'"),
        ({"quantization": "int4"}, "quantization is 'int4', expected: Input should be 'none', 'int8' or 'fp8'"),
        ({"kv_cache_dtype": "fp16"}, "kv_cache_dtype is 'fp16', expected: Input should be 'auto' or 'fp8'"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5, expected: Input should be less than 1"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization is nan, expected: "),
        ({"seed": -1}, "seed is -1, expected: Input should be greater than or equal to 0"),
        ({"seed": 1 << 63}, "seed is 9223372036854775808, expected: Input should be less than"),
        ({"devise": "cpu"}, "devise is 'cpu', there is no such field, did you mean device?"),
        *(({"device": name}, f"device is '{name}', expected: cpu, cuda or cuda:N") for name in NO_DEVICES),
        ({"device": "cuda:99"}, "device is 'cuda:99', but torch finds"),
        ({"execution": "graphs"}, "device is 'cpu', expected cuda: graphs run on NVIDIA GPUs"),
        ({"attention": "flash"}, "device is 'cpu', expected cuda: flash-attn runs on NVIDIA GPUs"),
        ({"attention": "triton"}, "execution is 'auto', expected graphs: triton runs in no other"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is 'fp8', expected auto with sdpa"),
        (
            {"graph_options": GraphOptions(captured="none")},
            "graph_options is GraphOptions(captured='none', longest_first=True, few_rows=True, peer_sums=True), "
            "expected None where steps are no",
        ),
        ({"token_maker": TokenMaker(513, 3)}, "expected 0 <= first_id < vocab_size <= 512"),
        ({"token_maker": TokenMaker(512, 1)}, "expected ids without 2, which ends a text"),
    ],
)
def test_what_cannot_be_used_is_refused_before_weights_are_read(llama, tmp_path, arguments, message):
    """The folder has none, so they would be missed first."""
    llama.model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for model in (llama.model, tmp_path):
        with pytest.raises(InputError, match=re.escape(message)):
            LLM(model, **arguments)
    with pytest.raises(InputError, match="no weights"):
        LLM(tmp_path)


def test_a_model_that_is_not_there_is_refused_after_the_options(tmp_path):
    with pytest.raises(InputError, match="execution is 'graph'"):
        LLM(tmp_path / "nowhere", execution="graph")
    with pytest.raises(InputError, match="nowhere/config.json: cannot be read"):
        LLM(tmp_path / "nowhere")


def test_options_are_kept_and_are_facts_as_they_are_in_use(llama):
    given = {"device": "cpu", "dtype": "bfloat16", "gpu_memory_utilization": 0.5, "seed": 3, "quantization": None}
    llm = LLM(llama.model, settings=Settings(num_gpu_blocks=8), **given)
    assert llm.options == EngineOptions(model="LlamaForCausalLM", dtype="bfloat16", gpu_memory_utilization=0.5, seed=3)
    facts = llm.facts()
    assert {name: facts[name] for name in EngineOptions.model_fields} == {
        "model": "LlamaForCausalLM", "device": "cpu", "dtype": "bfloat16", "attention": "sdpa", "execution": "eager",
        "load_format": "auto", "quantization": "none", "kv_cache_dtype": "bfloat16", "gpu_memory_utilization": 0.5,
        "seed": 3, "tensor_parallel_size": 1,
    }  # fmt: skip
    llm.close()


def test_completions_come_in_the_order_of_their_prompts(llama, serving):
    llm = serving(llama, max_model_len=64, num_gpu_blocks=8)
    prompts = [[7] * 30, [8, 9], [4] * 70, [5], []]
    params = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=n) for n in (20, 3, 5, 9, 4)]
    completions = llm.generate(prompts, params)
    assert [c.finish_reason for c in completions] == ["length", "length", "refused", "length", "refused"]
    assert [len(c.token_ids) for c in completions] == [20, 3, 0, 9, 0]
    assert completions[2].refusal == "prompt of 70 tokens, but max_model_len is 64"
    assert completions[4].refusal == "the prompt has no tokens"
    for index in (0, 1, 3):
        llama.check(prompts[index], completions[index].token_ids)


def test_a_streams_tokens_come_one_after_the_other_and_are_those_of_the_completion(llama, serving):
    llm, prompt = serving(llama, max_model_len=64), [7] * 30
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=12)
    (whole,) = llm.generate([prompt], params)
    pieces, stream = [], llm.stream(prompt, params)
    with pytest.raises(StopIteration) as end:
        while True:
            pieces.append(next(stream))
    assert end.value.value.token_ids == whole.token_ids == [token for piece in pieces for token in piece]
    assert len(pieces) == 12
    with pytest.raises(StopIteration) as end:
        next(llm.stream([7] * 70, params))
    assert end.value.value.finish_reason == "refused"


def test_a_stream_that_is_closed_aborts_its_request(llama, serving):
    llm = serving(llama)
    stream = llm.stream([7] * 30, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=900))
    first = next(stream)
    stream.close()
    (after,) = llm.generate([[7] * 30], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1))
    assert after.token_ids == first
    while not llm._live.core.is_idle:
        time.sleep(0.001)
    assert llm.runner.num_launched < 900, "its steps were not all taken"


def test_a_call_hits_the_prefixes_of_the_calls_before_it_unless_another_core_has_run(llama, serving):
    """It may have overwritten them."""
    llm, prompt = serving(llama, num_gpu_blocks=16), list(range(5, 65))
    before = llm.generate([prompt], GREEDY)[0]
    again = llm.generate([prompt], GREEDY)[0]
    assert (before.num_cached_tokens, again.num_cached_tokens) == (0, 48)
    core = llm.settings.build_core()
    core.ingest(Sequence([9] * 150, GREEDY), 0)
    while not core.is_idle:
        core.commit(llm.runner.execute(core.decide(0)), 0)
    assert llm.generate([prompt], GREEDY) == [before]
    assert again.token_ids == before.token_ids
    llama.check(prompt, before.token_ids)
    llm.run_trace([Request(0, 0, (Part(0, 0, 150),), 5)], params=GREEDY)
    assert llm.generate([prompt, prompt], GREEDY)[0] == before


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_threads_get_the_tokens_of_their_own_prompts(llama, serving, pipeline_depth):
    llm = serving(llama, pipeline_depth=pipeline_depth, num_gpu_blocks=24, max_num_seqs=6)
    prompts = [[5 + i] * (10 + 7 * i) for i in range(8)]
    params = [SamplingParams(temperature=0.0, max_tokens=10 + i, ignore_eos=True, logprobs=1) for i in range(8)]
    alone = [llm.generate([prompt], own)[0] for prompt, own in zip(prompts, params, strict=True)]

    def ask(place):
        return llm.generate([prompts[place], prompts[-1 - place]], [params[place], params[-1 - place]])

    with ThreadPoolExecutor(8) as threads:
        for place, (own, other) in enumerate(threads.map(ask, [*range(8)] * 3)):
            place %= 8
            assert own.token_ids == alone[place].token_ids and other.token_ids == alone[-1 - place].token_ids
            assert len(own.logprobs) == 10 + place
    assert not llm.runner.logprobs


def test_a_step_that_fails_ends_what_is_served_and_the_next_call_is_served(llama, serving, monkeypatch):
    llm = serving(llama)
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner.model, "logits", lambda hidden: torch.full((), torch.nan)[5])
        with pytest.raises(StepError, match=r"step 0 failed \(2 rows"):
            llm.generate([[5, 6], [7, 8]], GREEDY)
    llama.check([5, 6], llm.generate([[5, 6]], GREEDY)[0].token_ids)


def test_aborted_sequences_free_their_blocks_and_a_closed_core_takes_no_more(llama, serving):
    llm = serving(llama, num_gpu_blocks=64)
    live, heard = llm.live(), SimpleQueue()
    seqs = [Sequence([5 + i] * 20, SamplingParams(max_tokens=900, ignore_eos=True)) for i in range(3)]
    live.submit(lambda now_ns: seqs, heard.put)
    heard.get(timeout=60)
    live.abort(seqs[:2])
    live.abort(seqs)
    live.close()
    assert [seq.finish_reason for seq in seqs] == ["abort"] * 3
    assert live.core.scheduler.block_manager.num_used_blocks == 0
    with pytest.raises(RunError, match="nothing more is served"):
        live.submit(lambda now_ns: [Sequence([5])], heard.put)


def test_a_model_that_nobody_holds_any_more_ends_its_loop(llama):
    llm = LLM(llama.model, settings=Settings.load({"num_gpu_blocks": 8}))
    llm.generate([[5]], GREEDY)
    thread = llm._live._thread
    del llm
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_closed_llm_holds_its_runner_and_so_the_pool_no_more_than_its_attribute_does(llama):
    llm = LLM(llama.model, settings=Settings.load({"num_gpu_blocks": 16}))
    llm.generate([[5, 6, 7]], GREEDY)
    runner = weakref.ref(llm.runner)
    llm.close()
    del llm.runner
    gc.collect()
    assert runner() is None


def test_texts_are_encoded_and_decoded(llama):
    llm = LLM(llama.model, tokenizer=Letters(), settings=Settings.load({"num_gpu_blocks": 8}))
    completion = llm.generate(["abc"], SamplingParams(temperature=0.0, max_tokens=8))[0]
    llm.close()
    llama.check([3, 4, 5], completion.token_ids)
    assert completion.text == Letters().decode(completion.token_ids, True) != ""
    assert completion.num_prompt_tokens == 3


def test_without_max_tokens_an_answer_goes_on_to_the_models_length(llama, serving):
    (completion,) = serving(llama, max_model_len=50).generate([[5, 6, 7]], replace(GREEDY, max_tokens=None))
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 47)


def test_bad_prompts_are_refused(llama, serving):
    llm = serving(llama)
    with pytest.raises(InputError, match=re.escape("a token of prompts[1] is 512, expected an id from 0 to 511")):
        llm.generate([[1], [512]], GREEDY)
    with pytest.raises(InputError, match="the number of sampling_params is 1, expected one, or one for each of 2"):
        llm.generate([[1], [2]], [GREEDY])
    assert llm.generate([], GREEDY) == []


def test_every_id_that_ends_a_text_ends_it(llama):
    prompt = [5, 9, 300, 17]
    tokens = llama.generate(prompt, 20)
    model = tiny(LlamaForCausalLM, LlamaConfig, eos_token_id=[2, tokens[6]])
    llm = LLM(model, settings=Settings.load({"num_gpu_blocks": 64}))
    assert llm.eos_token_ids == (2, tokens[6])
    completion = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=20))[0]
    assert (completion.finish_reason, completion.token_ids) == ("stop", tokens[: tokens.index(tokens[6]) + 1])
    assert len(llm.generate([prompt], GREEDY)[0].token_ids) == GREEDY.max_tokens
    made = llm.token_maker.token_ids(Request(0, 0, (Part(0, 0, 5000),), 1), {})
    assert not set(made) & set(llm.eos_token_ids)
    llm.close()


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_seeded_requests_repeat_whatever_runs_beside_them(llama, serving, watcher, pipeline_depth):
    def params(seed):
        return SamplingParams(temperature=1.5, top_k=40, top_p=0.95, seed=seed, max_tokens=40, ignore_eos=True)

    prompts = [[5 + i] * (20 + 3 * i) for i in range(5)]
    roomy = serving(llama, pipeline_depth=pipeline_depth)
    alone = [roomy.generate([prompt], params(i))[0].token_ids for i, prompt in enumerate(prompts)]
    tight = serving(llama, pipeline_depth=pipeline_depth, num_gpu_blocks=8, max_num_batched_tokens=40, max_num_seqs=6)
    beside = tight.generate([*prompts, [9, 9]], [*map(params, range(5)), SamplingParams(max_tokens=30)])
    assert [completion.token_ids for completion in beside[:5]] == alone
    assert len({tuple(roomy.generate([prompts[0]], params(seed))[0].token_ids) for seed in range(3)}) == 3


def test_runs_without_seeds_repeat_with_the_engine(llama, serving):
    params = SamplingParams(temperature=2.0, max_tokens=20)
    first, again, other = (
        [c.token_ids for c in serving(llama, seed=seed).generate([[4], [5], [6]], params)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_requests_come_in_when_they_arrive(llama, serving):
    llm = serving(llama)
    requests = [Request(i, i * 20_000_000, (Part(i, 0, 10),), 3) for i in range(4)]
    for scale in (1.0, 3.0):
        ended = []
        served = llm.run_trace(requests, params=GREEDY, time_scale=scale, progress=ended.append)
        assert served == ended and len(served) == 4
        for seq in served:
            assert seq.arrival_ns == round(scale * 20_000_000) * seq.seq_id
            assert seq.ingested_ns >= seq.arrival_ns


def test_steps_have_their_times(llama, serving, watcher):
    batches = []
    watcher.committed = batches.append
    serving(llama).run_trace([Request(0, 0, (Part(0, 0, 9),), 5)], params=GREEDY, recorder=watcher)
    assert len(batches) == 5
    for batch, following in zip(batches, batches[1:], strict=False):
        assert batch.decided_ns < batch.start_ns < batch.end_ns < following.decided_ns


def test_what_goes_wrong_while_requests_come_in_is_raised(llama, serving, watcher):
    def expect(request, sampling):
        raise OSError(f"disk full at request {request.id}")

    watcher.expect = expect
    llm = serving(llama)
    with pytest.raises(OSError, match="disk full at request 0"):
        llm.run_trace([Request(0, 0, (Part(0, 0, 9),), 5)], params=GREEDY, recorder=watcher)


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_what_goes_wrong_in_a_step_is_raised_and_ends_the_run(llama, serving, monkeypatch, pipeline_depth):
    llm = serving(llama, pipeline_depth=pipeline_depth)
    requests = [Request(0, 0, (Part(0, 0, 9),), 5), Request(1, 3600 * 10**9, (Part(1, 0, 9),), 5)]
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner.model, "logits", lambda hidden: torch.full((), torch.nan)[5])
        with pytest.raises(
            StepError, match=r"step \d+ failed \(1 rows, 9 tokens, 9 .*requests 0\): IndexError"
        ) as caught:
            llm.run_trace(requests, params=GREEDY)
    assert isinstance(caught.value.__cause__, IndexError)
    assert len(llm.run_trace(requests[:1], params=GREEDY)) == 1


def test_a_decoder_is_taken_as_it_is(llama):
    decoder = adopt_model(llama.model, dtype=torch.bfloat16)
    llm = LLM(decoder, settings=Settings.load({"num_gpu_blocks": 8}), threads=torch.get_num_threads())
    assert llm.runner.model is decoder
    assert llm.facts()["dtype"] == "bfloat16"
    assert llm.facts()["tokens"] == {"vocab_size": 512, "first_id": 3, "seed": 0}
    assert llm.facts()["eos_token_id"] == 2
    assert len(llm.generate([[5, 6, 7]], GREEDY)[0].token_ids) == 64
    llm.close()


def test_warming_up_changes_no_token(llama, serving):
    llm = serving(llama, max_num_batched_tokens=64, max_num_seqs=8)
    steps = []
    launch = llm.runner.launch
    llm.runner.launch = lambda batch: (steps.append((len(batch.rows), batch.num_tokens)), launch(batch))[1]
    llm.warm_up()
    assert max(tokens for _, tokens in steps) == 64
    assert {rows for rows, tokens in steps if tokens == rows} >= set(range(1, 9))
    llama.check([5, 6, 7], llm.generate([[5, 6, 7]], GREEDY)[0].token_ids)
