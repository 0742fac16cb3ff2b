"""Cycle 7: weights in int8: memory, speed and quality.

python benchmarks/benchmark_cycle7.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from benchmark_cycle6 import best_attention
from command_line import main
from cycle_results import ENGINE_TIMING, Findings, result, served
from environment import ROOT
from subject import Subject
from torch import Tensor
from torch.nn import functional as F
from work import yardstick

from twinserve.engine.device_queue import compute_on
from twinserve.engine.llm import LLM
from twinserve.engine.models import Decoder
from twinserve.engine.quantization import measure_memory

HELD_OUT = ROOT / "tests" / "data" / "held_out.txt"
MOST_TOKENS = 1024


def benchmark_quantization(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """What int8 weights change in memory, in speed and in the perplexity of a text that the model has not seen."""
    subject = subject or Subject.of()
    attention, findings = best_attention(subject).name, Findings(subject, repeats)
    token_ids = torch.tensor(subject.tokenizer().encode(HELD_OUT.read_text(encoding="utf-8"))[:MOST_TOKENS])
    jobs = yardstick(subject)
    with (
        subject.engine(jobs, attention=attention) as plain,
        subject.engine(jobs, attention=attention, quantization="int8") as quantized,
    ):
        full, int8 = (measure_memory(llm.runner.model) for llm in (plain, quantized))
        half = full if subject.dtype == "bfloat16" else _memory_in_bfloat16(subject)
        findings.figure("weights as run before", full, "MB")
        findings.figure("weights in bfloat16", half, "MB")
        findings.figure("weights in int8", int8, "MB")
        findings.figure("less memory than bfloat16", f"{1 - int8 / half:.1%}")
        before, after = (_perplexity(subject, llm, token_ids) for llm in (plain, quantized))
        findings.figure("text of the perplexity", f"{len(token_ids)} tokens")
        findings.figure("perplexity as run before", before)
        findings.figure("perplexity in int8", after)
        worse = after / before - 1
        findings.figure("perplexity worse by", f"{worse:.2%}")
        serve_it, memory_mb = served(quantized, subject)
        findings.serve_yardstick(serve_it, served(plain, subject)[0])
        memory = memory_mb()
    saved = 1 - int8 / half
    quality = "not judged: random weights" if subject.is_random else f"{worse:+.2%} perplexity"
    findings.expect("40% to 50% less memory than 16 bits", f"{saved:.1%} less", saved >= 0.4)
    findings.expect("quality less than 5% worse", quality, None if subject.is_random else worse < 0.05)
    return result(findings, 7, "benchmark_quantization", "Weights in int8", memory_mb=memory, timing=ENGINE_TIMING)


def _memory_in_bfloat16(subject: Subject) -> float:
    """Megabytes of the model's weights in 16 bits."""
    with subject.engine(yardstick(subject), dtype="bfloat16") as llm:
        return measure_memory(llm.runner.model)


def _perplexity(subject: Subject, llm: LLM, token_ids: Tensor) -> float:
    """The perplexity of a text by an engine's model."""
    return compute_on(subject.device, lambda: perplexity(llm.runner.model, token_ids.to(subject.device)))


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
