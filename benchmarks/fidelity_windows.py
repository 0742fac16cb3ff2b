"""The windows in which the twin is held against the engine: workloads, settings and loads.

Settings come as an array in which each pair of values occurs: composition, token budget, block size, prefix cache,
sequences, and a pool that is ample or so small that it preempts. Loads are shares of what a workload saturates at under
the same settings, which is measured first. A budget of 512 beside 1,024 sequences is none: each has to have a token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from twinserve.policies import Sequence
from twinserve.settings.build_core import Settings
from twinserve.traces import transforms
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.readers import read_trace
from twinserve.traces.request import Request

WINDOW_S = 20.0
"""Seconds in which the requests of a window arrive."""

FILES = {"azure": "azure/AzureLLMInferenceTrace_conv.csv", "mooncake": "mooncake/conversation_trace.jsonl.gz"}
"""Public traces, beneath the folder that holds them."""

FIRST = {"azure": 2000, "mooncake": 500}
"""Where a window begins in its trace: past its start, in which the prompts of Mooncake share little."""

MOST = {"azure": (4096, 1000), "mooncake": (3500, 500)}
"""To how many tokens prompts and outputs of a public trace are cut."""

MODEL_LEN = 8192


@dataclass(frozen=True)
class Group:
    """Windows of one workload and one set of settings.

    Attributes:
        tokens, seqs: max_num_batched_tokens and max_num_seqs.
        guess: requests a second that are surely more than can be served.
        repeated: loads that are served twice.
    """

    shape: str
    workload: str
    composition: Literal["mixed", "prefill-first"]
    tokens: int
    seqs: int
    block_size: int
    has_cache: bool
    blocks: int
    loads: tuple[float, ...]
    guess: float
    repeated: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Workload and settings in one word."""
        cache = "cache" if self.has_cache else "nocache"
        limits = f"{self.tokens}t-{self.seqs}s-b{self.block_size}-{cache}-{self.blocks}blocks"
        return f"{self.shape}-{self.workload}-{self.composition}-{limits}"

    @property
    def overload_s(self) -> tuple[float, float]:
        """Seconds of overload from which on, and until which, what is served is counted: as many run by then as may,
        and prompts come in as fast as others end."""
        return (2.5, 7.0) if self.shape == SMALL else (15.0, 30.0)

    @property
    def profile(self) -> str:
        """The name of the profile that its windows are predicted from."""
        return f"profile-{self.shape}-b{self.block_size}"

    @property
    def windows(self) -> list[tuple[str, float]]:
        """The name and the load of each window."""
        named = [(f"{self.name}-{load:.2f}", load) for load in self.loads]
        return named + [(f"{self.name}-{load:.2f}-again", load) for load in self.repeated]

    def build_settings(self) -> Settings:
        return Settings(
            composition=self.composition,
            max_num_batched_tokens=self.tokens,
            max_num_seqs=self.seqs,
            block_size=self.block_size,
            enable_prefix_caching=self.has_cache,
            num_gpu_blocks=self.blocks,
            enable_chunked_prefill=True,
            max_model_len=MODEL_LEN,
            pipeline_depth=1,
        )

    def overload(self) -> list[Request]:
        """More of the workload than can be served, all of it there before the overload ends."""
        seconds = self.overload_s[1]
        requests = self.requests(self.guess, seconds)
        return [request for request in requests if request.arrival_ns < seconds * 0.97e9]

    def requests(self, rate: float, seconds: float = WINDOW_S) -> list[Request]:
        """The workload at so many requests a second, for so many seconds.

        Raises:
            InputError: the trace cannot be read.
        """
        count = math.ceil(rate * seconds)
        if self.workload == "bursty":
            return generate(
                seed=1,
                num_requests=count,
                rate=rate,
                arrivals="gamma",
                cv=3.0,
                prompt_tokens=LengthSpec(800, 1.0, 16, 4000),
                output_tokens=LengthSpec(150, 0.8, 4, 800),
            )
        if self.workload == "sessions":
            return generate(
                seed=2,
                num_requests=count,
                rate=rate,
                num_system_prompts=4,
                system_prompt_tokens=256,
                prompt_tokens=LengthSpec(250, 1.0, 16, 1000),
                output_tokens=LengthSpec(120, 0.5, 8, 400),
                turns=4,
                think_time_s=1.0,
            )
        trace = read_trace(traces_folder() / FILES[self.workload]).requests
        first = FIRST[self.workload]
        chosen = trace[first : first + count + 1]
        log: transforms.TransformLog = []
        prompts, outputs = MOST[self.workload]
        chosen = transforms.renumbered(chosen)
        chosen = transforms.cap_prompt_tokens(chosen, prompts, log)
        chosen = transforms.cap_output_tokens(chosen, outputs, log)
        if self.workload == "mooncake":
            chosen = transforms.spread(chosen, 0, log)
        return at_rate(chosen, rate)


