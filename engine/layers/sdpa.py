"""Attention by torch alone: any device, any block size, any head size."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from twinserve.engine.device_queue import to_device
from twinserve.engine.layers.attention import AttentionMetadata, padded_tables, slots_of

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class SdpaAttention:
    """Attention by torch's scaled_dot_product_attention over gathered keys and values; any device, any block size.

    Rows of one token are gathered together, padded to the longest of their group. A padded place repeats the row's own
    last token, so a row never reads what is not its own, and what a pool held before does not matter.
    """

    # A group's call costs as much as some hundred padded tokens, so rows join while a row pads at most this much.
    PADDED_TOKENS = 64
    PADDED_SHARE = 0.25
    # What is gathered at once should stay in the cache of a core; a GPU wants few and large calls.
    GATHERED_TOKENS_CPU = 4096
    GATHERED_TOKENS_CUDA = 65536

    default_block_size = 16

    def __init__(self) -> None:
        self._gathered: tuple[Tensor, Tensor] | None = None

    @classmethod
    def check(cls, head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int) -> None:
        """There is nothing that it cannot do."""

    def plan(self, metadata: AttentionMetadata, dtype: torch.dtype, device: torch.device) -> list[_Singles | _Prompt]:
        plans: list[_Singles | _Prompt] = []
        first = 0
        contexts = np.asarray(metadata.context_lens[: metadata.num_single])
        seen = contexts if metadata.window is None else np.minimum(contexts, metadata.window)
        while first < metadata.num_single:
            last = self._group_end(seen, first, device)
            plans.append(_plan_singles(metadata, seen[first:last, None], first, dtype, device))
            first = last
        for row in range(metadata.num_single, len(metadata.query_lens)):
            plans.append(_plan_prompt(metadata, row, first, dtype, device))
            first += metadata.query_lens[row]
        return plans

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, plan: list[_Singles | _Prompt]) -> Tensor:
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        # Contexts grow at every step, and cuDNN would compile a plan for each new length: 45 ms, seen on an H100.
        with sdpa_kernel(_KERNELS) if query.is_cuda else nullcontext():
            outputs = [
                part.attend(query[part.first : part.last], *self._gather(keys, values, part.slots)) for part in plan
            ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def prefill_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        block_table: Tensor | None = None,
    ) -> Tensor:
        """As `FlashAttention.prefill_attention`; the lengths are read back from the device."""
        if block_table is None:
            # Keys one after another are a pool of blocks of one token each.
            k, v = k[:, None], v[:, None]
            tables = [np.arange(*ends) for ends in pairwise(cu_seqlens_k.tolist())]
        else:
            tables = list(block_table.cpu().numpy().astype(np.int64))
        queries, contexts = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        metadata = AttentionMetadata(0, queries, contexts, tables, block_size=k.shape[1])
        return self.attend(q, k, v, self.plan(metadata, q.dtype, q.device))

    def decode_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, context_lens: Tensor, block_table: Tensor
    ) -> Tensor:
        """As `FlashAttention.decode_attention`; the lengths are read back from the device."""
        order = context_lens.argsort(descending=True)
        tables = list(block_table[order].cpu().numpy().astype(np.int64))
        metadata = AttentionMetadata(
            len(q), [1] * len(q), context_lens[order].tolist(), tables, block_size=k_cache.shape[1]
        )
        output = torch.empty_like(q)
        output[order] = self.attend(q[order], k_cache, v_cache, self.plan(metadata, q.dtype, q.device))
        return output

    def _group_end(self, seen: np.ndarray, first: int, device: torch.device) -> int:
        """One past the last row of one token that attends together with row `first`; they attend to `seen` tokens."""
        longest = int(seen[first])
        most = self.GATHERED_TOKENS_CPU if device.type == "cpu" else self.GATHERED_TOKENS_CUDA
        end = min(len(seen), first + max(1, most // longest))
        shortest = longest - max(self.PADDED_TOKENS, int(longest * self.PADDED_SHARE))
        last = first + 1
        while last < end and seen[last] >= shortest:
            last += 1
        return last

    def _gather(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of `slots`, valid until the next call.

        The buffer is kept: new memory for megabytes at every layer costs more (page faults) than the copy itself.
        """
        if self._gathered is None or len(self._gathered[0]) < len(slots) or self._gathered[0].dtype != keys.dtype:
            shape = (len(slots), *keys.shape[1:])
            self._gathered = keys.new_empty(shape), values.new_empty(shape)
        key, value = (buffer[: len(slots)] for buffer in self._gathered)
        torch.index_select(keys, 0, slots, out=key)
        torch.index_select(values, 0, slots, out=value)
        return key, value


