"""Ranks that are processes: the tokens of transformers, the record of one device, and one end for all.

The processes of a number of ranks are started once for the module: what a test changes is the policies' alone. Where
what is served matters, and not how ranks begin and end, they are forked from a process that has imported torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from engine_judge import GREEDY, Judge, Watcher, judge_of, tiny
from forked_processes import forked
from guide_models import subject
from transformers import LlamaConfig, LlamaForCausalLM

from twinserve.engine.hub import chat_prompt, fetch
from twinserve.engine.llm import LLM
from twinserve.engine.online import Clock, Inbox, StepError, serve
from twinserve.engine.parallel import ranks
from twinserve.engine.parallel.ranks import RankError
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError, RunError
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.record import RunRecord, RunRecorder, load_record
from twinserve.traces.runs.replay import replay

ROOT = Path(__file__).resolve().parents[2]
WIDE = {"block_size": 16, "num_gpu_blocks": 256}
SETTINGS = Settings.load(WIDE)
NINE = {"hidden_size": 144, "intermediate_size": 96, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
"""Heads as of SmolLM2-135M."""
JUDGES: dict[int, Callable[[], Judge]] = {
    2: lambda: judge_of("llama"),
    3: lambda: Judge(tiny(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True, seed=5, **NINE)),
    4: lambda: judge_of("qwen3"),  # of which each of two KV heads is on two ranks
}


@contextmanager
def forked_ranks() -> Iterator[None]:
    """Ranks that are started here are forked from a process that has imported what they need, and end when it does."""
    context, parent = forked()

    def started(work, places, config, load):
        processes = [
            context.Process(target=work, args=(replace(place, parent=parent), config, load), daemon=True)
            for place in places
        ]
        for process in processes:
            process.start()
        return processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_started", started)
        yield


class Shared:
    """A model over some ranks, of which each test sets the policies."""

    def __init__(self, size: int, folder: Path, **options: Any):
        self.judge = JUDGES[size]()
        self.judge.model.save_pretrained(folder)
        self.folder = folder
        with forked_ranks():
            self.llm = LLM(folder, settings=SETTINGS, tensor_parallel_size=size, **options)

    def under(self, **settings: Any) -> LLM:
        """The model under policies of these settings."""
        limit = self.llm.settings.max_model_len
        self.llm.settings = Settings.load(WIDE | {"max_model_len": limit} | settings)
        return self.llm


@pytest.fixture(scope="module", params=[2, 3, 4])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(request.param, tmp_path_factory.mktemp("model"))
    yield made
    made.llm.close()


every_depth = pytest.mark.parametrize(
    ("shared", "depth"), [(2, 0), (2, 1), (3, 0), (3, 1), (4, 1)], indirect=["shared"]
)
"""Of ranks; at 4, where KV heads are on two ranks, decisions ahead of the steps alone, as four share few cores."""


def prompts_of(lengths: list[int], max_tokens: int) -> list[Request]:
    return [Request(i, 0, (Part(i, 0, length),), max_tokens) for i, length in enumerate(lengths)]


# --- the same tokens ---


@every_depth
def test_chunked_prompts_beside_decodes(shared, watcher, depth):
    llm = shared.under(pipeline_depth=depth, max_num_seqs=8, max_num_batched_tokens=48)
    sequences = llm.run_trace(prompts_of([1, 90, 7, 16, 33, 60, 2, 48], 10), params=GREEDY, recorder=watcher)
    assert watcher.chunks and watcher.mixed_steps and len(sequences) == 8
    shared.judge.check_all(sequences)


@every_depth
def test_shared_prefixes_and_preemptions(shared, watcher, depth):
    llm = shared.under(pipeline_depth=depth, num_gpu_blocks=11, max_num_batched_tokens=64, max_num_seqs=8)
    common = Part(100, 0, 33)
    requests = [Request(i, 0, (common, Part(i, 0, length)), 30) for i, length in enumerate([5, 10, 1, 12, 3])]
    sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher)
    assert watcher.preemptions and watcher.hit_tokens and len(sequences) == 5
    shared.judge.check_all(sequences)


WAYS = [
    SamplingParams(temperature=0.9, seed=1),
    SamplingParams(temperature=1.4, seed=2, top_k=12),
    SamplingParams(temperature=1.1, seed=3, min_p=0.02),
    SamplingParams(temperature=1.2, seed=4, top_p=0.8),
    SamplingParams(temperature=0.8, seed=5, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=0.0, logit_bias=((7, 2.5),), min_tokens=3),
]


def test_every_way_of_sampling_gives_what_one_device_gives(shared):
    """On the shards where no row needs all logits, and beside one that does."""
    prompts = [[5 + i, 9, 300 - i] * 4 for i in range(len(WAYS))]
    ways = [replace(way, max_tokens=12, ignore_eos=True) for way in WAYS]
    llm = shared.under(pipeline_depth=1)
    with closing(LLM(shared.folder, settings=SETTINGS, threads=1)) as alone:
        for some in (slice(0, 3), slice(None)):
            expected, found = (one.generate(prompts[some], ways[some]) for one in (alone, llm))
            assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for ours, theirs in zip(found[5].logprobs, expected[5].logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def recorded(llm: LLM, requests: list[Request], out: Path) -> RunRecord:
    """The record of requests that come in together, so that no decision hangs on when they do."""
    facts = llm.facts() | {"sampling": asdict(GREEDY)}
    with RunRecorder(out, world="real", settings=llm.settings.model_dump(), facts=facts) as recorder:
        core, inbox = llm.settings.build_core(eos_token_id=llm.eos_token_id, listener=recorder), Inbox()
        for request in requests:
            recorder.expect(request, GREEDY)
        inbox.put(*(request.to_sequence(GREEDY, llm.token_maker.token_ids(request, {})) for request in requests))
        inbox.close()
        serve(core, llm.runner, inbox, Clock(), lambda seq: None)
        recorder.close()
    return load_record(out)


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.endswith("_ns")} for row in rows]


@every_depth
def test_the_record_is_that_of_one_device_but_for_times_and_replays(shared, tmp_path, depth):
    settings = {"pipeline_depth": depth, "num_gpu_blocks": 11, "max_num_batched_tokens": 40, "max_num_seqs": 6}
    requests = prompts_of([33, 41, 7, 60, 20], 24)
    ours = recorded(shared.under(**settings), requests, tmp_path / "ours")
    with closing(LLM(shared.folder, settings=Settings.load(WIDE | settings), threads=1)) as alone:
        theirs = recorded(alone, requests, tmp_path / "theirs")
    assert any(step["preempted"] for step in ours.steps)
    assert without_times(ours.steps) == without_times(theirs.steps)
    assert without_times(ours.requests) == without_times(theirs.requests)
    assert ours.outputs == theirs.outputs
    again = replay(ours)
    assert again.difference is None and again.equal == again.recorded > 20
    size = shared.llm.options.tensor_parallel_size
    assert ours.run["facts"] == theirs.run["facts"] | {"tensor_parallel_size": size}


def test_int8_gives_the_tokens_of_one_device_in_int8(tmp_path):
    judge_of("llama").model.save_pretrained(tmp_path)
    prompts = [[5 + i, 9, 300 - i] * 7 for i in range(6)]
    found = []
    for size in (1, 2):
        options = {"quantization": "int8", "tensor_parallel_size": size, "threads": 1}
        with forked_ranks(), closing(LLM(tmp_path, settings=SETTINGS, **options)) as llm:
            assert llm.facts()["quantization"] == "int8"
            found.append([one.token_ids for one in llm.generate(prompts, replace(GREEDY, max_tokens=12))])
    assert found[0] == found[1]


def test_smollm2_over_three_ranks_gives_transformers_tokens():
    """Nine query heads and three KV heads: chunked, mixed, hit and preempted, at both depths."""
    judge, folder = Judge(subject("smollm2").model), fetch("smollm2-135m")
    common = Part(100, 0, 33)
    requests = [Request(i, 0, (common, Part(i, 0, length)), 12) for i, length in enumerate([30, 5, 16, 9])]
    settings = {"num_gpu_blocks": 9, "max_model_len": 128, "max_num_batched_tokens": 40, "max_num_seqs": 8}
    options = {"dtype": "float32", "tensor_parallel_size": 3}
    with forked_ranks(), closing(LLM(folder, settings=Settings.load(settings), **options)) as llm:
        for depth in (0, 1):
            llm.settings, watcher = Settings.load(settings | {"pipeline_depth": depth}), Watcher()
            sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher)
            assert watcher.chunks and watcher.mixed_steps and watcher.hit_tokens and watcher.preemptions
            assert len(sequences) == 4
            judge.check_all(sequences)
        prompt = chat_prompt(llm.tokenizer, "What is the capital of France?")
        (completion,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=30))
    assert completion.text == "The capital of France is Paris."


# --- how it ends ---


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"


def test_a_rank_that_is_killed_ends_all_with_its_reason():
    """In the middle of a step; nothing is served afterwards, and no process is left."""
    with forked_ranks():
        llm = LLM(judge_of("llama").model, settings=SETTINGS, tensor_parallel_size=2)
    (process,) = llm._ranks._processes
    begun = []

    class Killing(Watcher):
        def decided(self, batch):
            super().decided(batch)
            if batch.decision == 12:
                os.kill(process.pid, signal.SIGKILL)
                begun.append(time.monotonic())

    with pytest.raises(StepError, match=r"RankError: rank 1 has ended: killed by signal 9$"):
        llm.run_trace(prompts_of([30, 20], 900), params=GREEDY, recorder=Killing())
    assert time.monotonic() - begun[-1] < 60
    with pytest.raises(RunError, match="rank 1 has ended: killed by signal 9"):
        llm.generate([[5]], GREEDY)
    llm.close()
    assert is_gone(process.pid)


def test_who_waits_for_requests_hears_that_a_rank_has_ended():
    with forked_ranks():
        llm = LLM(judge_of("llama").model, settings=SETTINGS, tensor_parallel_size=2)
    live = llm.live()
    (process,) = llm._ranks._processes
    os.kill(process.pid, signal.SIGTERM)
    assert live.join(5)
    assert isinstance(live.error, RankError) and str(live.error) == "rank 1 has ended: killed by signal 15"
    llm.close()


def test_what_fails_in_a_rank_is_said(tmp_path):
    """A file that another rank cannot read any more."""
    judge_of("llama").model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises((InputError, RankError), match="expected safetensors"):
        LLM(tmp_path, settings=SETTINGS, tensor_parallel_size=2)


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def test_ctrl_c_leaves_no_process(tmp_path):
    """The signal goes to all processes, as from a terminal; rank 0 says what has happened, and nobody else a word."""
    judge_of("llama").model.save_pretrained(tmp_path)
    (tmp_path / "trace.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,20,900\n2023-11-16 18:30:00,20,900\n"
    )
    command = [sys.executable, "-m", "twinserve", "run", str(tmp_path / "trace.csv"), "--model", str(tmp_path)]
    command += ["--tensor-parallel-size", "2", "--num-gpu-blocks", "128"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        said = ""
        while "attention" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        children = children_of(process.pid)
        assert len(children) >= 1
        os.killpg(process.pid, signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == 130
    assert said.rstrip().endswith("twinserve: interrupted") and "Traceback" not in said
    limit = time.monotonic() + 60
    while not all(map(is_gone, children)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert all(map(is_gone, children))
