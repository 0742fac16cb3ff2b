"""The CUDA engine as its benchmarks have it, and the requests that it serves against the clock."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from twinserve.engine.llm import LLM
from twinserve.engine.online import Clock, Inbox, serve
from twinserve.policies import Batch, CoreListener, SamplingParams, Sequence
from twinserve.settings.build_core import Settings

MODEL = "qwen3-0.6b"
TEMPERATURE = 0.6


@dataclass
class Work:
    """Requests that come at once.

    Attributes:
        prompts: token ids of each.
        outputs: tokens that each generates, whatever they are.
        kept: what top-k, top-p and min-p are, by name.
    """

    prompts: list[list[int]]
    outputs: list[int]
    kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def w256(cls) -> Work:
        """256 requests of 100 to 1,024 tokens in and out: the workload that nano-vllm's own benchmark serves."""
        generator = random.Random(0)
        prompts = [[generator.randint(0, 10000) for _ in range(generator.randint(100, 1024))] for _ in range(256)]
        return cls(prompts, [generator.randint(100, 1024) for _ in range(256)])

    @classmethod
    def of_lengths(cls, lengths: list[tuple[int, int]]) -> Work:
        """Requests of these lengths in and out."""
        generator = random.Random(0)
        prompts = [[generator.randint(0, 10000) for _ in range(prompt)] for prompt, _ in lengths]
        return cls(prompts, [output for _, output in lengths])

    def params(self) -> list[SamplingParams]:
        how = {"temperature": TEMPERATURE, "ignore_eos": True} | self.kept
        return [SamplingParams(max_tokens=output, **how) for output in self.outputs]


@dataclass
class StepClock(CoreListener):
    """Counts steps, and the time that the device spends in them."""

    steps: int = 0
    device_ns: int = 0

    def committed(self, batch: Batch) -> None:
        self.steps += 1
        self.device_ns += (batch.end_ns or 0) - (batch.start_ns or 0)


def make_llm(model: str = MODEL, **options: Any) -> LLM:
    """The engine with random weights, as the benchmarks have it unless `options` say otherwise."""
    settings = {
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "max_model_len": 2048,
        "pipeline_depth": 1,
    } | options.pop("settings", {})
    defaults = {"load_format": "dummy", "dtype": "bfloat16", "device": "cuda"}
    return LLM(model, settings=Settings.load(settings), **(defaults | options))


def throughput(llm: LLM, work: Work) -> dict[str, Any]:
    """Serve the work once: from the first request's coming to the last token's reading."""
    sequences = [
        Sequence(prompt, params, seq_id=number)
        for number, (prompt, params) in enumerate(zip(work.prompts, work.params(), strict=True))
    ]
    listener = StepClock()
    core = llm.settings.build_core(listener=listener)
    inbox, clock = Inbox(), Clock()
    for seq in sequences:
        inbox.put(seq)
    inbox.close()
    if llm.runner.device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    serve(core, llm.runner, inbox, clock, lambda seq: None)
    seconds = time.perf_counter() - begun
    core.scheduler.check_integrity()
    tokens = sum(seq.num_completion_tokens for seq in sequences)
    assert tokens == sum(work.outputs), f"{tokens} tokens came, {sum(work.outputs)} were asked for"
    return {
        "seconds": round(seconds, 4),
        "prompt_tokens": sum(map(len, work.prompts)),
        "output_tokens": tokens,
        "output_tok_s": round(tokens / seconds, 1),
        "steps": listener.steps,
        "device_share": round(listener.device_ns / 1e9 / seconds, 4),
        "preemptions": sum(seq.num_preemptions for seq in sequences),
    }


def close(llm: LLM) -> None:
    """Give the device's memory back."""
    llm.close()
    del llm.runner
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
