"""Numbers for tests of quantized weights, and what a model says of a text without any cache."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from twinserve.engine.models import Decoder

TEXT = torch.tensor([3, 77, 500, 12, 12, 4, 256, 311, 98, 5] * 6)


def some(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Random numbers, one of them far out."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[rows // 2, columns // 3] *= 30
    return x


def error(output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> float:
    """How far `output` is from the product with the dequantised weights in float64, relative to that."""
    expected = x.double().cpu() @ (weight.cpu().double() * scale.cpu().double()).T
    return ((output.double().cpu() - expected).norm() / expected.norm()).item()


def attend_alone(layer, query, key, value):
    """Causal attention of one sequence to itself, without any cache."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


@torch.inference_mode()
def logits_of(model: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(token_ids, torch.arange(len(token_ids)), attend_alone))
