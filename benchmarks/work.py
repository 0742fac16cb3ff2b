"""The requests that the benchmarks of the seven cycles serve, and serving them.

Every cycle serves the same requests, the *yardstick*, with what it adds to the one before it, so that one cycle's time
can be held against another's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any

from sizes import Job, Sizes
from subject import NumberTokenizer, Subject

from twinserve.engine.llm import LLM
from twinserve.policies import Core, SamplingParams, Sequence
from twinserve.settings.build_core import Settings

GREEDY = 0.0


def random_jobs(subject: Subject, count: int, prompts: tuple[int, int], outputs: tuple[int, int]) -> list[Job]:
    """Requests of random tokens with lengths drawn evenly from `prompts` and `outputs`, both ends included."""
    draws = random.Random(0)
    return [
        Job(prompt, draws.randint(*outputs))
        for prompt in random_prompts(subject, [draws.randint(*prompts) for _ in range(count)])
    ]


def random_prompts(subject: Subject, lengths: Iterable[int], *, shared: int = 0) -> list[list[int]]:
    """Prompts of random tokens with these lengths, all beginning with the same `shared` tokens more."""
    draws, vocab_size = random.Random(1), subject.config.vocab_size

    def tokens(count: int) -> list[int]:
        return [draws.randrange(vocab_size) for _ in range(count)]

    begin = tokens(shared)
    return [begin + tokens(length) for length in lengths]


def yardstick(subject: Subject) -> list[Job]:
    """The requests that every cycle serves."""
    sizes = subject.sizes
    prompts = random_prompts(subject, [sizes.own] * sizes.requests, shared=sizes.shared)
    return [Job(prompt, sizes.output) for prompt in prompts]


def yardstick_in_words(sizes: Sizes) -> str:
    """What the yardstick is."""
    return (
        f"{sizes.requests} requests of {sizes.shared + sizes.own} prompt tokens, the first {sizes.shared} of them "
        f"the same, and {sizes.output} output tokens each"
    )


def generate_each(generate: Callable[..., str], model: Any, jobs: Seq[Job]) -> None:
    """Complete requests one after another by one of the functions of `twinserve.engine.inference`.

    Args:
        model: as transformers makes it.
    """
    tokenizer = NumberTokenizer(model.config.vocab_size)
    for job in jobs:
        generate(model, tokenizer, tokenizer.decode(job.prompt), job.max_tokens, temperature=GREEDY)


def fresh_core(llm: LLM, **changes: Any) -> Core:
    """Policies that have served nothing, by the LLM's settings but for `changes`."""
    return Settings.load(llm.settings.model_dump() | changes).build_core()


def serve(llm: LLM, jobs: Seq[Job], core: Core | None = None, **changes: Any) -> int:
    """Serve requests that are there at once; the most KV blocks in use at a time.

    Args:
        core: the policies; None is `fresh_core` with `changes`.
    """
    core = core or fresh_core(llm, **changes)
    for job in jobs:
        params = SamplingParams(temperature=GREEDY, max_tokens=job.max_tokens, ignore_eos=True)
        if not core.ingest(Sequence(job.prompt, params), time.perf_counter_ns()):
            raise RuntimeError(f"a request of {len(job.prompt)} tokens was refused")
    most = 0
    while not core.is_idle:
        batch = core.decide(time.perf_counter_ns())
        most = max(most, batch.num_used_blocks)
        core.commit(llm.runner.execute(batch), time.perf_counter_ns())
    return most
