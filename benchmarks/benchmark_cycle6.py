"""Cycle 6: flash-attn against torch's attention on CUDA; torch's attention against its definition on a CPU.

python benchmarks/benchmark_cycle6.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from command_line import main
from cycle_results import ENGINE_TIMING, Findings, reaches, result, served
from quantities import quantity, speed_up
from sizes import Job
from subject import Subject
from torch import Tensor
from work import random_jobs, serve, yardstick

from twinserve.engine.kv_cache import KVCache
from twinserve.engine.layers import AttentionChoice, AttentionMetadata, SdpaAttention, choose_attention
from twinserve.engine.layers.attention import slots_of
from twinserve.engine.llm import LLM
from twinserve.engine.models.loader import DTYPES

BLOCK_SIZE = 16
EXPECTED = "1.5 to 2 times as fast"
LAYER_TIMING = (
    "Beside it: attention of one step in every layer, the keys and values being in their blocks already; nothing else "
    "of the model"
)


def benchmark_flash_attention(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """What flash-attn changes in throughput and in GPU memory; without CUDA, what torch's attention changes."""
    subject = subject or Subject.of()
    backend, findings = best_attention(subject), Findings(subject, repeats)
    what, timing = f"Attention by {backend.name}", ENGINE_TIMING
    names = ("flash", "sdpa") if backend.name == "flash" else (backend.name,)
    long = _long_prompts(subject)
    with ExitStack() as engines:
        llms = {
            name: engines.enter_context(subject.engine([*long, *yardstick(subject)], attention=name)) for name in names
        }
        serve_it, memory_mb = served(llms[backend.name], subject)
        before = None
        if backend.name == "flash":
            _flash_against_sdpa(findings, llms, long)
            before = served(llms["sdpa"], subject)[0]
        else:
            _sdpa_against_definition(findings)
            findings.expect(EXPECTED, f"not measured: {backend.reason}", None)
            what += ", as in the cycle before (no flash-attn here)"
            timing = f"{ENGINE_TIMING}. {LAYER_TIMING}"
        findings.serve_yardstick(serve_it, before)
        memory = memory_mb()
    return result(findings, 6, "benchmark_flash_attention", what, memory_mb=memory, timing=timing)


def best_attention(subject: Subject) -> AttentionChoice:
    """flash where it can serve, else sdpa, and why."""
    return choose_attention("auto", subject.config.head_dim, DTYPES[subject.dtype], torch.device(subject.device))


def _long_prompts(subject: Subject) -> list[Job]:
    """The requests by which attention backends are compared."""
    sizes = subject.sizes
    output = (sizes.attention_output, sizes.attention_output)
    return random_jobs(subject, sizes.attention_requests, sizes.attention_prompts, output)


def _flash_against_sdpa(findings: Findings, llms: dict[str, LLM], jobs: list[Job]) -> None:
    """Throughput and memory of the engine with each backend on long prompts."""
    tokens = sum(len(job.prompt) + job.max_tokens for job in jobs)
    lengths = "prompts of {} to {} tokens".format(*findings.subject.sizes.attention_prompts)
    findings.figure("long prompts", f"{len(jobs)} requests, {lengths}, {tokens:,} tokens with the outputs")
    most: dict[str, int] = {}
    ways = {
        f"long prompts, {name}": partial(_served_with_its_memory, llms[name], jobs, name, most)
        for name in ("sdpa", "flash")
    }
    measured = findings.turns(ways, dict.fromkeys(ways, tokens))
    for name, memory in most.items():
        findings.figure(f"{name}: most GPU memory beside weights and KV", memory / 1e6, "MB")
    gained = findings.keep(speed_up("speed-up of flash over sdpa", *measured))
    findings.expect(EXPECTED, quantity(gained), reaches(gained, 1.5))


def _served_with_its_memory(llm: LLM, jobs: list[Job], name: str, most: dict[str, int]) -> None:
    """Serve requests; `most` gets the most GPU memory that was held meanwhile beside what was held before."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    serve(llm, jobs, enable_prefix_caching=False)
    most[name] = max(most.get(name, 0), torch.cuda.max_memory_allocated() - held)


def _sdpa_against_definition(findings: Findings) -> None:
    """Time of a step's attention by the paged backend and by the definition, sequence by sequence."""
    subject = findings.subject
    config = replace(subject.config, num_layers=1)
    dtype, device = DTYPES[subject.dtype], torch.device(subject.device)
    metadata = _metadata(subject)
    cache = KVCache(config, 1 + max(max(table) for table in metadata.block_tables), BLOCK_SIZE, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    keys, values = (pool[0].normal_(generator=generator) for pool in (cache.keys, cache.values))
    shape = (sum(metadata.query_lens), config.num_heads, config.head_dim)
    query = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    backend = SdpaAttention()
    plan = backend.plan(metadata, dtype, device)
    ways = {
        "attention by its definition, a sequence at a time": lambda: attention_by_definition(
            query, keys, values, metadata
        ),
        "attention by the paged SDPA backend": lambda: backend.attend(query, keys, values, plan),
    }
    expected, found = (way() for way in ways.values())
    difference = (expected - found).abs().max().item()
    layers = range(subject.config.num_layers)

    def in_every_layer(way: Callable[[], Tensor]) -> None:
        for _ in layers:
            way()

    contexts = metadata.context_lens
    step = f"{metadata.num_single} decodes, {min(contexts)} to {max(contexts)} tokens of context, and a "
    findings.figure("the step", f"{step}prompt of {metadata.query_lens[-1]}, {len(layers)} layers")
    measured = findings.turns({name: partial(in_every_layer, way) for name, way in ways.items()})
    findings.figure("largest difference of the two", difference)
    findings.keep(speed_up("speed-up of the attention alone", *measured))


def _metadata(subject: Subject) -> AttentionMetadata:
    """A step of decodes behind contexts of various lengths, longest first, and of one prompt."""
    sizes = subject.sizes
    shortest, longest = sizes.attention_prompts
    contexts = np.linspace(longest, shortest, sizes.attention_requests).round().astype(int).tolist()
    prompt = (shortest + longest) // 2
    tables, first = [], 0
    for context in (*contexts, prompt):
        blocks = -(-context // BLOCK_SIZE)
        tables.append(np.arange(first, first + blocks))
        first += blocks
    return AttentionMetadata(len(contexts), [1] * len(contexts) + [prompt], [*contexts, prompt], tables, BLOCK_SIZE)


def attention_by_definition(query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, every score of a sequence being in memory at once.

    Arguments and result are those of `AttentionBackend.attend`.
    """
    outputs, first = [], 0
    rows = zip(metadata.query_lens, metadata.context_lens, metadata.block_tables, strict=True)
    for num_tokens, context, table in rows:
        slots = torch.from_numpy(slots_of(table, np.arange(context), metadata.block_size)).to(query.device)
        row_query = query[first : first + num_tokens]
        groups = query.shape[1] // keys.shape[2]
        row_keys, row_values = (pool.flatten(0, 1)[slots].repeat_interleave(groups, dim=1) for pool in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", row_query, row_keys) * query.shape[-1] ** -0.5
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(context - num_tokens + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, row_values))
        first += num_tokens
    return torch.cat(outputs)


if __name__ == "__main__":
    sys.exit(main(benchmark_flash_attention))
