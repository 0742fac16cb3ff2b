"""What models say of given texts: computed by the steps of an engine, and by transformers at once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from twinserve.engine.device_queue import to_device
from twinserve.engine.kv_cache import KVCache
from twinserve.engine.layers import AttentionBackend, AttentionMetadata, PagedAttention
from twinserve.engine.layers.attention import plan_layers, slots_of
from twinserve.engine.models import Decoder

BLOCK_SIZE = 256


def _random(model_class: type[nn.Module], config_class: type, **shape: int) -> nn.Module:
    torch.manual_seed(0)
    fields = {"vocab_size": 4096, "max_position_embeddings": 4096, "tie_word_embeddings": True, "eos_token_id": 2}
    # Weights large enough that attention is not spread evenly over the context.
    config = config_class(initializer_range=0.06, **fields, **shape)
    return model_class(config).eval().requires_grad_(False)


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "smollm2": lambda: _random(
        LlamaForCausalLM,
        LlamaConfig,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
    ),
    "qwen3": lambda: _random(
        Qwen3ForCausalLM,
        Qwen3Config,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
}
"""Random models with the layers of SmolLM2-135M and of Qwen3-0.6B, but fewer of them."""

# Tokens of each text in each step: whole prompts, chunks on and off a block's end, a single token to begin with, and
# decodes beside them.
CHUNKS = [[300, 17, 1, 1, 1], [1, 60, 1, 1], [256, 44, 1, 1, 1], [5, 1, 1], [40, 1, 215, 2, 1], [1, 1, 1, 1, 1]]


def random_texts(seed: int = 0) -> list[list[int]]:
    """A text for each of CHUNKS."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 4096, (sum(chunks),), generator=generator).tolist() for chunks in CHUNKS]


@torch.inference_mode()
def engine_log_probs(decoder: Decoder, backend: AttentionBackend, texts: list[list[int]]) -> Tensor:
    """Log-probabilities [tokens, vocab] after every token of `texts`, in the steps of CHUNKS over paged KV."""
    device = decoder.device
    needed = [-(-len(text) // BLOCK_SIZE) for text in texts]
    ids = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).split(needed)
    tables = [blocks.numpy() for blocks in ids]
    cache = KVCache(decoder.config, sum(needed), BLOCK_SIZE, decoder.dtype, device)
    done, said = [0] * len(texts), [[] for _ in texts]
    for step in range(max(map(len, CHUNKS))):
        rows = [(i, done[i], chunks[step]) for i, chunks in enumerate(CHUNKS) if step < len(chunks)]
        rows.sort(key=lambda row: (row[2] > 1, -row[1]))
        places = [np.arange(start, start + count) for _, start, count in rows]
        slots = [slots_of(tables[i], place, BLOCK_SIZE) for (i, _, _), place in zip(rows, places, strict=True)]
        metadata = AttentionMetadata(
            num_single=sum(count == 1 for _, _, count in rows),
            query_lens=[count for _, _, count in rows],
            context_lens=[start + count for _, start, count in rows],
            block_tables=[tables[i] for i, _, _ in rows],
            block_size=BLOCK_SIZE,
        )
        token_ids = np.concatenate([texts[i][start : start + count] for i, start, count in rows])
        plans = plan_layers(backend, metadata, decoder.config.windows, decoder.dtype, device)
        attention = PagedAttention(backend, cache, to_device(np.concatenate(slots), device), plans)
        hidden = decoder(to_device(token_ids, device), to_device(np.concatenate(places), device), attention)
        logits = decoder.logits(hidden).float().log_softmax(-1).cpu().split(metadata.query_lens)
        for (i, _, count), part in zip(rows, logits, strict=True):
            said[i].append(part)
            done[i] += count
    return torch.cat([part for parts in said for part in parts])


@torch.inference_mode()
def transformers_log_probs(model: nn.Module, texts: list[list[int]], dtype: torch.dtype, device: str) -> Tensor:
    """Log-probabilities [tokens, vocab] after every token of `texts`, by transformers with weights of `dtype`."""
    model = copy.deepcopy(model).to(dtype=dtype, device=device)
    logits = [model(torch.tensor([text], device=device)).logits[0] for text in texts]
    return torch.cat([part.float().log_softmax(-1).cpu() for part in logits])


def check_half_precision(model: nn.Module, decoder: Decoder, backend: AttentionBackend) -> None:
    """Assert that the engine in bfloat16 is hardly further from float32 than transformers in bfloat16 is.

    Args:
        model: float32 weights, of which `decoder` has a copy in bfloat16.
    """
    texts, device = random_texts(), str(decoder.device)
    exact = transformers_log_probs(model, texts, torch.float32, device)
    theirs = transformers_log_probs(model, texts, torch.bfloat16, device) - exact
    ours = engine_log_probs(decoder, backend, texts) - exact
    assert exact.std() > 1.0, "a model that says the same of everything shows no error"
    for name, size in (("mean square", lambda x: x.square().mean().sqrt()), ("largest", lambda x: x.abs().max())):
        print(f"{name} difference to float32: {size(ours):.4f}, transformers has {size(theirs):.4f}")
        assert size(ours) <= 1.5 * size(theirs), f"{name} difference: {size(ours):.4f} against {size(theirs):.4f}"
