"""Sampling on the device: a token for each row of logits, without a sort.

A drawn row inverts its cumulative distribution at one uniform number, as `twinserve.engine.sampler` does; the number is
a hash of the row's seed and the token's position. The vocabulary is cut into blocks: one kernel has each block's
maximum and sum, the other finds the block in which the number falls, and in it the token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinserve.engine.online import NOT_SAMPLED
from twinserve.engine.sampler import GREEDY_BELOW

BLOCK = 2048
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mixed(x):
    x = x + _GAMMA
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def uniform_at(seeds, row, position):
    """A number in [0, 1) from a device row's seed and a token's position, as `twinserve.engine.sampler.uniform`."""
    low = tl.load(seeds + 2 * row).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(seeds + 2 * row + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    bits = _mixed((high << 32) + low + position.to(tl.uint64))
    return (bits >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _block_kernel(
    logits, rows, temperatures, tops, places, sums, size, num_blocks, BLOCK: tl.constexpr, GREEDY_BELOW: tl.constexpr
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * size + columns, columns < size, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    temperature = tl.load(temperatures + tl.load(rows + row))
    # Of a block all of whose tokens are left out, no difference to the largest is a number.
    weights = tl.exp((x - tl.where(top == float("-inf"), 0.0, top)) / tl.maximum(temperature, GREEDY_BELOW))
    are_numbers = tl.max((x != x).to(tl.int32), axis=0) == 0
    tl.store(tops + row * num_blocks + block, tl.where(are_numbers, top, float("nan")))
    tl.store(places + row * num_blocks + block, tl.min(tl.where(x == top, columns, size), axis=0))
    tl.store(sums + row * num_blocks + block, tl.sum(weights, axis=0))


@triton.jit
def _draw_kernel(
    logits, rows, temperatures, seeds, positions, last, tops, places, sums, out, tokens, computed, size, num_blocks,
    first_block, own_blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GREEDY_BELOW: tl.constexpr,
    NOT_SAMPLED: tl.constexpr, SHARDED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = tl.load(rows + index)
    position = tl.load(positions + tl.load(last + index)) + 1
    blocks = tl.arange(0, BLOCKS)
    there = blocks < num_blocks
    top = tl.load(tops + index * num_blocks + blocks, there, other=float("-inf"))
    highest = tl.max(top, axis=0)
    are_numbers = (tl.max((top != top).to(tl.int32), axis=0) == 0) & (tl.abs(highest) != float("inf"))
    none: tl.constexpr = 2147483647
    place = tl.load(places + index * num_blocks + blocks, there, other=none)
    token = tl.min(tl.where(top == highest, place, none), axis=0)
    temperature = tl.load(temperatures + row)
    if temperature >= GREEDY_BELOW:
        weight = tl.exp((top - highest) / temperature).to(tl.float64)
        weight *= tl.load(sums + index * num_blocks + blocks, there, other=0.0).to(tl.float64)
        cumulative = tl.cumsum(weight, axis=0)
        target = uniform_at(seeds, row, position) * tl.sum(weight, axis=0)
        block = tl.min(tl.where((cumulative > target) & there, blocks, num_blocks - 1), axis=0)
        rest = target - tl.sum(tl.where(blocks < block, weight, 0.0), axis=0)
        columns = (block - first_block) * BLOCK + tl.arange(0, BLOCK)
        is_own = (columns >= 0) & (columns < size)
        x = tl.load(logits + index.to(tl.int64) * size + columns, is_own, other=float("-inf")).to(tl.float32)
        inner = tl.exp((x - highest) / temperature).to(tl.float64)
        # Rounding can leave the number beyond the block's sum: then it is the block's last token that can be drawn.
        beyond = tl.max(tl.where(inner > 0.0, columns, 0), axis=0)
        token = tl.min(tl.where((tl.cumsum(inner, axis=0) > rest) & (inner > 0.0), columns, beyond), axis=0)
        if SHARDED:
            is_here = (block >= first_block) & (block < first_block + own_blocks)
            token = tl.where(is_here, first_block // own_blocks * size + token, NOT_SAMPLED)
    token = tl.where(are_numbers, token, 0)
    tl.store(out + index, tl.where(are_numbers, token, NOT_SAMPLED))
    tl.store(tokens + row, token)
    tl.store(computed + row, position)


def sample_rows(
    logits: Tensor,
    rows: Tensor,
    last: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    tokens: Tensor,
    computed: Tensor,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample a token from each row of `logits`, and let the sequences go on from there.

    Args:
        logits: [sampled, vocabulary]
        rows: [sampled], int32: the device row of each one's sequence.
        last: [sampled], int32: the place of each one's token in `positions`.
        positions: [tokens], int32: places in their sequences.
        temperatures: [device rows], float32; below 1e-5 the most probable token is taken, of equal ones the first.
        seeds: [device rows, 2], int32: the low and the high half of each one's mixed seed.
        tokens, computed: [device rows], int32: written: the token, and the tokens computed before it.
        out: [at least sampled], int32: written: the tokens, in the order of `rows`; NOT_SAMPLED where the largest of
            the logits is no finite number, for which `tokens` have token 0.

    Returns:
        [sampled, blocks of BLOCK tokens], float32: the largest logit of each block, and the sum of what its tokens'
        probabilities are to the probability of that one.
    """
    count, size = logits.shape
    tops, places, sums = sampled_blocks(logits, rows, temperatures)
    draw_rows(
        logits, rows, last, positions, temperatures, seeds, tokens, computed, out, (tops, places, sums), 0, False
    )  # fmt: skip
    return tops, sums


def sampled_blocks(logits: Tensor, rows: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block of BLOCK logits [sampled, blocks]: the largest, its first place, int32, and the sum of what its
    tokens' probabilities are to the probability of that one; arguments as of `sample_rows`."""
    count, size = logits.shape
    num_blocks = triton.cdiv(size, BLOCK)
    tops = logits.new_empty(count, num_blocks, dtype=torch.float32)
    places = logits.new_empty(count, num_blocks, dtype=torch.int32)
    sums = logits.new_empty(count, num_blocks, dtype=torch.float32)
    _block_kernel[count, num_blocks](
        logits, rows, temperatures, tops, places, sums, size, num_blocks, BLOCK, GREEDY_BELOW, num_warps=4
    )
    return tops, places, sums


def draw_rows(
    logits: Tensor,
    rows: Tensor,
    last: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    tokens: Tensor,
    computed: Tensor,
    out: Tensor,
    blocks: tuple[Tensor, Tensor, Tensor],
    first_block: int,
    is_sharded: bool,
) -> None:
    """Draw by what `sampled_blocks` gave; arguments as of `sample_rows`.

    Args:
        logits: of all blocks, or of those that this rank has.
        blocks: of all ranks, one behind the other, their places being tokens.
        first_block: the first of the rank's own.
        is_sharded: `out` gets NOT_SAMPLED for what another rank draws, and `tokens` the token 0.
    """
    (count, size), num_blocks = logits.shape, blocks[0].shape[1]
    _draw_kernel[(count,)](
        logits, rows, temperatures, seeds, positions, last, *blocks, out, tokens, computed, size, num_blocks,
        first_block, triton.cdiv(size, BLOCK), BLOCK, triton.next_power_of_2(num_blocks), GREEDY_BELOW, NOT_SAMPLED,
        is_sharded, num_warps=4,
    )  # fmt: skip
