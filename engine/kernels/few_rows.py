"""A decoder layer for a few rows: products with what lies beside them, and attention with rotation and KV store.

So few rows leave a step no longer than its weights take to be read, if kernels do not wait for one another. So each
kernel here starts while the one before it runs (programmatic dependent launch), asks for what it knows already, its
weights or its keys and values, and only then waits for its input. Of what else a step writes, a kernel may read before
it waits what an earlier step has written: the rows' places and tables, and their KV but for the newest token's.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from twinserve.engine.kernels.cuts import RowsCut, block_heads, decode_cut, power_of_2
from twinserve.engine.kernels.paged_attention import LOG2_E, attend_to, merge_kernel, read_block, span_of
from twinserve.engine.models.config import ModelConfig
from twinserve.engine.models.decoder import Linear

MOST_ROWS = 8
"""Rows up to which `attend` is faster than rotation and attention one after the other, on an H200."""

FEW_BYTES = 128 << 20
"""Bytes of a layer's weights, times rows, up to which `product` is faster for more than one row."""


@triton.jit
def _fetch(matrix, columns, K: tl.constexpr):
    """Have some columns of a matrix, K bfloat16 each, brought into the L2 cache, which takes lines of 128 bytes."""
    for first in range(0, K, 4096):
        lines = first + tl.arange(0, 64) * 64
        pointers = matrix + columns[:, None] * K + tl.where(lines < K, lines, 0)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def _add_products(
    x, norm, weight, gate, sums, gates, squares, NORM: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """The products of some numbers of each row more, whose squares are added up beside them if there is a norm."""
    values = tl.load(x).to(tl.float32)
    if NORM:
        squares += values * values
        values *= tl.load(norm).to(tl.float32)[None, :]
    sums += weight.to(tl.float32)[None, :, :] * values[:, None, :]
    if GATED:
        gates += gate.to(tl.float32)[None, :, :] * values[:, None, :]
    return sums, gates, squares


@triton.jit
def _product_kernel(
    x, weight, norm, bias, out, eps,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lines, inner = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_K)
    # Of a gated product the gates come first, then what they let through.
    gates_in = weight + columns[:, None] * K + inner[None, :]
    weights_in = gates_in + (N * K if GATED else 0)
    if EARLY:
        first_weights = tl.load(weights_in)
        first_gates = tl.load(gates_in) if GATED else first_weights
        _fetch(weight, columns, K)
        if GATED:
            _fetch(weight + N * K, columns, K)
    gdc_wait()
    sums = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    gates = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    source = x + lines * K + inner[None, :]
    if EARLY:
        sums, gates, squares = _add_products(
            source, norm + inner, first_weights, first_gates, sums, gates, squares, NORM, GATED
        )
    for first in range(BLOCK_K if EARLY else 0, K, BLOCK_K):
        weights = tl.load(weights_in + first)
        sums, gates, squares = _add_products(
            source + first, norm + first + inner, weights, tl.load(gates_in + first) if GATED else weights, sums, gates,
            squares, NORM, GATED,
        )  # fmt: skip
    total = tl.sum(sums, axis=2)
    gate = tl.sum(gates, axis=2)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[:, None]
        total *= scale
        gate *= scale
    if BIAS:
        total += tl.load(bias + (N if GATED else 0) + columns).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(bias + columns).to(tl.float32)[None, :]
    if GATED:
        total *= gate * tl.sigmoid(gate)
    target = out + lines * N + columns[None, :]
    if ADD:
        total += tl.load(target).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty))


