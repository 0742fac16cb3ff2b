"""How much the benchmarks of the seven cycles compute: what a request is, and how many of which length there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Job(NamedTuple):
    """A request: its prompt, and how many tokens are generated, whatever they are."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Sizes:
    """How much is computed, in tokens. A GPU gets longer prompts, so that a step is more than being launched, and fewer
    steps, as naive generation of a large model takes tens of milliseconds for each.

    Attributes:
        requests, shared, own, output: the yardstick's: so many requests, whose prompts begin alike and then differ.
        prompts, outputs: least and most, of the requests whose throughput is measured.
        long_prompt, decoded: of the KV cache's speed-up.
        system_prompt, user_message: of the time to the first token.
        attention_requests, attention_prompts, attention_output: of the comparison of attention backends.
        max_num_batched_tokens: of a step.
    """

    requests: int
    shared: int
    own: int
    output: int
    prompts: tuple[int, int]
    outputs: tuple[int, int]
    long_prompt: int
    decoded: int
    system_prompt: int
    user_message: int
    attention_requests: int
    attention_prompts: tuple[int, int]
    attention_output: int
    max_num_batched_tokens: int = 2048


SIZES = {
    "cpu": Sizes(
        requests=8,
        shared=96,
        own=16,
        output=16,
        prompts=(4, 24),
        outputs=(2, 8),
        long_prompt=256,
        decoded=32,
        system_prompt=256,
        user_message=16,
        attention_requests=8,
        attention_prompts=(64, 512),
        attention_output=8,
    ),
    "cuda": Sizes(
        requests=12,
        shared=512,
        own=64,
        output=5,
        prompts=(64, 512),
        outputs=(1, 4),
        long_prompt=4096,
        decoded=16,
        system_prompt=4096,
        user_message=64,
        attention_requests=24,
        attention_prompts=(512, 2048),
        attention_output=16,
        max_num_batched_tokens=8192,
    ),
}
