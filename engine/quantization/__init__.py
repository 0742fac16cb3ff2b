"""Weights in int8: how they are made, and how much memory a model takes."""

from twinserve.engine.quantization.quantizer import AbsMaxQuantizer, measure_memory, quantize_model

__all__ = ["AbsMaxQuantizer", "measure_memory", "quantize_model"]