def product(
    x: Tensor,
    linear: nn.Linear,
    norm: Tensor | None = None,
    eps: float = 0.0,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The product of a few rows with the weights of a layer, rounded once.

    Args:
        x: [rows, K], 1, 2 or 4 rows.
        linear: weight [N, K], or [2 N, K] if gated, and bias [N, or 2 N] or None.
        norm: [K], weights of a root mean square normalisation of `x` before the product; None is none.
        gated: silu(gate) * up, of a product that has the gates first.
        residual: [rows, N]; the product is added to it, and it is returned.
        out: takes the product, if there is one and no `residual`.

    Returns:
        [rows, N]
    """
    weight, bias, rows = linear.weight, linear.bias, len(x)
    size, inner = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    if residual is not None:
        out = residual
    elif out is None:
        out = x.new_empty(rows, size)
    cut = RowsCut.of(rows, size, inner, weight.nbytes, normed=norm is not None, gated=gated)
    _product_kernel[(size // cut.columns,)](
        x, weight, weight if norm is None else norm, weight if bias is None else bias, out, eps,
        rows, size, inner, cut.columns, cut.block, norm is not None, bias is not None, gated, residual is not None,
        cut.early, num_warps=cut.warps, num_stages=2, launch_pdl=True,
    )  # fmt: skip
    return out


def has_product(rows: int, config: ModelConfig) -> bool:
    """Is `product` faster than cuBLAS' and the small kernels beside it for so many rows of a model?

    It multiplies without matrix units, so each row more costs time where weights are many. Measured on an H200.
    """
    layer_bytes = 2 * config.num_layer_parameters // config.num_layers
    return rows == 1 or (rows in (2, 4) and rows * layer_bytes <= FEW_BYTES)


def fits(linears: Iterable[nn.Module]) -> bool:
    """Have layers plain weights in sizes that `product` is made for?"""
    return all(
        type(linear) is Linear and not linear.in_features % 64 and not linear.out_features % 128 for linear in linears
    )


@triton.jit
def _turned(
    source, norms, columns, in_head, real, cosine, sine, eps, SIZE: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Heads that lie at `source` [heads, 1], normalised and rotated; `cosine` and `sine` are [1, columns], the sine of
    the first half negative."""
    half: tl.constexpr = SIZE // 2
    partners = tl.where(columns < half, columns + half, columns - half)
    mask = real & in_head[None, :]
    x = tl.load(source + columns[None, :], mask, other=0.0).to(tl.float32)
    y = tl.load(source + partners[None, :], mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None]
        x *= scale * tl.load(norms + columns[None, :], mask, other=0.0).to(tl.float32)
        y *= scale * tl.load(norms + partners[None, :], mask, other=0.0).to(tl.float32)
    return x * cosine + y * sine


@triton.jit
def _attend_kernel(
    qkv, cosines, sines, norms, keys, values, rows, tables, positions, out, parts, sums, eps, scale, scratch,
    table_width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr, WINDOW: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    table_row = tl.load(rows + row)
    position = tl.load(positions + row)
    length = position + 1
    hidden = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    span = span_of(length - hidden, SPLITS, SHORTEST, BLOCK_N)
    begin = hidden + split * span
    if (table_row == scratch) | (begin >= length):
        gdc_wait()
        return
    end = tl.minimum(begin + span, length)
    # The newest token is not in the pool yet.
    stop = tl.minimum(end, position)
    table = tables + table_row.to(tl.int64) * table_width
    group: tl.constexpr = HEADS // KV_HEADS
    half: tl.constexpr = SIZE // 2
    members, columns = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_D)
    in_head = columns < SIZE
    angle = position.to(tl.int64) * half + columns % half
    cosine = tl.load(cosines + angle, in_head, other=0.0)[None, :]
    sine = (tl.load(sines + angle, in_head, other=0.0) * tl.where(columns < half, -1.0, 1.0))[None, :]
    tokens = begin + tl.arange(0, BLOCK_N)
    known = tokens < stop
    k, v = read_block(keys, values, table, tokens, known, kv_head, columns, in_head, KV_HEADS, SIZE, BLOCK_SIZE, False)
    slot = tl.load(table + position // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    gdc_wait()
    source = qkv + row * (HEADS + 2 * KV_HEADS) * SIZE
    heads, real = kv_head * group + members, (members < group)[:, None]
    place = heads[:, None] * SIZE
    q = _turned(source + place, norms + place, columns, in_head, real, cosine, sine, eps, SIZE, NORM)
    q = q.to(qkv.dtype.element_ty)
    top = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    summed = tl.zeros([BLOCK_HEADS, BLOCK_D], tl.float32)
    if end == length:
        own = (HEADS + kv_head + tl.arange(0, 1)[:, None]) * SIZE
        key = _turned(source + own, norms + own, columns, in_head, True, cosine, sine, eps, SIZE, NORM)
        value = tl.load(source + KV_HEADS * SIZE + own + columns[None, :], in_head[None, :], other=0.0)
        key, value = key.to(keys.dtype.element_ty), value.to(values.dtype.element_ty)
        target = (slot * KV_HEADS + kv_head) * SIZE + columns[None, :]
        tl.store(keys + target, key, in_head[None, :])
        tl.store(values + target, value, in_head[None, :])
        top = tl.sum(q.to(tl.float32) * key.to(q.dtype).to(tl.float32), axis=1) * scale
        total += 1.0
        summed += value.to(tl.float32)
    top, total, summed = attend_to(q, k, v, tokens, known, None, scale, top, total, summed, False, False, 0, "tf32")
    for first in range(begin + BLOCK_N, stop, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        known = tokens < stop
        k, v = read_block(
            keys, values, table, tokens, known, kv_head, columns, in_head, KV_HEADS, SIZE, BLOCK_SIZE, False
        )
        top, total, summed = attend_to(q, k, v, tokens, known, None, scale, top, total, summed, False, False, 0, "tf32")
    head = row * HEADS + heads
    mask = real & in_head[None, :]
    if length - hidden <= span:
        target = out + head[:, None] * SIZE + columns[None, :]
        tl.store(target, (summed / total[:, None]).to(out.dtype.element_ty), mask)
    else:
        tl.store(parts + (head * SPLITS + split)[:, None] * SIZE + columns[None, :], summed / total[:, None], mask)
        tl.store(sums + head * SPLITS + split, top + tl.log2(total), members < group)


def attend(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor],
    norm: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    tables: Tensor,
    positions: Tensor,
    window: int | None = None,
) -> Tensor:
    """What `rotate_and_store` and `decode_attention` give for a token of each of a few sequences, no two of them one.

    Args:
        qkv, rotation, norm, eps, keys, values: as of `rotate_and_store`; 16 bits a number of `qkv`.
        rows, tables, positions, window: as of `decode_attention`; written before the kernel before this one started.

    Returns:
        [tokens, heads * head_dim]; nothing for tokens of scratch.
    """
    tokens, (block_size, kv_heads, size) = len(qkv), keys.shape[1:]
    heads = qkv.shape[1] // size - 2 * kv_heads
    cut, block_d = decode_cut(tokens, kv_heads, qkv.dtype), power_of_2(size)
    out = qkv.new_empty(tokens, heads * size)
    parts = qkv.new_empty(tokens, heads, cut.splits, size, dtype=torch.float32)
    sums = qkv.new_empty(tokens, heads, cut.splits, dtype=torch.float32)
    scratch, width = len(tables) - 1, tables.shape[1]
    _attend_kernel[tokens, kv_heads, cut.splits](
        qkv, *rotation, qkv if norm is None else norm, keys, values, rows, tables, positions, out, parts, sums, eps,
        LOG2_E / sqrt(size), scratch, width,
        heads, kv_heads, size, block_size, block_heads(heads // kv_heads), block_d, cut.block, cut.splits,
        cut.shortest, window or 0, norm is not None, num_warps=8 if tokens <= 2 else 4, num_stages=2, launch_pdl=True,
    )  # fmt: skip
    merge_kernel[tokens, heads](
        parts, sums, rows, positions, out, scratch, heads, size, block_d, cut.block, cut.splits, cut.shortest,
        window or 0, True, num_warps=1, launch_pdl=True,
    )  # fmt: skip
    return out
