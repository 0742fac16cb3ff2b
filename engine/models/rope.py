"""Rotary frequencies: how fast each pair of dimensions turns with the position, and what slows them down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency is divided by `factor`: position interpolation (arXiv:2306.15595)."""

    factor: float

    def scaled(self, frequencies: Tensor) -> Tensor:
        """`frequencies` [head_dim / 2], slowed down."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones are kept, and those between are blended.

    The formula is `apply_scaling` of Meta's llama-models (models/llama3/model.py), which came with Llama 3.1;
    transformers has it as the rope type "llama3". A frequency is judged by how often it turns over the context of the
    first training: at most `low_freq_factor` times is low, at least `high_freq_factor` times is high.

    Attributes:
        original_max_position_embeddings: tokens of the context of the first training.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scaled(self, frequencies: Tensor) -> Tensor:
        """`frequencies` [head_dim / 2], the low ones slowed down."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


RopeScaling = LinearScaling | Llama3Scaling


@lru_cache(maxsize=64)
def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians that each pair of dimensions turns at every position, [head_dim / 2], float32.

    Computed once on the host, as another device may round powers otherwise, and kept: never write to it.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / theta**exponents
    return (frequencies if scaling is None else scaling.scaled(frequencies)).to(device)
