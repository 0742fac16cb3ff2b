"""Loading a folder: beside the weights there is never more than one tensor of the checkpoint."""

from __future__ import annotations

import weakref

import pytest
import torch

from twinserve.engine.models import load_model, loader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_at_a_time(llama, tmp_path, monkeypatch, dtype):
    llama.model.save_pretrained(tmp_path)
    read, seen, most_alive = loader._read, [], []

    def reading(source, part):
        most_alive.append(sum(one() is not None for one in seen))
        tensor = read(source, part)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(loader, "_read", reading)
    model = load_model(tmp_path, dtype=dtype)
    assert len(seen) > 10 and max(most_alive) == 0
    assert model.layers[0].attention.qkv.weight.dtype == dtype
