"""A stand-in for the flash-attn library: its two functions as we call them, computed plainly in float32 on any device.

It refuses what the library's C++ refuses and what crashes it, so a wrapper that passes here hands over what it must.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor

from twinserve.engine.layers import FlashAttention


def module() -> types.ModuleType:
    """To be put in `sys.modules` as "flash_attn"."""
    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    stand_in.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return stand_in


class AnywhereFlash(FlashAttention):
    """FlashAttention that also takes float32 and a CPU; for the stand-in alone."""

    DTYPES = (torch.float32, torch.bfloat16)

    @classmethod
    def check(cls, head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int) -> None:
        cls._check_shapes(head_dim, dtype, block_size)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
) -> Tensor:
    assert (dropout_p, softmax_scale, softcap, alibi_slopes) == (0.0, None, 0.0, None)
    assert type(max_seqlen_q) is int and type(max_seqlen_k) is int, "the library's operator takes plain numbers"
    _check(q, k, v, [cu_seqlens_q, cu_seqlens_k], block_table)
    rows = len(cu_seqlens_q) - 1
    assert len(cu_seqlens_k) == rows + 1
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert q_ends[0] == k_ends[0] == 0 and q_ends[-1] == len(q)
    assert max_seqlen_q == max(b - a for a, b in zip(q_ends, q_ends[1:], strict=False))
    assert max_seqlen_k == max(b - a for a, b in zip(k_ends, k_ends[1:], strict=False))
    if block_table is None:
        assert k.dim() == v.dim() == 3 and k_ends[-1] == len(k)
    output = torch.empty_like(q)
    for row in range(rows):
        tokens, context = slice(*q_ends[row : row + 2]), slice(*k_ends[row : row + 2])
        if block_table is None:
            keys, values = k[context], v[context]
        else:
            keys, values = (_context(x, block_table[row], context.stop - context.start) for x in (k, v))
        output[tokens] = _attend(q[tokens], keys, values, causal, window_size)
    return output


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
) -> Tensor:
    unused = (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, softmax_scale, alibi_slopes)
    assert unused == (None,) * 8 and softcap == 0.0
    assert block_table is not None and q.dim() == 4
    _check(q, k_cache, v_cache, [cache_seqlens], block_table)
    assert len(cache_seqlens) == len(q) == len(block_table)
    output = torch.empty_like(q)
    for row, context in enumerate(cache_seqlens.tolist()):
        keys, values = (_context(x, block_table[row], context) for x in (k_cache, v_cache))
        output[row] = _attend(q[row], keys, values, causal, window_size)
    return output


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: list[Tensor], block_table: Tensor | None) -> None:
    """What the library's C++ checks, and what its builds crash on."""
    assert q.dtype == k.dtype == v.dtype and k.shape == v.shape
    heads, head_dim = q.shape[-2:]
    assert head_dim in (64, 128), f"head_dim {head_dim} crashes the process"
    assert k.shape[-1] == head_dim and heads % k.shape[-2] == 0
    for tensor in (q, k, v):
        assert tensor.stride(-1) == 1 and tensor.device == q.device
    for tensor in lengths:
        assert tensor.dtype == torch.int32 and tensor.is_contiguous() and tensor.device == q.device
    if block_table is not None:
        assert block_table.dtype == torch.int32 and block_table.stride(-1) == 1 and block_table.device == q.device
        assert k.dim() == 4 and k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        assert block_table.min() >= 0 and block_table.max() < len(k)


def _context(pool: Tensor, table: Tensor, context: int) -> Tensor:
    blocks = -(-context // pool.shape[1])
    assert blocks <= len(table)
    return pool[table[:blocks].long()].flatten(0, 1)[:context]


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
    """[tokens, heads, head_dim]; a causal mask is aligned with the last key, and so is a window, of so many keys to the
    left of a query's own and to its right, -1 being all."""
    assert causal and window[1] in (-1, 0), window
    tokens, heads, head_dim = q.shape
    k, v = (x.float().repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) / head_dim**0.5
    if causal:
        hidden = torch.ones(tokens, len(k), dtype=torch.bool, device=q.device).triu_(len(k) - tokens + 1)
        if window[0] >= 0:
            hidden |= torch.ones_like(hidden).tril_(len(k) - tokens - window[0] - 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)
