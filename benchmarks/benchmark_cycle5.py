"""Cycle 5: the time to the first token of requests that share a system prompt.

python benchmarks/benchmark_cycle5.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import chain
from typing import Any

from command_line import main
from cycle_results import ENGINE_TIMING, case, engine_row, expectation, figure, result
from sizes import Job
from subject import Subject
from timing import timed
from work import random_prompts, serve

from twinserve.engine.llm import LLM

REQUESTS = 5


def benchmark_ttft(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """Time to first token of the first request with a system prompt, and of later ones with other user messages."""
    subject = subject or Subject.of()
    sizes = subject.sizes
    jobs = _conversations(subject)
    with subject.engine(jobs) as llm:
        _times_to_first_token(llm, jobs, subject.device)
        times = [_times_to_first_token(llm, jobs, subject.device) for _ in range(repeats)]
    name = f"time to first token, {sizes.system_prompt} system and {sizes.user_message} user tokens"
    first = case(f"{name}: first request", [passed[0] for passed in times])
    later = case(f"{name}: later requests", list(chain.from_iterable(passed[1:] for passed in times)))
    less = 1 - later["median_s"] / first["median_s"]
    return result(
        subject,
        5,
        "benchmark_ttft",
        "Prefix cache: a shared prompt computed once",
        row=engine_row(subject, repeats),
        timing=f"{ENGINE_TIMING}. A time to the first token is that of a request which comes while nothing else runs",
        figures=[figure("less time to the first token in later requests", 100 * less, "%")],
        expectations=[
            expectation("50% to 80% less time to the first token in later requests", f"{less:.0%} less", less >= 0.5)
        ],
        cases=[first, later],
    )


def _conversations(subject: Subject) -> list[Job]:
    """Prompts that begin with the same system prompt and end with other user messages; one token is generated."""
    sizes = subject.sizes
    prompts = random_prompts(subject, [sizes.user_message] * REQUESTS, shared=sizes.system_prompt)
    return [Job(prompt, 1) for prompt in prompts]


def _times_to_first_token(llm: LLM, jobs: list[Job], device: str) -> list[float]:
    """Seconds to the only token of each request, one request after another, the cache being empty before the first."""
    core = llm.settings.build_core()
    return [timed(partial(serve, llm, [job], core), device) for job in jobs]


if __name__ == "__main__":
    sys.exit(main(benchmark_ttft))
