"""Weights in int8 or float8 with a scale a row, and the memory that a model takes."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from twinserve.engine.float8 import FLOAT8, LARGEST_FLOAT8

LARGEST = 127
"""Of the int8 values in use: as many below zero as above it, so that zero stays zero."""


class AbsMaxQuantizer:
    """Quantization by the largest magnitude (arXiv:2208.07339, section 2.1), with a scale for each row.

    A row is the last dimension; in a linear layer, the weights of one output. Its scale is max(|row|) / 127, and a
    weight becomes the nearest multiple of it, so it moves by half a step at most: |weight - int8 * scale| <= scale / 2.
    In float8 the scale is max(|row|) / 448, and a weight becomes scale times the nearest number that there is: it moves
    by a sixteenth of itself, or by scale / 1024 where it is below scale / 64.
    """

    @staticmethod
    def quantize(weight: Tensor, scale: Tensor | None = None, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
        """int8 or float8 values and their scales.

        Args:
            weight: [..., row], finite floating point numbers.
            scale: [..., 1], of rows that `weight` has a part of; None is its own.
            dtype: int8 or FLOAT8.

        Returns:
            quantized: of the shape of `weight`; int8 is from -127 to 127.
            scale: [..., 1], positive; float32, and float64 for float64 weights. Rounded to 16 bits, it and what it
                scales would be off by more than half a step.
        """
        exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        scale = absmax_scale(exact, dtype) if scale is None else scale
        steps, largest = exact / scale, _largest(dtype)
        if dtype == torch.int8:
            steps.round_()
        return steps.clamp_(-largest, largest).to(dtype), scale

    @staticmethod
    def dequantize(quantized: Tensor, scale: Tensor) -> Tensor:
        """The weights [..., row] that `quantized` [..., row] and `scale` [..., 1] stand for, in the dtype of `scale`.

        What quantize gave for 16-bit weights comes back as float32: rounded again, it would leave half a step.
        """
        return quantized.to(scale.dtype) * scale


def absmax_scale(values: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """What 1 in `dtype` stands for, [..., 1], in a row of `values` [..., row]: max(|row|) over the largest in use."""
    # A row of zeros has no step of its own; the smallest one there is divides and keeps the zeros.
    smallest = torch.finfo(values.dtype).tiny
    return values.abs().amax(dim=-1, keepdim=True).div_(_largest(dtype)).clamp_(min=smallest)


def _largest(dtype: torch.dtype) -> int:
    return LARGEST_FLOAT8 if dtype == FLOAT8 else LARGEST


def quantize_model(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The weight of every Linear layer in int8, by the layer's name: quantized [out, in] and scale [out, 1].

    Any module will do, a transformers model and a Decoder alike; it is left as it is. `quantize_decoder` has a Decoder
    run from int8, with its embedding, which is no Linear layer.
    """
    return {
        name: AbsMaxQuantizer.quantize(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def measure_memory(model: nn.Module) -> float:
    """Megabytes (10**6 bytes) of the memory behind a model's parameters and buffers.

    What several of them share, as a tied embedding and views do, counts once; a view counts as all that it keeps alive.
    """
    storages = {}
    for tensor in chain(model.parameters(), model.buffers()):
        storage = tensor.untyped_storage()
        # An address would not do: tensors without data, on the meta device, all have the same.
        storages[StorageWeakRef(storage)] = storage.nbytes()
    return sum(storages.values()) / 1e6
