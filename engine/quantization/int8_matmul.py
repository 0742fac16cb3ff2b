"""Matrix product with int8 weights that are dequantised on the way, for up to 256 rows on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinserve.engine.capability import Capability
from twinserve.engine.quantization.int8_tiling import Tiling, choose_tiling


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
    tiling = tiling or choose_tiling(rows, num_out, num_in, Capability.of(device).shared_bytes)
    grid = (triton.cdiv(num_out, tiling.outputs), triton.cdiv(rows, tiling.rows), tiling.splits)
    counts = _counts(device)
    if tiling.splits > 1 and grid[0] * grid[1] > len(counts):
        raise ValueError(f"{grid[0] * grid[1]} blocks of a split sum, expected at most {len(counts)}")
    # As large as any number of rows in the same blocks needs, so that few are kept.
    parts = _parts(tiling.splits * grid[1] * tiling.rows * num_out if tiling.splits > 1 else 1, device)
    sizes = (rows, num_out, num_in, tiling.rows, tiling.outputs, tiling.inputs, tiling.splits)
    fixed = (parts, counts, *sizes, tiling.weights_first)
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
    WEIGHTS_FIRST: tl.constexpr,
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
    if WEIGHTS_FIRST:
        total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(begin, begin + part_of_in, BLOCK_IN):
        is_inner = inner < num_in - start
        x = tl.load(x_at + start, mask=is_row & is_inner[None, :], other=0.0)
        weight = tl.load(weight_at + start, mask=is_out & is_inner[:, None], other=0)
        # Every int8 is exact in bfloat16 and in float16, so nothing is lost before the sum.
        if WEIGHTS_FIRST:
            total = tl.dot(tl.trans(weight.to(x.dtype)), tl.trans(x), total)
        else:
            total = tl.dot(x, weight.to(x.dtype), total)
    if WEIGHTS_FIRST:
        total = tl.trans(total)
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