def at_rate(requests: Seq[Request], rate: float) -> list[Request]:
    """All requests but the last, the first of them at 0, so many a second up to where the last would come."""
    begin, count = requests[0].arrival_ns, len(requests) - 1
    scale = count / rate * 1e9 / (requests[-1].arrival_ns - begin)
    moved = [replace(request, arrival_ns=round((request.arrival_ns - begin) * scale)) for request in requests[:count]]
    return list(transforms.renumbered(moved))


def served_rate(seqs: list[Sequence], requests: list[Request], counted_s: tuple[float, float]) -> float:
    """Requests a second that are served while more come in: by the tokens that were generated within `counted_s`, each
    request's from its first to its last as if at equal distances."""
    start, stop = counted_s
    tokens = 0.0
    for seq in seqs:
        begin, end = (seq.first_token_ns or 0) / 1e9, (seq.finish_ns or 0) / 1e9
        if seq.num_completion_tokens > 1 and end > begin:
            share = max(0.0, min(end, stop) - max(begin, start)) / (end - begin)
            tokens += seq.num_completion_tokens * share
    each = sum(request.max_tokens for request in requests) / len(requests)
    return round(tokens / each / (stop - start), 3)


def has_trace(group: Group) -> bool:
    """Is there what the workload of a group is made from?"""
    return group.workload not in FILES or (traces_folder() / FILES[group.workload]).is_file()


def traces_folder() -> Path:
    """The folder of the public traces."""
    return Path(os.environ.get("TWINSERVE_TRACES", "."))


SMALL, LARGE = "qwen3-0.6b", "llama-3-8b"

GROUPS = [
    Group(SMALL, "azure", "mixed", 2048, 256, 16, True, 60_000, (0.95, 0.8, 0.73, 0.62, 0.39), 200, (0.95, 0.73, 0.62)),
    Group(SMALL, "mooncake", "mixed", 8192, 256, 16, True, 60_000, (0.95, 0.8, 0.5, 0.42, 0.26), 100, (0.5,)),
    Group(SMALL, "bursty", "mixed", 2048, 64, 16, True, 60_000, (0.8, 0.5), 200, (0.8,)),
    Group(SMALL, "azure", "mixed", 2048, 256, 256, False, 520, (0.8, 0.5), 150),
    Group(SMALL, "bursty", "prefill-first", 2048, 1024, 16, False, 8_000, (0.8, 0.95), 250),
    Group(SMALL, "azure", "mixed", 2048, 1024, 16, False, 60_000, (0.95,), 200),
    Group(SMALL, "azure", "prefill-first", 8192, 64, 16, False, 4_000, (0.8,), 150),
    Group(SMALL, "sessions", "mixed", 512, 64, 256, True, 240, (0.8, 0.95), 200),
    Group(SMALL, "bursty", "prefill-first", 512, 256, 16, False, 60_000, (0.8,), 200),
    Group(SMALL, "sessions", "prefill-first", 8192, 1024, 256, True, 3_700, (0.8, 0.5), 1000, (0.8,)),
    Group(LARGE, "azure", "mixed", 2048, 256, 16, True, 40_000, (0.5, 0.8, 0.95), 40, (0.8,)),
    Group(LARGE, "mooncake", "mixed", 8192, 256, 16, True, 40_000, (0.5, 0.8), 25, (0.5,)),
    Group(LARGE, "sessions", "prefill-first", 2048, 64, 16, True, 40_000, (0.5, 0.8, 0.95), 200),
]
