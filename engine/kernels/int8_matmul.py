"""Matrix product with int8 weights that are dequantised on the way, for few rows on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST_DOT = 16
"""Rows of the narrowest product that tensor cores make."""

SHARED_BYTES = 160 << 10
"""Of a multiprocessor's shared memory, what the tiles in flight may take; Hopper's has 227 KiB."""

MULTIPROCESSORS = 132
"""Of an H100; another number costs some time and changes no result."""


@dataclass(frozen=True)
class Tiling:
    """How the product is cut: a program computes `rows` x `outputs` of the result, `inputs` of the sum at a time.

    Attributes:
        warps: of a program.
        stages: tiles in flight.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor, tiling: Tiling | None = None) -> Tensor:
    """x @ (weight * scale).T, each weight read once as int8 and summed up in float32.

    With few rows a product costs what reading the weights does, and int8 is half of bfloat16.

    Args:
        x: [rows, in], bfloat16, contiguous.
        weight: [out, in], int8, contiguous.
        scale: [out, 1], float32.
        tiling: None takes `choose_tiling`'s.

    Returns:
        [rows, out], bfloat16.
    """
    rows, num_in = x.shape
    num_out = len(weight)
    tiling = tiling or choose_tiling(rows, num_out, num_in)
    out = x.new_empty(rows, num_out)
    grid = (triton.cdiv(num_out, tiling.outputs), triton.cdiv(rows, tiling.rows))
    _multiply[grid](
        x,
        weight,
        scale,
        out,
        rows,
        num_out,
        num_in,
        tiling.rows,
        tiling.outputs,
        tiling.inputs,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out


@lru_cache(maxsize=1024)
def choose_tiling(rows: int, num_out: int, num_in: int) -> Tiling:
    """A tiling that keeps a device of MULTIPROCESSORS reading.

    Narrow layers get the narrowest programs, as there would be too few of them; wide ones get wide programs, which read
    `x` less often. As many tiles are in flight as a row of them has, or as shared memory holds.
    """
    outputs = 16
    while outputs < 64 and num_out >= 2 * MULTIPROCESSORS * outputs:
        outputs *= 2
    inputs = 256 if num_in >= 1024 and outputs == 16 else 128
    row_block = min(64, max(SMALLEST_DOT, triton.next_power_of_2(rows)))
    tile_bytes = inputs * (outputs + row_block * torch.bfloat16.itemsize)
    stages = max(2, min(triton.cdiv(num_in, inputs), 8, SHARED_BYTES // tile_bytes))
    return Tiling(row_block, outputs, inputs, warps=2 if outputs == 16 else 4, stages=stages)


# One program for any number of rows in a block: a new one would be compiled in the middle of serving.
@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    rows,
    num_out,
    num_in: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """A block of the result, [BLOCK_ROWS, BLOCK_OUT]."""
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # In 64 bits, as the table of a large vocabulary has more than 2**31 weights.
    out = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.arange(0, BLOCK_IN)
    is_row, is_out = row[:, None] < rows, out[None, :] < num_out
    x_at = x_ptr + row[:, None] * num_in + inner[None, :]
    weight_at = weight_ptr + out[None, :] * num_in + inner[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, num_in, BLOCK_IN):
        is_inner = inner < num_in - start
        x = tl.load(x_at + start, mask=is_row & is_inner[None, :], other=0.0)
        weight = tl.load(weight_at + start, mask=is_out & is_inner[:, None], other=0)
        # Every int8 is exact in bfloat16, so nothing is lost before the sum.
        total = tl.dot(x, weight.to(x.dtype), total)
    scale = tl.load(scale_ptr + out, mask=out < num_out, other=0.0)
    out_at = out_ptr + row[:, None] * num_out + out[None, :]
    tl.store(out_at, (total * scale[None, :]).to(out_ptr.dtype.element_ty), mask=is_row & is_out)
