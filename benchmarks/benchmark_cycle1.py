"""Cycle 1: generation without a KV cache, the baseline.

python benchmarks/benchmark_cycle1.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from command_line import main
from cycle_results import Findings, result
from subject import Subject
from work import GREEDY, generate_each, yardstick

from twinserve.engine.inference import generate_naive
from twinserve.engine.quantization import measure_memory

PROMPT = "Hello, I am a language model"
MAX_NEW_TOKENS = (50, 100, 200)
TIMING = (
    "from text to text, one request after another: tokenizing, every pass of the model over the whole text, the choice "
    "of each token, decoding; not loading the model"
)


def benchmark_naive(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """Seconds, milliseconds a token and tokens a second of naive generation, by the number of new tokens."""
    subject = subject or Subject.of()
    model, tokenizer = subject.transformers_model(), subject.tokenizer()
    generate_naive(model, tokenizer, PROMPT, 2, temperature=GREEDY)
    findings = Findings(subject, repeats)
    names = {f"{count} new tokens": count for count in MAX_NEW_TOKENS}
    ways = {
        name: partial(generate_naive, model, tokenizer, PROMPT, count, temperature=GREEDY)
        for name, count in names.items()
    }
    for one in findings.turns(ways, names):
        each_ms = 1000 * one["mean_s"] / one["tokens"]
        findings.figure(f"{one['name']}: each, by the mean", each_ms, "ms")
    jobs = yardstick(subject)
    findings.serve_yardstick(lambda: generate_each(generate_naive, model, jobs))
    findings.expect("none: this is the baseline", "", None)
    return result(
        findings,
        1,
        "benchmark_naive",
        "Naive: the whole text for every token",
        memory_mb=measure_memory(model),
        timing=TIMING,
    )


if __name__ == "__main__":
    sys.exit(main(benchmark_naive))
