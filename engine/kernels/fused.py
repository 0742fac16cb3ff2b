"""Small stages of a decoder layer, each one kernel: residual and norm, rotation and KV store, gated activation.

Each reads its input once, computes in float32 and rounds once; what a product with float8 weights takes is rounded to
float8, with a scale a row, by the kernel that makes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinserve.engine.float8 import FLOAT8, LARGEST_FLOAT8, Float8Rows

_LARGEST = tl.constexpr(LARGEST_FLOAT8)
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _store_row(target, scales, values, inside, FLOAT8: tl.constexpr):
    """Store a program's row of numbers, those `inside`, in float32; as `AbsMaxQuantizer` rounds them if FLOAT8."""
    if FLOAT8:
        largest = tl.max(tl.where(inside, tl.abs(values), 0.0), axis=0)
        scale = tl.maximum(tl.div_rn(largest, _LARGEST), _SMALLEST)
        values = tl.div_rn(values, scale)
        tl.store(scales + tl.program_id(0), scale)
    tl.store(target, values.to(target.dtype.element_ty), inside)


@triton.jit
def store_normed(target, scales, values, weights, inside, eps, size, FLOAT8: tl.constexpr):
    """Store a row after root mean square normalisation, as `_store_row` does."""
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    _store_row(target, scales, wide * scale * weights.to(tl.float32), inside, FLOAT8)


@triton.jit
def _quantize_kernel(x, out, scales, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row + columns, inside, other=0.0).to(tl.float32)
    _store_row(out + row + columns, scales, values, inside, True)


def quantize_rows(x: Tensor) -> Float8Rows:
    """`x` [rows, size] in float8, each row with a scale of its own."""
    x = x.contiguous()
    out, (rows, size) = float8_like(x, x.shape[1]), x.shape
    block = triton.next_power_of_2(size)
    _quantize_kernel[(rows,)](x, out.values, out.scale, size, block, num_warps=_warps(block))
    return out


def float8_like(x: Tensor, size: int) -> Float8Rows:
    """Room for `size` numbers in float8 for each row of `x`."""
    return Float8Rows(x.new_empty(len(x), size, dtype=FLOAT8), x.new_empty(len(x), 1, dtype=torch.float32), x.dtype)


