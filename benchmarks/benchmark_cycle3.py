"""Cycle 3: KV memory in blocks, against a reservation of the longest length for each sequence.

python benchmarks/benchmark_cycle3.py [--device cuda] [--model NAME | --shape NAME]
"""

from __future__ import annotations

import random
import sys
from typing import Any

from command_line import main
from cycle_results import ENGINE_TIMING, Findings, result, served
from subject import Subject
from work import generate_each, yardstick

from twinserve.engine.inference import generate_with_kv_cache
from twinserve.policies import BlockManager, Sequence

SEQUENCES = 100
LONGEST = 2048
BLOCK_SIZES = (16, 256)


def benchmark_memory_utilization(subject: Subject | None = None, *, repeats: int = 3) -> dict[str, Any]:
    """Memory allocated and used by 100 sequences of various lengths, in blocks and with the longest length reserved."""
    subject = subject or Subject.of()
    longest = min(LONGEST, subject.config.max_position_embeddings)
    lengths = various_lengths(SEQUENCES, longest)
    used = sum(lengths)
    contiguous = SEQUENCES * longest
    paged = {size: allocated_tokens(lengths, size) for size in BLOCK_SIZES}

    def megabytes(tokens: int) -> float:
        return tokens * subject.kv_bytes_per_token / 1e6

    findings = Findings(subject, repeats)
    findings.figure(
        f"KV of {SEQUENCES} sequences, {min(lengths)} to {max(lengths)} tokens: used", megabytes(used), "MB"
    )
    findings.figure(f"in one piece of {longest} tokens each: allocated", megabytes(contiguous), "MB")
    findings.figure("in one piece: used of that", f"{used / contiguous:.1%}")
    for size, tokens in paged.items():
        findings.figure(f"in blocks of {size}: allocated", megabytes(tokens), "MB")
        findings.figure(f"in blocks of {size}: used of that", f"{used / tokens:.1%}")
    more = f"such sequences in the memory of the {SEQUENCES} pieces, in blocks of {BLOCK_SIZES[0]}"
    findings.figure(more, sequences_that_fit(contiguous, longest))
    shares = ", ".join(f"{used / tokens:.0%} in blocks of {size}" for size, tokens in paged.items())
    findings.expect(
        "more of the memory used than in one piece each",
        f"{used / contiguous:.0%} in one piece, {shares}",
        min(used / tokens for tokens in paged.values()) > used / contiguous,
    )
    model, jobs = subject.transformers_model(), yardstick(subject)
    with subject.engine(jobs, max_num_seqs=1, enable_prefix_caching=False) as llm:
        serve_it, memory_mb = served(llm, subject)
        findings.serve_yardstick(serve_it, lambda: generate_each(generate_with_kv_cache, model, jobs))
        memory = memory_mb()
    return result(
        findings,
        3,
        "benchmark_memory_utilization",
        "PagedAttention: KV in blocks, one request at a time",
        memory_mb=memory,
        timing=f"{ENGINE_TIMING}. One request after another. Memory is counted and takes no time",
    )


def various_lengths(count: int, longest: int) -> list[int]:
    """Lengths of sequences, many short and few long: lognormal around an eighth of the longest, cut to 1 and it."""
    draws = random.Random(0)
    return [min(longest, max(1, round(draws.lognormvariate(0, 1) * longest / 8))) for _ in range(count)]


def allocated_tokens(lengths: list[int], block_size: int) -> int:
    """Tokens for which a BlockManager gives blocks to sequences of these lengths."""
    manager = BlockManager(None, block_size)
    for length in lengths:
        manager.allocate(Sequence([0] * length))
    return len(manager.used_block_ids) * block_size


def sequences_that_fit(tokens: int, longest: int) -> int:
    """Sequences of various lengths that a pool of so many tokens holds at once, until the first that does not fit."""
    manager = BlockManager(tokens // BLOCK_SIZES[0], BLOCK_SIZES[0])
    for count, length in enumerate(various_lengths(tokens, longest)):
        seq = Sequence([0] * length)
        if not manager.can_allocate(seq):
            return count
        manager.allocate(seq)
    raise AssertionError("more sequences than tokens fit")


if __name__ == "__main__":
    sys.exit(main(benchmark_memory_utilization))
