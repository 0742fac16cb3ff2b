"""Cycle 2: generation with the model's own KV cache, against naive generation.

python benchmarks/benchmark_cycle2.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from benchmark_cycle1 import PROMPT
from command_line import main
from cycle_results import Findings, reaches, result
from quantities import quantity, speed_up
from sizes import Job
from subject import Subject
from work import generate_each, random_jobs, yardstick

from twinserve.engine.inference import generate_naive, generate_with_kv_cache
from twinserve.engine.quantization import measure_memory

TIMING = (
    "from text to text, one request after another: tokenizing, the pass over the prompt, a pass for each further "
    "token, the choice of each token, decoding; not loading the model"
)


def benchmark_kv_cache(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """How many times faster a KV cache makes generation, behind a short prompt and behind a long one."""
    subject = subject or Subject.of()
    sizes, model = subject.sizes, subject.transformers_model()
    short = Job(subject.tokenizer().encode(PROMPT), sizes.decoded)
    (long,) = random_jobs(subject, 1, (sizes.long_prompt, sizes.long_prompt), (sizes.decoded, sizes.decoded))
    for generate in (generate_naive, generate_with_kv_cache):
        generate_each(generate, model, [short._replace(max_tokens=2)])
    findings, speed_ups = Findings(subject, repeats), []
    prompts = f"{len(short.prompt)} tokens short, {len(long.prompt)} long; {sizes.decoded} new tokens"
    findings.figure("prompts", prompts)
    for name, job in (("short", short), ("long", long)):
        naive, cached = f"{name} prompt, naive", f"{name} prompt, with KV cache"
        ways = {
            naive: partial(generate_each, generate_naive, model, [job]),
            cached: partial(generate_each, generate_with_kv_cache, model, [job]),
        }
        measured = findings.turns(ways, dict.fromkeys(ways, job.max_tokens))
        speed_ups.append(findings.keep(speed_up(f"{name} prompt: speed-up", *measured)))
    jobs = yardstick(subject)
    findings.serve_yardstick(
        lambda: generate_each(generate_with_kv_cache, model, jobs), lambda: generate_each(generate_naive, model, jobs)
    )
    # The last token's keys and values are never computed.
    longest = max(len(job.prompt) + job.max_tokens - 1 for job in jobs)
    seen = ", ".join(f"{name}: {quantity(one)}" for name, one in zip(("short", "long"), speed_ups, strict=True))
    findings.expect("the longer the text, the larger the speed-up", seen, is_larger(*speed_ups))
    findings.expect("2 to 5 times as fast", seen, reaches(speed_ups[1], 2))
    return result(
        findings,
        2,
        "benchmark_kv_cache",
        "KV cache: each token computed once",
        memory_mb=measure_memory(model) + longest * subject.kv_bytes_per_token / 1e6,
        timing=TIMING,
    )


def is_larger(short: dict[str, Any], long: dict[str, Any]) -> bool | None:
    """Whether the second comparison is larger in all its turns, in none, or, None, in some."""
    return True if long["least"] > short["most"] else False if long["most"] <= short["least"] else None


if __name__ == "__main__":
    sys.exit(main(benchmark_kv_cache))
