"""Layers that run from int8 or float8 weights and a scale a row, and a Decoder made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from twinserve.engine.float8 import FLOAT8, Float8Rows
from twinserve.engine.quantization.float8_product import float8_product
from twinserve.engine.quantization.int8_product import int8_product
from twinserve.engine.quantization.quantizer import AbsMaxQuantizer

Model = TypeVar("Model", bound=nn.Module)


class QuantizedLinear(nn.Module):
    """A linear layer with the weights scale * int8, or scale * float8.

    Args:
        weight: [out, in], int8 or FLOAT8.
        scale: [out, 1], float32.
        bias: [out], or None.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = bias


class Int8Linear(QuantizedLinear):
    """One with int8 weights, which multiplies by what they stand for."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of `x` [..., in], in its dtype."""
        product = int8_product(x.reshape(-1, x.shape[-1]), self.weight, self.scale)
        product = product.view(*x.shape[:-1], len(self.weight))
        return product if self.bias is None else product + self.bias


class Float8Linear(QuantizedLinear):
    """One with float8 weights, which rounds its input to float8 as well, with a scale a row."""

    def forward(self, x: Tensor | Float8Rows) -> Tensor:
        """[..., out] of `x` [..., in], in its dtype; or of rows that are in float8 already."""
        if isinstance(x, Float8Rows):
            product = float8_product(x, self.weight, self.scale)
        else:
            product = float8_product(x.reshape(-1, x.shape[-1]), self.weight, self.scale)
            product = product.view(*x.shape[:-1], len(self.weight))
        return product if self.bias is None else product + self.bias


class Int8Embedding(nn.Module):
    """A table of token vectors in int8, each with a scale, that a tied output projection multiplies by as well.

    Args:
        weight: [vocabulary, hidden], int8.
        scale: [vocabulary, 1], float32.
        dtype: of the vectors that are looked up.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """The vectors [..., hidden] of `token_ids` [...]."""
        return AbsMaxQuantizer.dequantize(self.weight[token_ids], self.scale[token_ids]).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [rows, hidden] times every token's vector, [rows, vocabulary]."""
        return int8_product(hidden, self.weight, self.scale)


def quantize_decoder(
    decoder: Model,
    scale_of: Callable[[str, Tensor], Tensor | None] | None = None,
    quantization: Literal["int8", "fp8"] = "int8",
) -> Model:
    """`decoder` itself, from now on run from int8: its linear layers, and its embedding with a tied output projection;
    or from float8: the linear layers of its decoder layers alone, as vLLM has them.

    Norms and biases stay as they are, and so does the dtype of what the layers are given and give.

    Args:
        scale_of: the scales of a weight by its name; None, or where it gives None, has each row's own.
    """
    kinds, within = ((nn.Linear, nn.Embedding), "") if quantization == "int8" else (nn.Linear, "layers.")
    layers = [name for name, module in decoder.named_modules() if isinstance(module, kinds) and name.startswith(within)]
    # By name: a list of the layers would keep the weights of all of them until the last is replaced.
    for name in layers:
        layer: Any = decoder.get_submodule(name)
        scale = None if scale_of is None else scale_of(f"{name}.weight", layer.weight)
        decoder.set_submodule(name, _quantized(layer, scale, quantization))
    return decoder


def _quantized(layer: nn.Module, scale: Tensor | None, quantization: Literal["int8", "fp8"]) -> nn.Module:
    """The layer that stands for a linear layer or an embedding."""
    if isinstance(layer, nn.Embedding):
        return Int8Embedding(*AbsMaxQuantizer.quantize(layer.weight, scale), layer.weight.dtype)
    assert isinstance(layer, nn.Linear), layer
    if quantization == "fp8":
        return Float8Linear(*AbsMaxQuantizer.quantize(layer.weight, scale, FLOAT8), layer.bias)
    return Int8Linear(*AbsMaxQuantizer.quantize(layer.weight, scale), layer.bias)
