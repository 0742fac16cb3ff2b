"""Paged attention against plain attention, written out."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from twinserve.engine.kv_cache import KVCache, bytes_per_block
from twinserve.engine.kv_sizing import default_num_blocks
from twinserve.engine.layers import AttentionMetadata, PagedAttention, SdpaAttention
from twinserve.engine.layers.attention import slots_of
from twinserve.engine.models import ModelConfig
from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST_BLOCKS

CPU = torch.device("cpu")


def config_of(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(16, 8, 8, 1, heads, kv_heads, head_dim, 4096)


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal attention of the last tokens of one sequence, in float64; each to its own and the `window - 1` before."""
    tokens, heads, head_dim = query.shape
    context, kv_heads, _ = key.shape
    key, value = (x.double().repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) / head_dim**0.5
    places, own = torch.arange(context), torch.arange(context - tokens, context)[:, None]
    allowed = (places <= own) & (places > own - (window or context))
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def attend_both(
    rows: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    block_size: int,
    seed: int = 0,
    window: int | None = None,
):
    """Outputs of SdpaAttention and of plain attention for rows of (tokens before this step, tokens in it)."""
    torch.manual_seed(seed)
    rows = sorted(rows, key=lambda row: (row[1] > 1, -row[0]))
    config = config_of(heads, kv_heads, 16)
    needed = [-(-(start + tokens) // block_size) for start, tokens in rows]
    cache = KVCache(config, sum(needed) + 3, block_size, torch.float32, CPU)
    for pool in (*cache.keys, *cache.values):
        pool.fill_(torch.nan)
    ids = random.Random(seed).sample(range(cache.num_blocks), sum(needed))
    ends = np.cumsum(needed)
    tables = [np.array(ids[end - n : end]) for end, n in zip(ends, needed, strict=True)]
    whole = [torch.randn(2, start + tokens, kv_heads, 16) for start, tokens in rows]
    for (start, _), table, (key, value) in zip(rows, tables, whole, strict=True):
        cache.write(0, key[:start], value[:start], torch.from_numpy(slots_of(table, np.arange(start), block_size)))
    now = [
        slots_of(table, np.arange(start, start + tokens), block_size)
        for (start, tokens), table in zip(rows, tables, strict=True)
    ]
    query = torch.randn(sum(tokens for _, tokens in rows), heads, 16)
    key, value = (torch.cat([kv[part, start:] for (start, _), kv in zip(rows, whole, strict=True)]) for part in (0, 1))
    metadata = AttentionMetadata(
        num_single=sum(tokens == 1 for _, tokens in rows),
        query_lens=[tokens for _, tokens in rows],
        context_lens=[start + tokens for start, tokens in rows],
        block_tables=tables,
        block_size=block_size,
        window=window,
    )
    backend = SdpaAttention()
    plan = backend.plan(metadata, torch.float32, CPU)
    attention = PagedAttention(backend, cache, torch.from_numpy(np.concatenate(now)), [plan])
    queries = query.split(metadata.query_lens)
    expected = torch.cat([plain(q, *kv, window) for q, kv in zip(queries, whole, strict=True)])
    return attention(0, query, key, value), expected, plan


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 1)])
def test_every_kind_of_row_at_once(heads, kv_heads, block_size):
    rows = [(0, 1), (1, 1), (15, 1), (16, 1), (255, 1), (700, 1), (0, 5), (0, 16), (7, 9), (300, 40), (256, 2)]
    output, expected, _ = attend_both(rows, heads, kv_heads, block_size)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 16, 100, 256, 341])
def test_a_window_hides_what_lies_before_it(window):
    rows = [(0, 1), (1, 1), (15, 1), (99, 1), (255, 1), (700, 1), (0, 5), (0, 120), (7, 9), (300, 40), (256, 2)]
    output, expected, plan = attend_both(rows, 6, 2, 16, window=window)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    read = sum(len(part.slots) for part in plan)
    assert read <= 1.25 * sum(min(start + tokens, window + tokens - 1) for start, tokens in rows) + 64 * 6


def test_random_steps():
    generator = random.Random(7)
    for seed in range(20):
        rows = [
            (generator.choice([0, 3, 60, 200]) + generator.randrange(9), generator.choice([1, 1, 1, 2, 33]))
            for _ in range(generator.randrange(1, 12))
        ]
        window = generator.choice([None, 5, 64])
        output, expected, _ = attend_both(rows, 6, 2, generator.choice([1, 3, 16]), seed, window)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_uneven_contexts_do_not_pad_each_other():
    output, expected, plan = attend_both([(3000, 1), (20, 1), (21, 1), (19, 1), (2990, 1)], 3, 1, 16)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert [(part.first, part.last) for part in plan] == [(0, 1), (1, 2), (2, 5)]
    assert sum(len(part.slots) for part in plan) == 3001 + 2991 + 3 * 22


def test_a_bigger_step_after_a_smaller_one_finds_room():
    backend = SdpaAttention()
    for dtype in (torch.float32, torch.bfloat16):
        for context in (5, 50):
            cache = KVCache(config_of(2, 1, 16), 4, 16, dtype, CPU)
            metadata = AttentionMetadata(1, [1], [context], [np.arange(4)], 16)
            slots = torch.arange(context)
            cache.write(0, torch.ones(context, 1, 16, dtype=dtype), torch.ones(context, 1, 16, dtype=dtype), slots)
            plan = backend.plan(metadata, dtype, CPU)
            output = backend.attend(torch.ones(1, 2, 16, dtype=dtype), cache.keys[0], cache.values[0], plan)
            torch.testing.assert_close(output, torch.ones(1, 2, 16, dtype=dtype))


def test_the_default_pool_is_a_gibibyte():
    config = config_of(4, 2, 64)
    assert bytes_per_block(config, 16, torch.bfloat16) == 2 * 16 * 2 * 64 * 2
    assert default_num_blocks(config, 16, torch.bfloat16, "cpu") == (1 << 30) // 8192


def test_the_default_pool_is_one_that_the_settings_can_have():
    """Of a token of this model 67 million would fit."""
    config = config_of(1, 1, 4)
    assert (1 << 30) // bytes_per_block(config, 1, torch.bfloat16) > MOST_BLOCKS
    assert default_num_blocks(config, 1, torch.bfloat16, "cpu") == MOST_BLOCKS


def test_a_pool_that_does_not_fit_is_refused():
    with pytest.raises(
        InputError, match="num_gpu_blocks is 1000000000000, expected fewer: 16,384,000,000,000,000 bytes"
    ):
        KVCache(config_of(4, 2, 64), 10**12, 16, torch.float32, CPU)
