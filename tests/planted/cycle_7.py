"""Wrong versions of cycle 7: int8 weights with a scale a row."""

from __future__ import annotations

import torch
from plants import planted

QUANTIZER = "twinserve.engine.quantization.quantizer:AbsMaxQuantizer"
RECONSTRUCTION, QUALITY = "test_quantization_reconstruction", "test_model_output_quality"


@planted(f"{QUANTIZER}.quantize", "has one scale for all rows", RECONSTRUCTION)
def _(right):
    def wrong(weight):
        quantized, scale = right(weight.reshape(-1))
        return quantized.view(weight.shape), scale.expand(*weight.shape[:-1], 1)

    return wrong


@planted(f"{QUANTIZER}.quantize", "rounds towards zero", RECONSTRUCTION)
def _(right):
    def wrong(weight):
        _, scale = right(weight)
        return (weight.to(scale.dtype) / scale).trunc().to(torch.int8), scale

    return wrong


@planted(f"{QUANTIZER}.quantize", "takes the largest weight for the largest magnitude", RECONSTRUCTION)
def _(right):
    def wrong(weight):
        scale = (weight.float().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-30)
        return (weight.float() / scale).round().clamp(-127, 127).to(torch.int8), scale

    return wrong


@planted(f"{QUANTIZER}.quantize", "uses an eighth of the range", QUALITY)
def _(right):
    def wrong(weight):
        quantized, scale = right(weight)
        return (quantized / 8).round().to(torch.int8), scale * 8

    return wrong


@planted(f"{QUANTIZER}.quantize", "rounds the scale up to a power of two, and the values not with it", QUALITY)
def _(right):
    def wrong(weight):
        quantized, scale = right(weight)
        return quantized, scale.log2().ceil().exp2()

    return wrong


@planted(f"{QUANTIZER}.dequantize", "forgets the scale", RECONSTRUCTION)
def _(right):
    return lambda quantized, scale: quantized.to(scale.dtype)
