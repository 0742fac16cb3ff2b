"""Ranks on several CUDA devices: graphs with NCCL inside, and steps that are launched kernel by kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_faults import check_abort_while_its_token_is_in_flight
from engine_judge import GREEDY, Judge, Watcher, judge_of

from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.llm import LLM
from twinserve.engine.online import StepError
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import RunError
from twinserve.traces.request import Part, Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

RANKS = 2
every_execution = pytest.mark.parametrize("execution", ["graphs", "eager"])
every_depth = pytest.mark.parametrize("depth", [0, 1])


@pytest.fixture
def over_ranks() -> Iterator[Callable[..., LLM]]:
    """Makes LLMs over so many devices, and closes them."""
    made: list[LLM] = []

    def make(
        judge: Judge,
        execution: str,
        size: int = RANKS,
        dtype: str = "float32",
        graph_options: GraphOptions | None = None,
        **settings: Any,
    ) -> LLM:
        values = {"block_size": 16, "num_gpu_blocks": 256, "max_num_seqs": 8} | settings
        options: dict[str, Any] = {"attention": "triton" if execution == "graphs" else "sdpa", "execution": execution}
        options |= {"device": "cuda", "dtype": dtype, "tensor_parallel_size": size}
        made.append(LLM(judge.model, settings=Settings.load(values), graph_options=graph_options, **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def requests_of(lengths: list[int], max_tokens: int) -> list[Request]:
    common = Part(100, 0, 33)
    return [Request(i, 0, (common, Part(i, 0, length)), max_tokens) for i, length in enumerate(lengths)]


@every_execution
@every_depth
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_chunks_hits_and_preemptions_change_no_token(over_ranks, name, execution, depth):
    judge, watcher = judge_of(name), Watcher()
    llm = over_ranks(judge, execution, pipeline_depth=depth, num_gpu_blocks=14, max_num_batched_tokens=48)
    assert type(llm.runner).__name__ == {"graphs": "ShardedGraphRunner", "eager": "ShardedRunner"}[execution]
    sequences = llm.run_trace(requests_of([1, 60, 7, 16, 33, 2], 24), params=GREEDY, recorder=watcher)
    assert watcher.chunks and watcher.mixed_steps and watcher.hit_tokens and watcher.preemptions
    assert len(sequences) == 6
    judge.check_all(sequences)


@pytest.mark.parametrize("peer_sums", [True, False])
def test_sums_by_memory_and_by_nccl_leave_every_token_as_it_is(over_ranks, peer_sums):
    judge = judge_of("llama")
    llm = over_ranks(judge, "graphs", graph_options=GraphOptions(peer_sums=peer_sums), max_num_batched_tokens=48)
    assert (llm.runner._decoder._sums is not None) == peer_sums
    judge.check_all(llm.run_trace(requests_of([60, 7, 33, 1], 24), params=GREEDY))


@every_execution
def test_every_way_of_sampling_gives_what_one_device_gives(over_ranks, execution):
    ways = [
        SamplingParams(temperature=0.9, seed=1),
        SamplingParams(temperature=1.4, seed=2, top_k=12),
        SamplingParams(temperature=1.1, seed=3, min_p=0.02),
        SamplingParams(temperature=1.2, seed=4, top_p=0.8),
        SamplingParams(temperature=0.8, seed=5, repetition_penalty=1.3, presence_penalty=0.5),
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(temperature=0.0, logit_bias=((7, 2.5),), min_tokens=3),
    ]
    ways = [replace(way, max_tokens=16, ignore_eos=True) for way in ways]
    prompts = [[5 + i, 9, 300 - i] * 4 for i in range(len(ways))]
    judge = judge_of("llama")
    tokens = [
        [one.token_ids for one in over_ranks(judge, execution, size, pipeline_depth=1).generate(prompts, ways)]
        for size in (1, RANKS)
    ]
    assert tokens[0] == tokens[1]


@every_execution
def test_in_bfloat16_log_probabilities_are_as_near_as_those_of_one_device(over_ranks, execution):
    """Held against float32 on one device: sums in another order round otherwise, and no further off."""
    judge, params = judge_of("llama"), replace(GREEDY, max_tokens=1, logprobs=0)
    prompts = [[5 + i, 9, 300 - i] * 7 for i in range(16)]

    def logprobs(dtype: str, size: int) -> list[float]:
        found = over_ranks(judge, execution, size, dtype).generate(prompts, params)
        return [one.logprobs[0].logprob for one in found]

    exact, alone, ours = logprobs("float32", 1), logprobs("bfloat16", 1), logprobs("bfloat16", RANKS)
    off_alone, off_ours = (
        sum(abs(own - best) for own, best in zip(some, exact, strict=True)) / len(exact) for some in (alone, ours)
    )
    assert off_ours < 2 * off_alone + 1e-3


@every_execution
def test_an_abort_while_a_token_is_in_flight(over_ranks, execution):
    check_abort_while_its_token_is_in_flight(over_ranks(judge_of("llama"), execution, pipeline_depth=1))


@every_execution
def test_a_rank_that_is_killed_ends_all_with_its_reason(over_ranks, execution):
    """Within five seconds, though NCCL would wait for ever."""
    llm = over_ranks(judge_of("llama"), execution, pipeline_depth=1)
    (process,) = llm._ranks._processes
    killed = []

    class Killing(Watcher):
        def decided(self, batch):
            super().decided(batch)
            if batch.decision == 40:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(time.monotonic())

    with pytest.raises((StepError, RunError), match="rank 1 has ended: killed by signal 9"):
        llm.run_trace(requests_of([30, 20], 900), params=GREEDY, recorder=Killing())
    assert time.monotonic() - killed[0] < 5


@every_execution
def test_who_waits_for_requests_hears_of_a_rank_that_is_killed(over_ranks, execution):
    llm = over_ranks(judge_of("llama"), execution)
    live = llm.live()
    (process,) = llm._ranks._processes
    os.kill(process.pid, signal.SIGKILL)
    assert live.join(5)
    assert str(live.error) == "rank 1 has ended: killed by signal 9"


SCRIPT = """
import sys

from twinserve.engine.llm import LLM
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings

settings = Settings(num_gpu_blocks=64, max_model_len=256, max_num_seqs=4)
llm = LLM("qwen3-0.6b", load_format="dummy", device="cuda", tensor_parallel_size=2, settings=settings)
print(len(llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))[0].token_ids))
if sys.argv[1] == "closed":
    llm.close()
"""


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_a_process_that_has_served_in_graphs_ends(how):
    """NCCL waits for every graph that holds something of it, so the graphs have to go first."""
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["9"]), done.stderr
    assert how == "forgotten" or "destroy_process_group" not in done.stderr
