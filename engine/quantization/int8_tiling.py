"""How a product with int8 weights is cut into programs and tiles; without Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from twinserve.engine.kernels import SMALLEST_DOT
from twinserve.engine.kernels.cuts import power_of_2

SHARED_BYTES = 160 << 10
"""Of a multiprocessor's shared memory, what the tiles in flight may take where there is more; Hopper's has 227 KiB."""

MULTIPROCESSORS = 132
"""Of an H100; another number costs some time and changes no result."""

SPLITS = 4
"""Parts of the sum of a layer too narrow to keep every multiprocessor reading; 1, 2 and 4 were measured."""

FEW_ROWS = 64
"""Rows of a tile up to which reading the weights is what a product costs."""

FUSED_ROWS = 256
"""On CUDA, the most rows of a product that dequantises on the way: the most of a tile, so that each weight is read
once. With more, the weights are written out in 16 bits, and cuBLAS multiplies. benchmarks/int8_layers.py says where
either is faster."""


@dataclass(frozen=True)
class Tiling:
    """How the product is cut: a program computes `rows` x `outputs` of the result, `inputs` of the sum at a time.

    Attributes:
        splits: programs that share a sum; the last of them to finish adds their parts up, always in the same order.
        warps: of a program.
        stages: tiles in flight.
        weights_first: the weights are the first factor. Tensor cores of Hopper take that from registers, so that
            weights need not go back to shared memory once they are converted.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int
    weights_first: bool = False

    @property
    def shared_bytes(self) -> int:
        """What the tiles in flight take, at most."""
        return self.stages * tile_bytes(self.rows, self.outputs, self.inputs)


def tile_bytes(rows: int, outputs: int, inputs: int) -> int:
    """Bytes of a tile of weights, a byte each, and of one of what they are multiplied by."""
    return inputs * (outputs + 2 * rows)


@lru_cache(maxsize=1024)
def choose_tiling(rows: int, num_out: int, num_in: int, shared_bytes: int = SHARED_BYTES) -> Tiling:
    """A tiling that keeps a device of MULTIPROCESSORS reading.

    For few rows, narrow tiles, many in flight, and split sums where even those are too few; a vocabulary's width gets
    wide tiles, which read `x` less often. Measured by benchmarks/int8_layers.py --tune. For more rows, one tile has all
    of them.

    Args:
        shared_bytes: that a block of the device's threads may have.
    """
    row_block = min(FUSED_ROWS, max(SMALLEST_DOT, power_of_2(rows)))
    shared = min(SHARED_BYTES, shared_bytes)
    if row_block > FEW_ROWS:
        blocks = -(-num_out // 64)
        splits = max(1, min(SPLITS, MULTIPROCESSORS // blocks, num_in // 128))
        return _filled(Tiling(row_block, 64, 64, splits, 4, 4, weights_first=True), num_in, shared)
    if num_out >= 2 * MULTIPROCESSORS * 64:
        return _filled(Tiling(row_block, 64, 128, 1, 4, 8), num_in, shared)
    warps = 2 if row_block == SMALLEST_DOT else 4
    splits = 1 if -(-num_out // 16) >= MULTIPROCESSORS else min(SPLITS, -(-num_in // 64))
    return _filled(Tiling(row_block, 16, 64, splits, warps, 6), num_in, shared)


def _filled(wanted: Tiling, num_in: int, shared_bytes: int) -> Tiling:
    """A tiling with as many of its stages as there are tiles to be in flight, and as fit."""
    fitting = shared_bytes // tile_bytes(wanted.rows, wanted.outputs, wanted.inputs)
    stages = max(2, min(-(-num_in // (wanted.inputs * wanted.splits)), wanted.stages, fitting))
    return replace(wanted, stages=stages)
