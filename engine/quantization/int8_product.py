"""Matrix product with int8 weights and a scale a row, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from twinserve.engine.quantization.int8_tiling import FUSED_ROWS
from twinserve.engine.quantization.quantizer import LARGEST, absmax_scale

CACHED_NUMBERS = 1 << 19
"""On a CPU, the most numbers of an intermediate result, so that it stays in a core's cache."""


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x @ (weight * scale).T.

    Args:
        x: [rows, in], floating point; none or more rows.
        weight: [out, in], int8, contiguous.
        scale: [out, 1].

    Returns:
        [rows, out], of the dtype of `x`.
    """
    # A step in which nothing samples asks for the logits of no rows, and no kernel can be launched for none.
    if not len(x):
        return x.new_empty(0, len(weight))
    if x.device.type == "cpu":
        # With a single input, torch (2.13) takes the transposed weights for another layout and sums nonsense.
        in_digits = x.shape[1] > 1 and has_int8_products()
        multiply = _product_of_digits if in_digits else product_by_blocks
        return multiply(x.float(), weight, scale).to(x.dtype)
    if x.dtype in (torch.bfloat16, torch.float16) and len(x) <= FUSED_ROWS and has_triton():
        from twinserve.engine.quantization.int8_matmul import int8_matmul

        return int8_matmul(x.contiguous(), weight, scale)
    # Scaled after the product: int8 is exact in every dtype, a scaled weight is not.
    return F.linear(x, weight.to(x.dtype)).mul_(scale.T)


@cache
def has_int8_products() -> bool:
    """Whether this processor's products of int8 are exact, and quick.

    Those of x86 with AVX-512 and before VNNI add pairs of products in 16 bits, where large ones do not fit. Where there
    is no AVX-512, torch (2.13) multiplies number by number, which takes many times what float32 does.
    """
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    largest = torch.full((2, 64), LARGEST, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.T) == 64 * LARGEST * LARGEST).all())


def _product_of_digits(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The product in integers, each number of `x` in two int8 digits.

    A number is step * (high + low / 254), where its row's step is the scale that weights would have. That is 16 bits:
    an error of at most 1 / 64,516 of the row's largest, far below that of the weights. The sums are exact, so a row's
    result does not depend on the rows beside it.
    """
    step = absmax_scale(x)
    exact = x / step
    high = exact.round()
    digits = torch.empty((2, *x.shape), dtype=torch.int8)
    digits[0] = high
    digits[1] = exact.sub_(high).mul_(2 * LARGEST).round_()
    out = x.new_empty(len(x), len(weight))
    for part in _blocks(len(weight), 2 * len(x)):
        high_sums, low_sums = torch._int_mm(digits.flatten(0, 1), weight[part].T).chunk(2)
        torch.mul(high_sums.float().add_(low_sums, alpha=1 / (2 * LARGEST)), step, out=out[:, part])
    return out.mul_(scale.T)


def product_by_blocks(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The product of `x` in float32, the weights, int8 or float8, converted some rows at a time."""
    out = x.new_empty(len(x), len(weight))
    for part in _blocks(len(weight), weight.shape[1]):
        torch.mm(x, weight[part].to(x.dtype).T, out=out[:, part])
    return out.mul_(scale.T)


def _blocks(count: int, numbers: int) -> Iterator[slice]:
    """Slices of `count` rows, of which each takes `numbers` numbers of an intermediate result."""
    size = max(1, CACHED_NUMBERS // numbers)
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


@cache
def has_triton() -> bool:
    """Is Triton installed?"""
    return find_spec("triton") is not None
