"""How attention is cut into programs and tiles, and the shared memory that they take; without Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd
from operator import itemgetter

import torch

from twinserve.engine.kernels import SMALLEST_DOT

SHORTEST_SPAN = 256
"""Tokens below which a context is not cut further."""

FULL_DEVICE = 1024
"""Programs of decode attention that keep an H100 reading."""


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is no less than `number`."""
    return 1 << (number - 1).bit_length()


def block_heads(group: int) -> int:
    """Query heads of a program of decode attention, for `group` of them to a KV head; some of them may be none."""
    return max(SMALLEST_DOT, power_of_2(group))


@dataclass(frozen=True)
class PromptCut:
    """How prompt attention is cut: `lines` of query heads and tokens a tile, contexts read by `block` tokens."""

    lines: int
    block: int
    warps: int
    stages: int

    @classmethod
    def of(cls, dtype: torch.dtype) -> PromptCut:
        """That of queries of a dtype. Measured on an H200: of 12 cuts the one that is fastest, or within a tenth of it,
        from a prompt of 1,024 tokens to a piece of 2,048 behind 30,000, with 16 and with 32 heads."""
        return cls(32, 32, warps=4, stages=2) if dtype == torch.float32 else cls(64, 64, warps=4, stages=2)


@dataclass(frozen=True)
class RowsCut:
    """How the product of a few rows with weights is cut: `columns` of them a program, read by `block` numbers each.

    Attributes:
        early: the first weights are loaded, and the others brought into the L2 cache, before the rows are there.
    """

    columns: int
    block: int
    warps: int
    early: bool

    @classmethod
    def of(cls, rows: int, size: int, inner: int, weight_bytes: int, *, normed: bool, gated: bool) -> RowsCut:
        """That of so many rows, and of weights for `size` columns of `inner` numbers each, two for a gated column.

        Measured on an H200, products of the 0.6B and of the 8B shape one after another: of a dozen cuts the fastest, or
        within a twentieth of it. What is read in longer than a kernel takes to start has nothing to gain from `early`.
        """
        early = rows > 1 or weight_bytes < 16 << 20
        kind = "gated" if gated else "normed" if normed else "plain"
        columns, block, warps = _ROWS_CUTS[rows, early][kind]
        own = gcd(inner, block)
        return cls(gcd(size, columns * block // own), own, warps, early)


_ROWS_CUTS = {
    (1, True): {"plain": (4, 1024, 4), "normed": (4, 1024, 4), "gated": (4, 1024, 4)},
    (1, False): {"plain": (8, 1024, 4), "normed": (8, 512, 4), "gated": (4, 256, 1)},
    (2, True): {"plain": (4, 512, 4), "normed": (4, 512, 4), "gated": (4, 512, 4)},
    (4, True): {"plain": (4, 512, 4), "normed": (8, 256, 4), "gated": (4, 128, 1)},
}
"""Columns, block and warps by rows and `early`."""


def prompt_tiles(row: int, offset: int, start: int, count: int, tile: int) -> list[tuple[int, int, int, int]]:
    """The tiles of a prompt's `count` tokens from position `start` on, which lie from `offset` on in the batch.

    Args:
        row: of its block table.
        tile: tokens of a tile, see `tile_tokens`.
    """
    return [(row, offset + first, start + first, min(tile, count - first)) for first in range(0, count, tile)]


def longest_first(tiles: list[tuple[int, int, int, int]]) -> None:
    """Puts tiles in the order in which they are best begun: the longest contexts first, as nothing runs beside the last
    one to end."""
    tiles.sort(key=itemgetter(2), reverse=True)


def tile_tokens(group: int, dtype: torch.dtype) -> int:
    """Tokens of a tile of `prefill_attention`, for `group` query heads to a KV head."""
    return max(1, PromptCut.of(dtype).lines // power_of_2(group))


@dataclass(frozen=True)
class DecodeCut:
    """How decode attention is cut: a context in up to `splits` spans of at least `shortest` tokens, read by `block`."""

    splits: int
    shortest: int
    block: int
    warps: int
    stages: int


@cache
def decode_cut(tokens: int, kv_heads: int, dtype: torch.dtype) -> DecodeCut:
    """The cut for so many tokens: one span for each where they fill the device by themselves, shorter ones else.

    Measured on an H100 by benchmarks/step_kernels.py. The lengths are not known here, so the kernel makes do with fewer
    spans where a context is short.
    """
    if dtype == torch.float32:
        return DecodeCut(4, 64, 32, warps=4, stages=2)
    programs = tokens * kv_heads
    if programs >= FULL_DEVICE:
        return DecodeCut(1, SHORTEST_SPAN, 128, warps=4, stages=3)
    if programs >= FULL_DEVICE // 8:
        return DecodeCut(8, SHORTEST_SPAN, 128, warps=4, stages=4)
    return DecodeCut(16, 64, 64, warps=4, stages=4)


def decode_cuts(most: int, kv_heads: int, dtype: torch.dtype) -> list[list[int]]:
    """[rows, splits, shortest, block] of each cut that steps of up to `most` rows have, from so many rows on."""
    cuts: list[list[int]] = []
    for rows in range(1, most + 1):
        cut = decode_cut(rows, kv_heads, dtype)
        values = [cut.splits, cut.shortest, cut.block]
        if not cuts or cuts[-1][1:] != values:
            cuts.append([rows, *values])
    return cuts


def shared_bytes(group: int, head_dim: int, dtype: torch.dtype, level: tuple[int, int]) -> int:
    """Bytes of shared memory that attention takes at most, as compiled by Triton 3.6 and 3.7.

    Keys and values have a buffer each, and one more for each stage behind the second, in prompts once for what is seen
    whole and once for the rest; queries and weights lie beside them, in prompts on Hopper the queries alone.

    Args:
        group: query heads to a KV head.
        level: the device's compute capability.
    """
    size, number, sums = power_of_2(head_dim), dtype.itemsize, 512
    heads, prompt = block_heads(group), PromptCut.of(dtype)
    block = max(cut.block for cut in {decode_cut(1, 1, dtype), decode_cut(FULL_DEVICE, 1, dtype)})
    decode = number * (2 * block * size + heads * (size + block))
    kept = 2 * 2 * prompt.block * size * max(1, prompt.stages - 1)
    beside = prompt.lines * size if level >= (9, 0) or dtype == torch.float32 else 0
    beside += prompt.lines * prompt.block if level < (9, 0) or dtype == torch.float32 else 0
    return max(decode, number * (kept + beside)) + sums
