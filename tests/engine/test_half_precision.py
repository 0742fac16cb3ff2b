"""In bfloat16 the engine is hardly further from float32 than transformers in bfloat16 is."""

from __future__ import annotations

import sys

import flash_stand_in
import forced
import pytest
import torch

from twinserve.engine.layers import SdpaAttention
from twinserve.engine.models import adopt_model


@pytest.mark.parametrize("backend", [SdpaAttention, flash_stand_in.AnywhereFlash])
def test_log_probabilities(monkeypatch, backend):
    monkeypatch.setitem(sys.modules, "flash_attn", flash_stand_in.module())
    model = forced.SHAPES["smollm2"]()
    forced.check_half_precision(model, adopt_model(model, dtype=torch.bfloat16), backend())
