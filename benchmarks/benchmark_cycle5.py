"""Cycle 5: the time to the first token of requests that share a system prompt.

python benchmarks/benchmark_cycle5.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from itertools import chain
from typing import Any

from command_line import main
from cycle_results import ENGINE_TIMING, Findings, reaches, result, served
from quantities import compared, quantity
from sizes import Job
from subject import Subject
from timing import timed
from work import fresh_core, random_prompts, serve, yardstick

from twinserve.engine.llm import LLM

REQUESTS = 5


def benchmark_ttft(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """Time to first token of the first request with a system prompt, and of later ones with other user messages."""
    subject = subject or Subject.of()
    sizes, findings = subject.sizes, Findings(subject, repeats)
    jobs = _conversations(subject)
    findings.figure("prompts", f"{sizes.system_prompt} tokens of the system, {sizes.user_message} of the user")
    with subject.engine([*jobs, *yardstick(subject)]) as llm:
        _times_to_first_token(llm, jobs, subject.device)
        times = [_times_to_first_token(llm, jobs, subject.device) for _ in range(repeats)]
        findings.case("time to first token, first request", [passed[0] for passed in times])
        findings.case("time to first token, later requests", list(chain.from_iterable(passed[1:] for passed in times)))
        turns = [100 * (1 - statistics.median(passed[1:]) / passed[0]) for passed in times]
        less = findings.keep(compared("less time to the first token in later requests", turns, "%"))
        serve_it, memory_mb = served(llm, subject)
        findings.serve_yardstick(serve_it, served(llm, subject, enable_prefix_caching=False)[0])
        memory = memory_mb()
    text = "50% to 80% less time to the first token in later requests"
    findings.expect(text, quantity(less), reaches(less, 50))
    return result(
        findings,
        5,
        "benchmark_ttft",
        "Prefix cache: a shared prompt computed once",
        memory_mb=memory,
        timing=f"{ENGINE_TIMING}. A time to the first token is that of a request which comes while nothing else runs",
    )


def _conversations(subject: Subject) -> list[Job]:
    """Prompts that begin with the same system prompt and end with other user messages; one token is generated."""
    sizes = subject.sizes
    prompts = random_prompts(subject, [sizes.user_message] * REQUESTS, shared=sizes.system_prompt)
    return [Job(prompt, 1) for prompt in prompts]


def _times_to_first_token(llm: LLM, jobs: list[Job], device: str) -> list[float]:
    """Seconds to the only token of each request, one request after another, the cache being empty before the first."""
    core = fresh_core(llm)
    return [timed(partial(serve, llm, [job], core), device) for job in jobs]


if __name__ == "__main__":
    sys.exit(main(benchmark_ttft))
