"""Cycle 7: weights in int8: memory, speed and quality.

python benchmarks/benchmark_cycle7.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from benchmark_cycle6 import best_attention
from command_line import main
from cycle_results import ENGINE_TIMING, case, engine_row, expectation, figure, result
from environment import ROOT
from subject import Subject
from torch import Tensor
from torch.nn import functional as F
from work import yardstick

from twinserve.engine.device_queue import compute_on
from twinserve.engine.models import Decoder
from twinserve.engine.quantization import measure_memory

HELD_OUT = ROOT / "tests" / "data" / "held_out.txt"
MOST_TOKENS = 1024


def benchmark_quantization(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """What int8 weights change in memory, in speed and in the perplexity of a text that the model has not seen."""
    subject = subject or Subject.of()
    attention = best_attention(subject).name
    token_ids = torch.tensor(subject.tokenizer().encode(HELD_OUT.read_text(encoding="utf-8"))[:MOST_TOKENS])
    with subject.engine(yardstick(subject), dtype="bfloat16") as llm:
        half = measure_memory(llm.runner.model)
    full, before = _weights_and_perplexity(subject, token_ids)
    int8, after = _weights_and_perplexity(subject, token_ids, quantization="int8")
    plain = engine_row(subject, repeats, attention=attention)
    quantized = engine_row(subject, repeats, attention=attention, quantization="int8")
    saved, worse = 1 - int8 / half, after / before - 1
    figures = [
        figure(f"weights in {subject.dtype}, as run before", full, "MB"),
        figure("weights in bfloat16", half, "MB"),
        figure("weights in int8", int8, "MB"),
        figure("less memory than bfloat16", 100 * saved, "%"),
        figure(f"speed of int8 over {subject.dtype}", plain["median_s"] / quantized["median_s"], "x"),
        figure(f"perplexity of {len(token_ids)} tokens in {subject.dtype}", before),
        figure("perplexity in int8", after),
        figure("perplexity worse by", 100 * worse, "%"),
    ]
    quality = f"{worse:+.2%} perplexity"
    if subject.is_random:
        quality = "not judged: random weights"
    return result(
        subject,
        7,
        "benchmark_quantization",
        "Weights in int8",
        row=quantized,
        timing=ENGINE_TIMING,
        figures=figures,
        expectations=[
            expectation("40% to 50% less memory than 16 bits", f"{saved:.1%} less", saved >= 0.4),
            expectation("quality less than 5% worse", quality, None if subject.is_random else worse < 0.05),
        ],
        cases=[
            case(f"the requests in {name}", measured["repeats_s"], measured["output_tokens"])
            for name, measured in ((subject.dtype, plain), ("int8", quantized))
        ],
    )


def _weights_and_perplexity(subject: Subject, token_ids: Tensor, **options: Any) -> tuple[float, float]:
    """Megabytes of the model's weights, and the perplexity of a text."""
    with subject.engine(yardstick(subject), **options) as llm:
        model = llm.runner.model
        return measure_memory(model), compute_on(
            subject.device, lambda: perplexity(model, token_ids.to(subject.device))
        )


@torch.inference_mode()
def perplexity(model: Decoder, token_ids: Tensor) -> float:
    """exp of the mean of -log p(token | all before it) over a text's tokens [tokens] but the first."""
    positions = torch.arange(len(token_ids), device=token_ids.device)
    hidden = model(token_ids, positions, _whole_text)
    return F.cross_entropy(model.logits(hidden[:-1]).float(), token_ids[1:]).exp().item()


def _whole_text(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one text, all of it given."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


if __name__ == "__main__":
    sys.exit(main(benchmark_quantization))