@dataclass(frozen=True)
class _Singles:
    """Rows of one token each, `first` to `last` of the flat batch.

    `slots` [rows * width] are those that each row attends to, padded to the longest; `mask` [rows, 1, 1, width] is 0
    in them and -inf beyond, or None where all rows attend to as many.
    """

    first: int
    last: int
    slots: Tensor
    mask: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, head_dim = query.shape
        key, value = (x.view(rows, -1, *x.shape[1:]).transpose(1, 2) for x in (key, value))
        # The query heads that share a key-value head take the place of query tokens: its keys are read once for all.
        grouped = query.reshape(rows, key.shape[1], -1, head_dim)
        return F.scaled_dot_product_attention(grouped, key, value, attn_mask=self.mask).reshape(rows, heads, head_dim)


@dataclass(frozen=True)
class _Prompt:
    """One row of several tokens, `first` to `last` of the flat batch.

    `slots` [context] are those of its context from the first on that any of its tokens attends to; `window` is None
    where that is the whole context for each of them; `dtype` is the queries'.
    """

    first: int
    last: int
    slots: Tensor
    window: int | None
    dtype: torch.dtype

    @cached_property
    def mask(self) -> Tensor | None:
        """[tokens, context], 0 where a token attends and -inf elsewhere; None where the row begins its sequence.

        Made by the first layer, as a large one is a parallel loop: on a CPU these belong into the thread of the steps.
        """
        tokens, context = self.last - self.first, len(self.slots)
        if context == tokens and self.window is None:
            return None
        mask = torch.full((tokens, context), -torch.inf, dtype=self.dtype, device=self.slots.device)
        hidden = mask.triu(context - tokens + 1)
        return hidden if self.window is None else hidden.add_(mask.tril_(context - tokens - self.window))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens, heads, head_dim = query.shape
        kv_heads = key.shape[1]
        grouped = query.reshape(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        key, value = (x.transpose(0, 1)[:, None].expand(-1, heads // kv_heads, -1, -1) for x in (key, value))
        if query.is_cuda and self.mask is not None:
            # With a mask, torch's memory-efficient kernel (2.11) reads beyond expanded heads: wrong rows, or a fault.
            key, value = key.contiguous(), value.contiguous()
        output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=self.mask, is_causal=self.mask is None)
        return output.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)


def _plan_singles(
    metadata: AttentionMetadata, seen: np.ndarray, first: int, dtype: torch.dtype, device: torch.device
) -> _Singles:
    """The plan of the rows from `first` on that attend to `seen` [rows, 1] tokens, the last of their contexts."""
    last = first + len(seen)
    contexts = np.asarray(metadata.context_lens[first:last])[:, None]
    tables = padded_tables(metadata.block_tables[first:last], np.int64)
    places = np.arange(seen.max())
    slots = slots_of(tables, contexts - seen + np.minimum(places, seen - 1), metadata.block_size)
    mask = None
    if seen.min() < seen.max():
        beyond = torch.from_numpy(places >= seen)[:, None, None]
        mask = to_device(torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf), device)
    return _Singles(first, last, to_device(slots.reshape(-1), device), mask)


def _plan_prompt(
    metadata: AttentionMetadata, row: int, first: int, dtype: torch.dtype, device: torch.device
) -> _Prompt:
    num_tokens, context = metadata.query_lens[row], metadata.context_lens[row]
    window = metadata.window if metadata.window is not None and metadata.window < context else None
    begin = 0 if window is None else max(0, context - num_tokens + 1 - window)
    slots = slots_of(metadata.block_tables[row], np.arange(begin, context), metadata.block_size)
    return _Prompt(first, first + num_tokens, to_device(slots, device), window, dtype)
