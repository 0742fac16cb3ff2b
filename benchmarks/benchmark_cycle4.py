"""Cycle 4: 100 requests through the engine at once, against one after another.

python benchmarks/benchmark_cycle4.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import sys
from typing import Any

from command_line import main
from cycle_results import ENGINE_TIMING, Findings, result, served
from quantities import quantity, speed_up
from subject import Subject
from work import random_jobs, serve, yardstick

REQUESTS = 100


def benchmark_throughput(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """Throughput over 100 requests with prompts and outputs of various lengths, batched and one after another."""
    subject = subject or Subject.of()
    sizes, findings = subject.sizes, Findings(subject, repeats)
    jobs = random_jobs(subject, REQUESTS, sizes.prompts, sizes.outputs)
    tokens = sum(job.max_tokens for job in jobs)
    lengths = "prompts of {} to {} tokens, outputs of {} to {}".format(*sizes.prompts, *sizes.outputs)
    findings.figure(f"{REQUESTS} requests", f"{lengths}, {tokens} in all")
    with subject.engine([*jobs, *yardstick(subject)], enable_prefix_caching=False) as llm:
        ways = {
            f"{REQUESTS} requests one after another": lambda: serve(llm, jobs, max_num_seqs=1),
            f"{REQUESTS} requests at once": lambda: serve(llm, jobs, max_num_seqs=REQUESTS),
        }
        measured = findings.turns(ways, dict.fromkeys(ways, tokens))
        gained = findings.keep(speed_up("speed-up over one after another", *measured))
        serve_it, memory_mb = served(llm, subject)
        findings.serve_yardstick(serve_it, served(llm, subject, max_num_seqs=1)[0])
        memory = memory_mb()
    findings.expect("asks: how many times faster than one by one?", quantity(gained), None)
    return result(
        findings,
        4,
        "benchmark_throughput",
        "Continuous batching: all requests at once",
        memory_mb=memory,
        timing=ENGINE_TIMING,
    )


if __name__ == "__main__":
    sys.exit(main(benchmark_throughput))
