"""Numbers in float8: their type, and rows of them with a scale each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
"""Four bits of exponent and three of mantissa, without infinities (arXiv:2209.05433, section 3)."""

LARGEST_FLOAT8 = 448
"""Of FLOAT8; a larger number would become NaN."""


class Float8Rows(NamedTuple):
    """Rows in float8, each with a scale, in place of the numbers that they stand for.

    Attributes:
        values: [rows, size], FLOAT8.
        scale: [rows, 1], float32.
        dtype: of the numbers, and of a product with them.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype
