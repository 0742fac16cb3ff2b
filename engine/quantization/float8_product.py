"""Matrix product with float8 weights and a scale a row, whose input is rounded to float8 too, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from twinserve.engine.float8 import FLOAT8, Float8Rows
from twinserve.engine.quantization.int8_product import has_triton, product_by_blocks
from twinserve.engine.quantization.quantizer import AbsMaxQuantizer

ALIGNED = 16
"""Numbers that a row of either matrix must be a multiple of where the device's own float8 product is taken."""


def float8_rows(x: Tensor) -> Float8Rows:
    """`x` [rows, size] in float8, each row with a scale of its own: max(|row|) / 448."""
    if x.device.type == "cuda" and has_triton():
        from twinserve.engine.kernels.fused import quantize_rows

        return quantize_rows(x)
    return Float8Rows(*AbsMaxQuantizer.quantize(x, dtype=FLOAT8), x.dtype)


def float8_product(x: Tensor | Float8Rows, weight: Tensor, scale: Tensor) -> Tensor:
    """x @ (weight * scale).T, of `x` as float8 has it, summed up in float32.

    Args:
        x: [rows, in], floating point, or its rows in float8; none or more rows. On CUDA in bfloat16.
        weight: [out, in], FLOAT8, contiguous. On CUDA `out` and `in` are multiples of ALIGNED.
        scale: [out, 1], float32.

    Returns:
        [rows, out], of the dtype of `x`.
    """
    if isinstance(x, Tensor):
        # A step in which nothing samples asks for the logits of no rows, and no kernel can be launched for none.
        if not len(x):
            return x.new_empty(0, len(weight))
        x = float8_rows(x)
    values, steps, dtype = x
    if values.device.type == "cpu":
        return product_by_blocks(values.float(), weight, scale).mul_(steps).to(dtype)
    return torch._scaled_mm(values, weight.t(), scale_a=steps, scale_b=scale.t(), out_dtype=dtype, use_fast_accum=True)
