"""A Decoder that runs from int8 weights."""

from __future__ import annotations

from typing import cast

from torch import nn

from twinserve.engine.layers.int8_linear import Int8Embedding, Int8Linear
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.quantization.quantizer import AbsMaxQuantizer


def quantize_decoder(decoder: Decoder) -> Decoder:
    """`decoder` itself, from now on run from int8: its linear layers, and its embedding with a tied output projection.

    Norms and biases stay as they are, and so does the dtype of what the layers are given and give.
    """
    # By name: a list of the layers would keep the weights of all of them until the last is replaced.
    for name in [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]:
        linear = cast(nn.Linear, decoder.get_submodule(name))
        decoder.set_submodule(name, Int8Linear(*AbsMaxQuantizer.quantize(linear.weight), linear.bias))
    if decoder.quantization == "none":
        decoder.embedding = Int8Embedding(*AbsMaxQuantizer.quantize(decoder.embedding.weight), decoder.dtype)
        decoder.quantization = "int8"
    return decoder
