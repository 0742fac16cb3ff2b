"""Attention over paged KV in Triton: any block size, rows described on the device, so that a graph can hold it.

Decode: a program has all query heads that share a KV head, so keys and values are read once, and a span of the context;
spans are merged by a second kernel. Prompts: a program has a tile of a row's tokens, again with all heads of a KV head.
Both are flash attention (arXiv:2205.14135): one pass with a running maximum.
"""

from __future__ import annotations

from math import log2, sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from twinserve.engine.kernels.cuts import PromptCut, block_heads, decode_cut, power_of_2, tile_tokens

LOG2_E = log2(2.718281828459045)


@triton.jit
def span_of(length, SPLITS: tl.constexpr, SHORTEST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tokens of each of the spans that a context is cut into, but for the last."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N, SHORTEST)


@triton.jit
def read_block(
    keys, values, table, tokens, known, kv_head, columns, in_head,
    KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys [head_dim, tokens] and values [tokens, head_dim] of some tokens of a context; all of them are known, if
    WHOLE."""
    if WHOLE:
        block = tl.load(table + tokens // BLOCK_SIZE).to(tl.int64)
    else:
        block = tl.load(table + tokens // BLOCK_SIZE, known, other=0).to(tl.int64)
    place = (block * BLOCK_SIZE + tokens % BLOCK_SIZE) * (KV_HEADS * SIZE) + kv_head * SIZE
    if WHOLE and columns.shape[0] == SIZE:
        k = tl.load(keys + place[None, :] + columns[:, None])
        v = tl.load(values + place[:, None] + columns[None, :])
    else:
        k = tl.load(keys + place[None, :] + columns[:, None], known[None, :] & in_head[:, None], other=0.0)
        v = tl.load(values + place[:, None] + columns[None, :], known[:, None] & in_head[None, :], other=0.0)
    return k, v


@triton.jit
def _as_wide(x, like):
    """Numbers of a pool as those they are multiplied with.

    Of float8 (e4m3), four at a time become float16, which holds each of them. Said to have effects, so that it stays
    where it is: moved behind the shared memory, it would have values read from there byte by byte.
    """
    if x.dtype == tl.float8e4nv and like.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.rn.f16x2.e4m3x2 $0, low;"
            " cvt.rn.f16x2.e4m3x2 $1, high; }",
            "=r,=r,r", [x], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        return x.to(like.dtype)


@triton.jit
def attend_to(
    q, k, v, tokens, known, last, scale, top, total, summed,
    WHOLE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some tokens of a context more: the running maximum, the sum of weights, and the weighted sum of values.

    All queries attend to all of the tokens, if WHOLE; else to those that are `known`, or, if CAUSAL, each to those up
    to position `last`; to WINDOW of these, the last ones, unless it is 0.
    """
    if v.dtype == tl.float8e4nv and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)
    score = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
    if not WHOLE:
        seen = tokens[None, :] <= last[:, None] if CAUSAL else known[None, :]
        if CAUSAL and WINDOW:
            seen = seen & (tokens[None, :] > last[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, axis=1))
    # The first tokens that are read may lie before a query's window, all of them: there is no maximum then.
    base = tl.where(higher == float("-inf"), 0.0, higher) if CAUSAL and WINDOW else higher
    weight = tl.exp2(score - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weight, axis=1)
    summed = summed * fade[:, None] + tl.dot(weight.to(q.dtype), _as_wide(v, q), input_precision=PRECISION)
    return higher, total, summed


@triton.jit
def _attend_block(
    q, keys, values, table, tokens, known, last, kv_head, columns, in_head, scale, top, total, summed,
    KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WHOLE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`read_block`, then `attend_to`."""
    if WHOLE:
        known = tokens >= 0
    k, v = read_block(keys, values, table, tokens, known, kv_head, columns, in_head, KV_HEADS, SIZE, BLOCK_SIZE, WHOLE)
    return attend_to(q, k, v, tokens, known, last, scale, top, total, summed, WHOLE, CAUSAL, WINDOW, PRECISION)


@triton.jit
def _decode_kernel(
    query, keys, values, rows, tables, positions, out, parts, sums, scale, scratch, table_width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    table_row = tl.load(rows + row)
    if table_row == scratch:
        return
    length = tl.load(positions + row) + 1
    hidden = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    span = span_of(length - hidden, SPLITS, SHORTEST, BLOCK_N)
    begin = hidden + split * span
    if begin >= length:
        return
    end = tl.minimum(begin + span, length)
    table = tables + table_row.to(tl.int64) * table_width

    group: tl.constexpr = HEADS // KV_HEADS
    members = tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_D)
    in_head = columns < SIZE
    head = row * HEADS + kv_head * group + members
    q = tl.load(
        query + head[:, None] * SIZE + columns[None, :], (members < group)[:, None] & in_head[None, :], other=0.0
    )
    top = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    summed = tl.zeros([BLOCK_HEADS, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        known = tokens < end
        top, total, summed = _attend_block(
            q, keys, values, table, tokens, known, None, kv_head, columns, in_head, scale, top, total, summed,
            KV_HEADS, SIZE, BLOCK_SIZE, False, False, 0, PRECISION,
        )  # fmt: skip

    place = head[:, None] * SIZE + columns[None, :]
    mask = (members < group)[:, None] & in_head[None, :]
    if length - hidden <= span:
        tl.store(out + place, (summed / total[:, None]).to(out.dtype.element_ty), mask)
    else:
        tl.store(parts + (head * SPLITS + split)[:, None] * SIZE + columns[None, :], summed / total[:, None], mask)
        tl.store(sums + head * SPLITS + split, top + tl.log2(total), members < group)


@triton.jit
def merge_kernel(
    parts, sums, rows, positions, out, scratch, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SHORTEST: tl.constexpr, WINDOW: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What the spans of a context give, put together; started AHEAD of their end or behind it."""
    if AHEAD:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    table_row = tl.load(rows + row)
    length = tl.load(positions + row) + 1
    if WINDOW:
        length = tl.minimum(length, WINDOW)
    span = span_of(length, SPLITS, SHORTEST, BLOCK_N)
    if AHEAD:
        gdc_wait()
    if (table_row == scratch) | (length <= span):
        return
    head = row * HEADS + tl.program_id(1)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    used = splits * span < length
    weight = tl.load(sums + head * SPLITS + splits, used, other=float("-inf"))
    weight = tl.exp2(weight - tl.max(weight, axis=0))
    mask = used[:, None] & (columns < SIZE)[None, :]
    part = tl.load(parts + (head * SPLITS + splits)[:, None] * SIZE + columns[None, :], mask, other=0.0)
    merged = tl.sum(part * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out + head * SIZE + columns, merged.to(out.dtype.element_ty), columns < SIZE)


@triton.jit
def _prefill_kernel(
    query, keys, values, tiles, tables, out, scale, table_width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A tile: the device row of its sequence, its first token in the batch, that token's position, its tokens.
    tile, kv_head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    table = tables + tl.load(tile).to(tl.int64) * table_width
    offset, start, count = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if count == 0:
        return
    group: tl.constexpr = HEADS // KV_HEADS
    lines = tl.arange(0, BLOCK_TOKENS * BLOCK_HEADS)
    token, member = lines // BLOCK_HEADS, lines % BLOCK_HEADS
    columns = tl.arange(0, BLOCK_D)
    in_head = columns < SIZE
    mine = (token < count) & (member < group)
    place = ((offset + token).to(tl.int64) * HEADS + kv_head * group + member)[:, None] * SIZE + columns[None, :]
    q = tl.load(query + place, mine[:, None] & in_head[None, :], other=0.0)
    top = tl.full([BLOCK_TOKENS * BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_TOKENS * BLOCK_HEADS], tl.float32)
    summed = tl.zeros([BLOCK_TOKENS * BLOCK_HEADS, BLOCK_D], tl.float32)
    last = start + token
    begin = tl.maximum(start + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N if WINDOW else 0
    # What lies before the tile, all of its tokens attend to; to look which do would cost a fifth of the time.
    whole = begin if WINDOW else (start + 1) // BLOCK_N * BLOCK_N
    for first in range(begin, whole, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        top, total, summed = _attend_block(
            q, keys, values, table, tokens, None, last, kv_head, columns, in_head, scale, top, total, summed,
            KV_HEADS, SIZE, BLOCK_SIZE, True, False, 0, PRECISION,
        )  # fmt: skip
    for first in range(whole, start + count, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        known = tokens < start + count
        top, total, summed = _attend_block(
            q, keys, values, table, tokens, known, last, kv_head, columns, in_head, scale, top, total, summed,
            KV_HEADS, SIZE, BLOCK_SIZE, False, True, WINDOW, PRECISION,
        )  # fmt: skip
    tl.store(out + place, (summed / total[:, None]).to(out.dtype.element_ty), mine[:, None] & in_head[None, :])


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    tables: Tensor,
    positions: Tensor,
    out: Tensor,
    window: int | None = None,
) -> None:
    """Attention of one token of each row over its whole context, its own KV written already.

    Args:
        query: [tokens, heads, head_dim]
        keys, values: a layer's pool [num_blocks, block_size, kv_heads, head_dim].
        rows: [tokens], int32: the row of `tables` that each token's sequence has.
        tables: [rows, blocks], int32: ids of the blocks that hold each row's context, in token order; the last row is
            scratch, and a token of it is left out.
        positions: [tokens or more], int32: each token's place in its sequence.
        out: [tokens, heads, head_dim]; written but for tokens of scratch.
        window: tokens that each attends to, itself the last of them; None is its whole context.
    """
    tokens, heads, size = query.shape
    block_size, kv_heads = keys.shape[1:3]
    cut = decode_cut(tokens, kv_heads, query.dtype)
    parts = query.new_empty(tokens, heads, cut.splits, size, dtype=torch.float32) if cut.splits > 1 else out
    sums = query.new_empty(tokens, heads, cut.splits, dtype=torch.float32) if cut.splits > 1 else out
    block_d = power_of_2(size)
    scale = LOG2_E / sqrt(size)
    _decode_kernel[tokens, kv_heads, cut.splits](
        query, keys, values, rows, tables, positions, out, parts, sums, scale, len(tables) - 1, tables.shape[1],
        heads, kv_heads, size, block_size, block_heads(heads // kv_heads), block_d,
        cut.block, cut.splits, cut.shortest, window or 0, dot_precision(query.dtype), num_warps=cut.warps,
        num_stages=cut.stages,
    )  # fmt: skip
    if cut.splits > 1:
        merge_kernel[tokens, heads](
            parts, sums, rows, positions, out, len(tables) - 1, heads, size, block_d, cut.block, cut.splits,
            cut.shortest, window or 0, False, num_warps=1,
        )  # fmt: skip


def prefill_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Tensor,
    tables: Tensor,
    out: Tensor,
    window: int | None = None,
) -> None:
    """Causal attention of several tokens of each row, the last of which ends the row's context.

    Args:
        query: [tokens, heads, head_dim], the rows' tokens one after another.
        keys, values: a layer's pool [num_blocks, block_size, kv_heads, head_dim], this step's written already.
        tiles: [tiles, 4], int32: of each tile of at most `tile_tokens` tokens of one row, the row of `tables`, its
            first token's place in `query`, that token's place in its sequence, and how many tokens; 0 for no tile.
        tables, window: as in `decode_attention`.
        out: [tokens, heads, head_dim]; written where tiles are.
    """
    _, heads, size = query.shape
    block_size, kv_heads = keys.shape[1:3]
    cut, group = PromptCut.of(query.dtype), heads // kv_heads
    _prefill_kernel[len(tiles), kv_heads](
        query, keys, values, tiles, tables, out, LOG2_E / sqrt(size), tables.shape[1],
        heads, kv_heads, size, block_size, tile_tokens(group, query.dtype), power_of_2(group), power_of_2(size),
        cut.block, window or 0, dot_precision(query.dtype), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def dot_precision(dtype: torch.dtype) -> str:
    """float32 is multiplied as float32, not as TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"
