"""Drafts on CUDA: steps that are graphs give the tokens of steps that are launched kernel by kernel."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from engine_judge import GREEDY, Judge, judge_of, tiny
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from twinserve.engine.llm import LLM
from twinserve.engine.speculation.proposers import ForcedProposer
from twinserve.policies import SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.request import Part, Request

pytestmark = pytest.mark.gpu

K = 3
every_depth = pytest.mark.parametrize("depth", [0, 1])
every_proposer = pytest.mark.parametrize("proposer", ["ngram", "draft_model", "itself", "forced"])


@pytest.fixture
def speculating():
    """Makes LLMs that draft on the device, and closes them."""
    made: list[LLM] = []

    def make(judge: Judge, proposer: str, depth: int, execution: str, **settings: Any) -> LLM:
        config: dict = {"method": "ngram_gpu", "num_speculative_tokens": K, "prompt_lookup_min": 1}
        draft = None
        if proposer in ("draft_model", "itself"):
            config = {"method": "draft_model", "num_speculative_tokens": K, "model": "given"}
            draft = judge.model if proposer == "itself" else tiny(LlamaForCausalLM, LlamaConfig, num_hidden_layers=1)
        values = {"block_size": 16, "num_gpu_blocks": 256, "pipeline_depth": depth, "speculative_config": config}
        options: dict[str, Any] = {"device": "cuda", "execution": execution, "dtype": "float32"}
        options["attention"] = "triton" if execution == "graphs" else "sdpa"
        llm = LLM(judge.model, settings=Settings.load(values | settings), draft=draft, **options)
        made.append(llm)
        names = {"graphs": "GraphSpeculativeRunner", "eager": "SpeculativeRunner"}
        assert type(llm.runner).__name__ == names[execution]
        if proposer == "forced":

            def text_of(seq: Sequence) -> list[int]:
                prompt = seq.token_ids[: seq.num_prompt_tokens]
                return prompt + judge.generate(prompt, seq.sampling_params.max_tokens + K)

            llm.runner._proposer = ForcedProposer(text_of, 0.7, 512)
        return llm

    yield make
    for llm in made:
        llm.close()


class Made:
    """A recorder that only counts what came of drafts."""

    def __init__(self, watcher) -> None:
        self.watcher = watcher
        self.made: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self.watcher, name)

    def committed(self, batch) -> None:
        self.made += [made for _, made, _ in batch.runs]


@every_depth
@every_proposer
def test_tokens_of_graphs_are_those_of_eager_steps_and_of_the_model(speculating, watcher, proposer, depth):
    """Chunks of prompts, prefix hits and preemptions beside rows with drafts."""
    judge = judge_of("llama")
    shared = Part(100, 0, 60)
    requests = [Request(i, 0, (shared, Part(i, 0, length)), 24) for i, length in enumerate([1, 40, 7, 16, 33, 80, 2])]
    requests.append(Request(7, 0, requests[5].parts, 24))
    how = {"num_gpu_blocks": 24, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    answers = []
    for execution in ("eager", "graphs"):
        heard = Made(watcher)
        llm = speculating(judge, proposer, depth, execution, **how)
        sequences = llm.run_trace(requests, params=GREEDY, recorder=heard)
        judge.check_all(sequences)
        assert heard.made
        if proposer in ("itself", "forced"):
            assert max(heard.made) == K + 1
        answers.append({seq.seq_id: seq.completion_token_ids for seq in sequences})
    assert watcher.chunks and watcher.preemptions and watcher.hit_tokens
    assert answers[0] == answers[1]


@every_depth
def test_seeds_penalties_and_logprobs_are_those_of_eager_steps(speculating, depth):
    judge = judge_of("llama")
    prompts = [[5 + i, 9, 300 - i] * 4 for i in range(4)]
    ways: list[dict] = [
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 3},
    ]
    params = [SamplingParams(seed=7 + i, max_tokens=24, **way) for i, way in enumerate(ways)]
    eager, graphs = (
        speculating(judge, "ngram", depth, execution).generate(prompts, params) for execution in ("eager", "graphs")
    )
    for one, other in zip(eager, graphs, strict=True):
        assert one.token_ids == other.token_ids
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


def test_a_step_without_prompts_is_one_graph_launch(speculating):
    judge = judge_of("llama")
    llm = speculating(judge, "forced", 0, "graphs", max_num_seqs=8)
    llm.warm_up()
    core = llm.settings.build_core()
    for number in range(6):
        core.ingest(Sequence([5 + number] * 20, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)), 0)

    def step() -> None:
        batch = core.decide(0)
        core.commit(llm.runner.launch(batch).result(), 0)

    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    counted: Counter[str] = Counter({event.key: event.count for event in profiler.key_averages()})
    assert counted["cudaGraphLaunch"] == 5
    assert max(core.scheduler.running, key=lambda seq: seq.num_tokens).num_completion_tokens > 8, "runs are accepted"


def test_float8_kv_is_refused_with_drafts(speculating):
    config = {"method": "ngram", "num_speculative_tokens": K}
    with pytest.raises(InputError, match="kv_cache_dtype is 'fp8', expected auto with speculative_config"):
        LLM(
            judge_of("llama").model,
            settings=Settings.load({"speculative_config": config}),
            device="cuda",
            dtype="bfloat16",
            kv_cache_dtype="fp8",
        )
