"""Rotary frequencies: how fast each pair of dimensions turns with the position, and what slows them down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency is divided by `factor`: position interpolation (arXiv:2306.15595).

    Attributes:
        amplitude: what sines and cosines are multiplied by.
    """

    factor: float
    amplitude: ClassVar = 1.0

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        """`frequencies` [head_dim / 2] of the base `theta`, slowed down."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones are kept, and those between are blended.

    The formula is `apply_scaling` of Meta's llama-models (models/llama3/model.py), which came with Llama 3.1;
    transformers has it as the rope type "llama3". A frequency is judged by how often it turns over the context of the
    first training: at most `low_freq_factor` times is low, at least `high_freq_factor` times is high.

    Attributes:
        original_max_position_embeddings: tokens of the context of the first training.
        amplitude: as of `LinearScaling`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    amplitude: ClassVar = 1.0

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        """`frequencies` [head_dim / 2], the low ones slowed down."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True)
class YarnScaling:
    """High frequencies are kept, low ones divided by `factor`, those between blended; and all are made longer.

    YaRN (arXiv:2309.00071, section 3). Which are between is told by the dimensions that turn `beta_fast` and
    `beta_slow` times over the context of the first training; by the place of a pair of dimensions among them, not by
    its frequency, the two are blended.

    Attributes:
        original_max_position_embeddings: tokens of the context of the first training.
        amplitude: what sines and cosines are multiplied by, so that attention stays as sharp; the paper's is
            0.1 ln(factor) + 1.
        truncate: the two dimensions are rounded to whole ones, away from each other.
    """

    factor: float
    original_max_position_embeddings: int
    amplitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        """`frequencies` [head_dim / 2], the low ones slowed down."""
        half = len(frequencies)
        first, last = (self._dimension(turns, half, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        # Where both are the same, what lies behind is divided as a whole.
        width = last - first if last != first else 0.001
        slowed = ((torch.arange(half, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
        return slowed * frequencies / self.factor + (1 - slowed) * frequencies

    def _dimension(self, turns: float, half: int, theta: float) -> float:
        """The pair of dimensions, not a whole one, that turns so many times over the context of the first training."""
        return half * math.log(self.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta)


def yarn_amplitude(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies sines and cosines by: 1 where nothing is slowed down."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@lru_cache(maxsize=64)
def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians that each pair of dimensions turns at every position, [head_dim / 2], float32.

    Computed once on the host, as another device may round powers otherwise, and kept: never write to it.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / theta**exponents
    return (frequencies if scaling is None else scaling.scaled(frequencies, theta)).to(device)


def rotation(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, head_dim / 2] of the angles at `positions` [tokens], float32."""
    angles = positions[:, None].float() * rotary_frequencies(head_dim, theta, scaling, positions.device)
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return angles.cos() * amplitude, angles.sin() * amplitude
