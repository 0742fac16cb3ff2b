"""Matrix product with int8 weights that are dequantised on the way, for few rows on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinserve.engine.kernels import SMALLEST_DOT

SHARED_BYTES = 160 << 10
"""Of a multiprocessor's shared memory, what the tiles in flight may take; Hopper's has 227 KiB."""

MULTIPROCESSORS = 132
"""Of an H100; another number costs some time and changes no result."""

SPLITS = 4
"""Parts of the sum of a layer too narrow to keep every multiprocessor reading; 1, 2 and 4 were measured."""


@dataclass(frozen=True)
class Tiling:
    """How the product is cut: a program computes `rows` x `outputs` of the result, `inputs` of the sum at a time.

    Attributes:
        splits: programs that share a sum; the last of them to finish adds their parts up, always in the same order.
        warps: of a program.
        stages: tiles in flight.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor, tiling: Tiling | None = None) -> Tensor:
    """x @ (weight * scale).T, each weight read once as int8 and summed up in float32.

    With few rows a product costs what reading the weights does, and int8 is half of bfloat16.

    Args:
        x: [rows, in], bfloat16 or float16, contiguous.
        weight: [out, in], int8, contiguous.
        scale: [out, 1], float32.
        tiling: None takes `choose_tiling`'s.

    Returns:
        [rows, out], of the dtype of `x`.
    """
    rows, num_in = x.shape
    num_out = len(weight)
    aligned = not (x.data_ptr() | weight.data_ptr() | scale.data_ptr()) % 16
    out = x.new_empty(rows, num_out)
    _launcher(rows, num_out, num_in, x.device, aligned, tiling)(x, weight, scale, out)
    return out


@lru_cache(maxsize=1024)
def choose_tiling(rows: int, num_out: int, num_in: int) -> Tiling:
    """A tiling that keeps a device of MULTIPROCESSORS reading.

    Narrow tiles, many in flight, and split sums where even those are too few; a vocabulary's width gets wide tiles,
    which read `x` less often. Measured by benchmarks/int8_layers.py --tune.
    """
    row_block = min(64, max(SMALLEST_DOT, triton.next_power_of_2(rows)))
    warps = 2 if row_block == SMALLEST_DOT else 4
    if num_out >= 2 * MULTIPROCESSORS * 64:
        tile_bytes = 128 * (64 + row_block * torch.bfloat16.itemsize)
        stages = max(2, min(triton.cdiv(num_in, 128), 8, SHARED_BYTES // tile_bytes))
        return Tiling(row_block, 64, 128, 1, warps=4, stages=stages)
    splits = 1 if triton.cdiv(num_out, 16) >= MULTIPROCESSORS else min(SPLITS, triton.cdiv(num_in, 64))
    stages = max(2, min(6, triton.cdiv(num_in, 64 * splits)))
    return Tiling(row_block, 16, 64, splits, warps, stages)


@cache
def _counts(device: torch.device) -> Tensor:
    """How many programs of a split sum have finished, by block of the result; all 0 between products of a stream."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


@cache
def _parts(size: int, device: torch.device) -> Tensor:
    """Where the parts of split sums are kept, for one product of a stream after another."""
    return torch.empty(size, dtype=torch.float32, device=device)


@lru_cache(maxsize=4096)
def _launcher(
    rows: int, num_out: int, num_in: int, device: torch.device, aligned: bool, tiling: Tiling | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Launches the product of a shape: `launch(x, weight, scale, out)`.

    Triton looks at every argument at every call to choose among what it has compiled, which takes the host longer than
    torch takes to launch its own product. Here what it looks at is known: the shape and whether pointers are `aligned`.
    """
    tiling = tiling or choose_tiling(rows, num_out, num_in)
    grid = (triton.cdiv(num_out, tiling.outputs), triton.cdiv(rows, tiling.rows), tiling.splits)
    counts = _counts(device)
    if tiling.splits > 1 and grid[0] * grid[1] > len(counts):
        raise ValueError(f"{grid[0] * grid[1]} blocks of a split sum, expected at most {len(counts)}")
    # As large as any number of rows in the same blocks needs, so that few are kept.
    parts = _parts(tiling.splits * grid[1] * tiling.rows * num_out if tiling.splits > 1 else 1, device)
    fixed = (parts, counts, rows, num_out, num_in, tiling.rows, tiling.outputs, tiling.inputs, tiling.splits)
    run = None

    def launch(*tensors: Tensor) -> None:
        nonlocal run
        if run is None:
            compiled = _multiply[grid](*tensors, *fixed, num_warps=tiling.warps, num_stages=tiling.stages)
            run = compiled[grid]
        else:
            run(*tensors, *fixed)

    return launch


# One program for any number of rows in a block: a new one would be compiled in the middle of serving.
@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    parts_ptr,
    counts_ptr,
    rows,
    num_out,
    num_in: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A block of the result, [BLOCK_ROWS, BLOCK_OUT], or one of SPLITS parts of its sum."""
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # In 64 bits, as the table of a large vocabulary has more than 2**31 weights.
    out = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.arange(0, BLOCK_IN)
    is_row, is_out = row[:, None] < rows, out[None, :] < num_out
    x_at = x_ptr + row[:, None] * num_in + inner[None, :]
    weight_at = weight_ptr + out[None, :] * num_in + inner[:, None]
    part_of_in: tl.constexpr = (num_in + BLOCK_IN * SPLITS - 1) // (BLOCK_IN * SPLITS) * BLOCK_IN
    begin = tl.program_id(2) * part_of_in
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(begin, begin + part_of_in, BLOCK_IN):
        is_inner = inner < num_in - start
        x = tl.load(x_at + start, mask=is_row & is_inner[None, :], other=0.0)
        weight = tl.load(weight_at + start, mask=is_out & is_inner[:, None], other=0)
        # Every int8 is exact in bfloat16 and in float16, so nothing is lost before the sum.
        total = tl.dot(x, weight.to(x.dtype), total)
    scale = tl.load(scale_ptr + out, mask=out < num_out, other=0.0)
    at = row[:, None] * num_out + out[None, :]
    if SPLITS == 1:
        tl.store(out_ptr + at, (total * scale[None, :]).to(out_ptr.dtype.element_ty), mask=is_row & is_out)
    else:
        size = rows * num_out
        tl.store(parts_ptr + tl.program_id(2) * size + at, total, mask=is_row & is_out)
        tl.debug_barrier()
        count_ptr = counts_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        # Whoever counts last sees what all others have stored.
        if tl.atomic_add(count_ptr, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
            for part in range(SPLITS):
                total += tl.load(parts_ptr + part * size + at, mask=is_row & is_out, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + at, (total * scale[None, :]).to(out_ptr.dtype.element_ty), mask=is_row & is_out)
            tl.store(count_ptr, 0)
