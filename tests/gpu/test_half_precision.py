"""In bfloat16 the engine is hardly further from float32 than transformers in bfloat16 is."""

from __future__ import annotations

import forced
import pytest
import torch

from twinserve.engine.layers import FlashAttention, SdpaAttention
from twinserve.engine.models import adopt_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", [FlashAttention, SdpaAttention])
@pytest.mark.parametrize("shape", forced.SHAPES)
def test_log_probabilities(shape, backend):
    if backend is FlashAttention:
        pytest.importorskip("flash_attn")
    model = forced.SHAPES[shape]()
    decoder = adopt_model(model, dtype=torch.bfloat16, device="cuda")
    forced.check_half_precision(model, decoder, backend())
