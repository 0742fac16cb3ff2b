"""Cycle 2: generation with the model's own KV cache, against naive generation.

python benchmarks/benchmark_cycle2.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from benchmark_cycle1 import PROMPT
from command_line import main
from cycle_results import case, expectation, figure, result, row
from sizes import Job
from subject import Subject
from timing import repeat
from torch import nn
from work import generate_each, random_jobs, yardstick

from twinserve.engine.inference import generate_naive, generate_with_kv_cache
from twinserve.engine.quantization import measure_memory

TIMING = (
    "from text to text, one request after another: tokenizing, the pass over the prompt, a pass for each further "
    "token, the choice of each token, decoding; not loading the model; after two tokens that are not measured"
)


def benchmark_kv_cache(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """How many times faster a KV cache makes generation, behind a short prompt and behind a long one."""
    subject = subject or Subject.of()
    sizes, model = subject.sizes, subject.transformers_model()
    short = Job(subject.tokenizer().encode(PROMPT), sizes.decoded)
    (long,) = random_jobs(subject, 1, (sizes.long_prompt, sizes.long_prompt), (sizes.decoded, sizes.decoded))
    cases, figures, speed_ups = [], [], []
    for name, job in (("short", short), ("long", long)):
        naive, cached = _both(subject, model, name, job, repeats)
        speed_ups.append(naive["median_s"] / cached["median_s"])
        cases += [naive, cached]
        figures.append(figure(f"{name} prompt: speed-up", speed_ups[-1], "x"))
    jobs = yardstick(subject)
    seconds = repeat(lambda: generate_each(generate_with_kv_cache, model, jobs), repeats, subject.device)
    # The last token's keys and values are never computed.
    longest = max(len(job.prompt) + job.max_tokens - 1 for job in jobs)
    seen = f"{speed_ups[0]:.2g}x short, {speed_ups[1]:.2g}x long"
    return result(
        subject,
        2,
        "benchmark_kv_cache",
        "KV cache: each token computed once",
        row=row(subject, seconds, measure_memory(model) + longest * subject.kv_bytes_per_token / 1e6),
        timing=TIMING,
        figures=figures,
        expectations=[
            expectation("the longer the text, the larger the speed-up", seen, speed_ups[1] > speed_ups[0]),
            expectation("2 to 5 times as fast", seen, speed_ups[1] >= 2),
        ],
        cases=cases,
    )


def _both(subject: Subject, model: nn.Module, name: str, job: Job, repeats: int) -> list[dict[str, Any]]:
    """The same request without a KV cache and with one."""
    cases, request = [], f"{name} prompt ({len(job.prompt)} tokens), {job.max_tokens} new tokens"
    for how, generate in (("naive", generate_naive), ("with KV cache", generate_with_kv_cache)):
        generate_each(generate, model, [job._replace(max_tokens=2)])
        seconds = repeat(partial(generate_each, generate, model, [job]), repeats, subject.device)
        cases.append(case(f"{request}, {how}", seconds, job.max_tokens))
    return cases


if __name__ == "__main__":
    sys.exit(main(benchmark_kv_cache))
