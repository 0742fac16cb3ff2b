"""Weights in int8 and float8: how they are made, the layers that run from them, and how much memory a model takes."""

from twinserve.engine.quantization.layers import Float8Linear, Int8Embedding, Int8Linear, quantize_decoder
from twinserve.engine.quantization.quantizer import AbsMaxQuantizer, measure_memory, quantize_model

__all__ = [
    "AbsMaxQuantizer",
    "Float8Linear",
    "Int8Embedding",
    "Int8Linear",
    "measure_memory",
    "quantize_decoder",
    "quantize_model",
]
