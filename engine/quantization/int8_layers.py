"""Layers that run from int8 weights and a scale a row, and a Decoder made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from twinserve.engine.quantization.int8_product import int8_product
from twinserve.engine.quantization.quantizer import AbsMaxQuantizer

Model = TypeVar("Model", bound=nn.Module)


class Int8Linear(nn.Module):
    """A linear layer with the weights scale * int8.

    Args:
        weight: [out, in], int8.
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

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of `x` [..., in], in its dtype."""
        product = int8_product(x.reshape(-1, x.shape[-1]), self.weight, self.scale)
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


def quantize_decoder(decoder: Model, scale_of: Callable[[str, Tensor], Tensor | None] | None = None) -> Model:
    """`decoder` itself, from now on run from int8: its linear layers, and its embedding with a tied output projection.

    Norms and biases stay as they are, and so does the dtype of what the layers are given and give.

    Args:
        scale_of: the scales of a weight by its name; None, or where it gives None, has each row's own.
    """
    # By name: a list of the layers would keep the weights of all of them until the last is replaced.
    for name in [name for name, module in decoder.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]:
        layer: Any = decoder.get_submodule(name)
        scale = None if scale_of is None else scale_of(f"{name}.weight", layer.weight)
        decoder.set_submodule(name, _in_int8(layer, scale))
    return decoder


def _in_int8(layer: nn.Module, scale: Tensor | None) -> Int8Linear | Int8Embedding:
    """The layer that stands for a linear layer or an embedding."""
    if isinstance(layer, nn.Embedding):
        return Int8Embedding(*AbsMaxQuantizer.quantize(layer.weight, scale), layer.weight.dtype)
    assert isinstance(layer, nn.Linear), layer
    return Int8Linear(*AbsMaxQuantizer.quantize(layer.weight, scale), layer.bias)
