"""Loading a folder onto a CUDA device takes the memory of its weights and of one tensor more at most."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from twinserve.engine.models import load_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dtype", "quantization"), [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "fp8")]
)
def test_no_second_copy(tmp_path, dtype, quantization):
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(tmp_path, dtype=dtype, device="cuda", quantization=quantization)
    peak = torch.cuda.max_memory_allocated() - before
    sizes = [tensor.nbytes for tensor in chain(model.parameters(), model.buffers())]
    largest_read = 8192 * 512 * 4  # the checkpoint is in float32
    # A weight that is quantized is there as it was read, divided by its scale, and in its eight bits.
    passing = 2 * 2 * 2048 * 512 * 4 if quantization == "fp8" else largest_read
    assert peak <= 1.05 * (sum(sizes) + max(largest_read, passing))