def _warps(block: int) -> int:
    """For a program that has a row of so many numbers in its registers."""
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, out, scales, eps, size, BLOCK: tl.constexpr, ADD: tl.constexpr, FLOAT8: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row + columns, inside, other=0.0)
    if ADD:
        before = tl.load(residual + row + columns, inside, other=0.0)
        values = (values.to(tl.float32) + before.to(tl.float32)).to(values.dtype)
        tl.store(residual + row + columns, values, inside)
    weights = tl.load(weight + columns, inside, other=0.0)
    store_normed(out + row + columns, scales, values, weights, inside, eps, size, FLOAT8)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Root mean square normalisation of the rows of `x` [rows, size]; with `residual`, of the sum of both.

    Args:
        residual: [rows, size]; the sum is left in it.
        out: takes the result, if there is one.
    """
    out = torch.empty_like(x) if out is None else out
    _rms_norm(x, weight, eps, residual, out, None)
    return out


def rms_norm_float8(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Float8Rows:
    """What `rms_norm` gives, in float8."""
    out = float8_like(x, x.shape[1])
    _rms_norm(x, weight, eps, residual, out.values, out.scale)
    return out


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor, scales: Tensor | None
) -> None:
    rows, size = x.shape
    block = triton.next_power_of_2(size)
    warps = 4 if block <= 2048 else 8
    _rms_norm_kernel[(rows,)](
        x, x if residual is None else residual, weight, out, x if scales is None else scales, eps, size, block,
        residual is not None, scales is not None, num_warps=warps,
    )  # fmt: skip


@triton.jit
def _rotate_and_store_kernel(
    qkv, positions, slots, cosines, sines, norms, query, keys, values, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    size: tl.constexpr = 2 * HALF
    inside = (heads < HEADS + 2 * KV_HEADS) & (columns < HALF)
    turned = inside & (heads < HEADS + KV_HEADS)
    source = qkv + token * (HEADS + 2 * KV_HEADS) * size + heads * size + columns
    first = tl.load(source, inside, other=0.0)
    second = tl.load(source + HALF, inside, other=0.0)

    x, y = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / size + eps)[:, None]
        x *= scale * tl.load(norms + heads * size + columns, turned, other=0.0).to(tl.float32)
        y *= scale * tl.load(norms + heads * size + HALF + columns, turned, other=0.0).to(tl.float32)
    angle = tl.load(positions + token).to(tl.int64) * HALF + columns
    cosine = tl.load(cosines + angle, columns < HALF, other=0.0)
    sine = tl.load(sines + angle, columns < HALF, other=0.0)
    low = x * cosine - y * sine
    high = y * cosine + x * sine
    kept = keys.dtype.element_ty

    is_query = inside & (heads < HEADS)
    target = query + token * HEADS * size + heads * size + columns
    tl.store(target, low.to(query.dtype.element_ty), is_query)
    tl.store(target + HALF, high.to(query.dtype.element_ty), is_query)
    slot = tl.load(slots + token).to(tl.int64)
    is_key = turned & (heads >= HEADS) & (slot >= 0)
    target = keys + slot * KV_HEADS * size + (heads - HEADS) * size + columns
    tl.store(target, low.to(kept), is_key)
    tl.store(target + HALF, high.to(kept), is_key)
    is_value = inside & (heads >= HEADS + KV_HEADS) & (slot >= 0)
    target = values + slot * KV_HEADS * size + (heads - HEADS - KV_HEADS) * size + columns
    tl.store(target, first.to(tl.float32).to(kept), is_value)
    tl.store(target + HALF, second.to(tl.float32).to(kept), is_value)


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    rotation: tuple[Tensor, Tensor],
    norm: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """The rotated queries of a layer; its keys, rotated, and its values go into the pool.

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * head_dim], as the projection gives it.
        positions, slots: [tokens], int32; a token with a negative slot is not stored.
        rotation: cosines and sines [positions, head_dim / 2], float32.
        norm: weights [heads + kv_heads, head_dim] of the norm of queries and keys; None is no norm.
        keys, values: a layer's pool [num_blocks, block_size, kv_heads, head_dim].

    Returns:
        [tokens, heads, head_dim]
    """
    tokens, (kv_heads, head_dim) = len(qkv), keys.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = qkv.new_empty(tokens, heads, head_dim)
    # One head a program keeps a small step's latency down; eight make a large one's programs worth their start.
    block_heads = 1 if tokens <= 32 else 8
    grid = tokens, triton.cdiv(heads + 2 * kv_heads, block_heads)
    _rotate_and_store_kernel[grid](
        qkv, positions, slots, *rotation, qkv if norm is None else norm, query, keys, values, eps,
        heads, kv_heads, head_dim // 2, triton.next_power_of_2(head_dim // 2), block_heads, norm is not None,
        num_warps=1 if block_heads == 1 else 4,
    )  # fmt: skip
    return query


@triton.jit
def _silu_and_mul_kernel(x, out, scales, size, BLOCK: tl.constexpr, FLOAT8: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(x + row * 2 * size + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + columns, inside, other=0.0).to(tl.float32)
    _store_row(out + row * size + columns, scales, gate * tl.sigmoid(gate) * up, inside, FLOAT8)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up for `x` [rows, 2 size], a gate and what it lets through beside each other: [rows, size]."""
    rows, size = len(x), x.shape[1] // 2
    out = x.new_empty(rows, size)
    _silu_and_mul_kernel[rows, triton.cdiv(size, 1024)](x, out, x, size, 1024, False, num_warps=4)
    return out


def silu_and_mul_float8(x: Tensor) -> Float8Rows:
    """What `silu_and_mul` gives, in float8; a program has a whole row, as its scale hangs on all of it."""
    size = x.shape[1] // 2
    out, block = float8_like(x, size), triton.next_power_of_2(size)
    _silu_and_mul_kernel[len(x), 1](x, out.values, out.scale, size, block, True, num_warps=_warps(block))
    return out
