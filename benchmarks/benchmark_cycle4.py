"""Cycle 4: 100 requests through the engine at once, against one after another.

python benchmarks/benchmark_cycle4.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import sys
from typing import Any

from command_line import main
from cycle_results import ENGINE_TIMING, case, engine_row, expectation, figure, result
from sizes import Job
from subject import Subject
from timing import repeat
from work import random_jobs, serve

REQUESTS = 100


def benchmark_throughput(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """Throughput over 100 requests with prompts and outputs of various lengths, batched and one after another."""
    subject = subject or Subject.of()
    sizes = subject.sizes
    jobs = random_jobs(subject, REQUESTS, sizes.prompts, sizes.outputs)
    tokens = sum(job.max_tokens for job in jobs)
    cases = []
    for name, at_once in ((f"{REQUESTS} requests one after another", 1), (f"{REQUESTS} requests at once", REQUESTS)):
        cases.append(case(name, _seconds(subject, jobs, at_once, repeats), tokens))
    alone, batched = cases
    speed_up = alone["median_s"] / batched["median_s"]
    lengths = "prompts of {} to {} tokens, outputs of {} to {}".format(*sizes.prompts, *sizes.outputs)
    figures = [
        figure(f"{REQUESTS} requests, {lengths}: tokens generated", tokens),
        figure("speed-up over one after another", speed_up, "x"),
    ]
    return result(
        subject,
        4,
        "benchmark_throughput",
        "Continuous batching: all requests at once",
        row=engine_row(subject, repeats, enable_prefix_caching=False),
        timing=ENGINE_TIMING,
        figures=figures,
        expectations=[expectation("asks: how many times faster than one by one?", f"{speed_up:.2g}x", None)],
        cases=cases,
    )


def _seconds(subject: Subject, jobs: list[Job], at_once: int, repeats: int) -> list[float]:
    """Seconds to serve `jobs`, so many of them at once."""
    with subject.engine(jobs, max_num_seqs=at_once, enable_prefix_caching=False) as llm:
        serve(llm, jobs[:at_once])
        return repeat(lambda: serve(llm, jobs), repeats, subject.device)


if __name__ == "__main__":
    sys.exit(main(benchmark_throughput))
