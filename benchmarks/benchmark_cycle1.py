"""Cycle 1: generation without a KV cache, the baseline.

python benchmarks/benchmark_cycle1.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from command_line import main
from cycle_results import case, expectation, figure, result, row
from subject import Subject
from timing import repeat
from work import GREEDY, generate_each, yardstick

from twinserve.engine.inference import generate_naive
from twinserve.engine.quantization import measure_memory

PROMPT = "Hello, I am a language model"
MAX_NEW_TOKENS = (50, 100, 200)
TIMING = (
    "from text to text, one request after another: tokenizing, every pass of the model over the whole text, the choice "
    "of each token, decoding; not loading the model; after two tokens that are not measured"
)


def benchmark_naive(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """Seconds, milliseconds a token and tokens a second of naive generation, by the number of new tokens."""
    subject = subject or Subject.of()
    model, tokenizer = subject.transformers_model(), subject.tokenizer()
    generate_naive(model, tokenizer, PROMPT, 2, temperature=GREEDY)
    cases = []
    for count in MAX_NEW_TOKENS:
        seconds = repeat(
            partial(generate_naive, model, tokenizer, PROMPT, count, temperature=GREEDY),
            repeats,
            subject.device,
        )
        cases.append(case(f"{count} new tokens", seconds, count))
    seconds = repeat(lambda: generate_each(generate_naive, model, yardstick(subject)), repeats, subject.device)
    return result(
        subject,
        1,
        "benchmark_naive",
        "Naive: the whole text for every token",
        row=row(subject, seconds, measure_memory(model)),
        timing=TIMING,
        figures=[figure(f"{one['name']}: each", 1000 * one["median_s"] / one["tokens"], "ms") for one in cases],
        expectations=[expectation("none: this is the baseline", "", None)],
        cases=cases,
    )


if __name__ == "__main__":
    sys.exit(main(benchmark_naive))
