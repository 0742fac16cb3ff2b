"""Attention over paged KV: the interface of its backends, and the one that runs anywhere."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from twinserve.engine.kv_cache import KVCache

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class StepRows:
    """The rows of a step, in the order of its flat batch: rows of one token first, longest context first among them.

    Attributes:
        num_single: rows of one token.
        query_lens: tokens of each row in this step.
        context_lens: tokens of each row whose KV exists once this step has written its own.
        block_tables: ids of the blocks that hold each row's context, in token order.
        block_size: tokens in a block.
    """

    num_single: int
    query_lens: Seq[int]
    context_lens: Seq[int]
    block_tables: Seq[np.ndarray]
    block_size: int


class AttentionBackend(Protocol):
    """Attends over paged KV. A step is planned once, on the host; every layer then attends by that plan."""

    def plan(self, rows: StepRows, dtype: torch.dtype, device: torch.device) -> Any:
        """What `attend` needs to know of a step, its tensors on `device`."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, plan: Any) -> Tensor:
        """Causal attention of every row over its own context.

        Args:
            query: [tokens, heads, head_dim]. The last token of a row attends to its whole context, the token before to
                one less, and so on.
            keys, values: a layer's pool [num_blocks, block_size, kv_heads, head_dim], this step's written already.

        Returns:
            [tokens, heads, head_dim]
        """


class PagedAttention:
    """A step's attention: in each layer, the keys and values of all its tokens are written before any token attends.

    So a row may attend to blocks that another row of the same step fills: a prefix hit within a step is right.
    """

    def __init__(self, backend: AttentionBackend, cache: KVCache, slots: Tensor, plan: Any):
        self._backend, self._cache, self._slots, self._plan = backend, cache, slots, plan

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache = self._cache
        cache.write(layer, key, value, self._slots)
        return self._backend.attend(query, cache.keys[layer], cache.values[layer], self._plan)


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

    def __init__(self) -> None:
        self._gathered: tuple[Tensor, Tensor] | None = None

    def plan(self, rows: StepRows, dtype: torch.dtype, device: torch.device) -> list[_Singles | _Prompt]:
        plans: list[_Singles | _Prompt] = []
        first = 0
        while first < rows.num_single:
            last = self._group_end(rows, first, device)
            plans.append(_plan_singles(rows, first, last, dtype, device))
            first = last
        for row in range(rows.num_single, len(rows.query_lens)):
            plans.append(_plan_prompt(rows, row, first, dtype, device))
            first += rows.query_lens[row]
        return plans

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, plan: list[_Singles | _Prompt]) -> Tensor:
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        # Contexts grow at every step, and cuDNN would compile a plan for each new length: 45 ms, seen on an H100.
        with sdpa_kernel(_KERNELS) if query.is_cuda else nullcontext():
            outputs = [
                part.attend(query[part.first : part.last], *self._gather(keys, values, part.slots)) for part in plan
            ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _group_end(self, rows: StepRows, first: int, device: torch.device) -> int:
        """One past the last row of one token that attends together with row `first`."""
        longest = rows.context_lens[first]
        most = self.GATHERED_TOKENS_CPU if device.type == "cpu" else self.GATHERED_TOKENS_CUDA
        end = min(rows.num_single, first + max(1, most // longest))
        shortest = longest - max(self.PADDED_TOKENS, int(longest * self.PADDED_SHARE))
        last = first + 1
        while last < end and rows.context_lens[last] >= shortest:
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

    `slots` [rows * width] are those of each row's context, padded to the longest; `mask` [rows, 1, 1, width] is 0 in
    the context and -inf beyond, or None where all contexts are as long.
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

    `slots` [context] are those of its context; `mask` [tokens, context] is 0 where a token attends and -inf elsewhere,
    or None where the row begins its sequence.
    """

    first: int
    last: int
    slots: Tensor
    mask: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens, heads, head_dim = query.shape
        kv_heads = key.shape[1]
        grouped = query.reshape(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        key, value = (x.transpose(0, 1)[:, None].expand(-1, heads // kv_heads, -1, -1) for x in (key, value))
        output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=self.mask, is_causal=self.mask is None)
        return output.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)


def slots_of(block_tables: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """Slots of `positions` [..., tokens] in the sequences that hold the blocks `block_tables` [..., blocks]."""
    blocks = np.take_along_axis(block_tables, positions // block_size, axis=-1)
    return blocks * block_size + positions % block_size


def _plan_singles(rows: StepRows, first: int, last: int, dtype: torch.dtype, device: torch.device) -> _Singles:
    contexts = np.asarray(rows.context_lens[first:last])[:, None]
    tables = np.zeros((last - first, max(len(table) for table in rows.block_tables[first:last])), np.int64)
    for table, padded in zip(rows.block_tables[first:last], tables, strict=True):
        padded[: len(table)] = table
    places = np.arange(contexts.max())
    slots = slots_of(tables, np.minimum(places, contexts - 1), rows.block_size)
    mask = None
    if contexts.min() < contexts.max():
        beyond = torch.from_numpy(places >= contexts)[:, None, None]
        mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf).to(device)
    return _Singles(first, last, torch.from_numpy(slots.reshape(-1)).to(device), mask)


def _plan_prompt(rows: StepRows, row: int, first: int, dtype: torch.dtype, device: torch.device) -> _Prompt:
    num_tokens, context = rows.query_lens[row], rows.context_lens[row]
    slots = slots_of(rows.block_tables[row], np.arange(context), rows.block_size)
    mask = None
    if context > num_tokens:
        mask = torch.full((num_tokens, context), -torch.inf, dtype=dtype, device=device)
        mask.triu_(context - num_tokens + 1)
    return _Prompt(first, first + num_tokens, torch.from_numpy(slots).to(device), mask)
