"""Loading a folder: beside the weights there is never more than one tensor of the checkpoint."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from twinserve.engine.models import load_model


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live.

    Attributes:
        peak: the most that there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_second_copy(tmp_path, dtype):
    # Gate and up, which are stacked, are most of the weights.
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with LiveBytes() as live:
        model = load_model(tmp_path, dtype=dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    largest_read = 4096 * 64 * 4  # the checkpoint is in float32
    assert weights <= live.peak <= 1.05 * (weights + largest_read)
