"""Attention over paged KV: the interface of its backends, and the one that runs on flash-attn."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from twinserve.engine.device_queue import to_device
from twinserve.engine.kv_cache import KVCache
from twinserve.settings.errors import InputError


@dataclass(frozen=True)
class AttentionMetadata:
    """What a step attends to, row by row in the order of its flat batch: rows of one token first, the longest context
    first among them.

    Attributes:
        num_single: rows of one token.
        query_lens: tokens of each row in this step.
        context_lens: tokens of each row whose KV exists once this step has written its own.
        block_tables: ids of the blocks that hold each row's context, in token order.
        block_size: tokens in a block.
        window: tokens that a token attends to, itself the last of them; None is all of its context.
    """

    num_single: int
    query_lens: Seq[int]
    context_lens: Seq[int]
    block_tables: Seq[np.ndarray]
    block_size: int
    window: int | None = None


class AttentionBackend(Protocol):
    """Attends over paged KV. A step is planned once, on the host; every layer with the same window attends by one plan.

    `prefill_attention` and `decode_attention` are the same attention for callers that have tensors and no plan.

    Attributes:
        default_block_size: tokens in a block where nobody asked for a number.
    """

    default_block_size: int

    @classmethod
    def check(cls, head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int) -> None:
        """Raise InputError for the first thing that this backend cannot do, or that it lacks here."""

    def plan(self, metadata: AttentionMetadata, dtype: torch.dtype, device: torch.device) -> Any:
        """What `attend` needs to know of a step, its tensors on `device`."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, plan: Any) -> Tensor:
        """Causal attention of every row over its own context, as far as the plan's window goes.

        Args:
            query: [tokens, heads, head_dim]. The last token of a row attends to its whole context, the token before to
                one less, and so on.
            keys, values: a layer's pool [num_blocks, block_size, kv_heads, head_dim], this step's written already.

        Returns:
            [tokens, heads, head_dim]
        """

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
        """As `FlashAttention.prefill_attention`."""

    def decode_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, context_lens: Tensor, block_table: Tensor
    ) -> Tensor:
        """As `FlashAttention.decode_attention`."""


class PagedAttention:
    """A step's attention: in each layer, the keys and values of all its tokens are written before any token attends.

    So a row may attend to blocks that another row of the same step fills: a prefix hit within a step is right.

    Args:
        plans: of each layer, see `plan_layers`.
    """

    def __init__(self, backend: AttentionBackend, cache: KVCache, slots: Tensor, plans: Seq[Any]):
        self._backend, self._cache, self._slots, self._plans = backend, cache, slots, plans

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache = self._cache
        cache.write(layer, key, value, self._slots)
        return self._backend.attend(query, cache.keys[layer], cache.values[layer], self._plans[layer])


def plan_layers(
    backend: AttentionBackend,
    metadata: AttentionMetadata,
    windows: Seq[int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Any]:
    """The plan of a step for each layer, one for all that have the same window.

    Args:
        windows: of each layer, as `ModelConfig.windows`.
    """
    plans = {window: backend.plan(replace(metadata, window=window), dtype, device) for window in dict.fromkeys(windows)}
    return [plans[window] for window in windows]


class FlashAttention:
    """Attention by flash-attn 2 (arXiv:2307.08691), on NVIDIA GPUs, in half precision, over large pages.

    A layer's attention is at most two calls, whatever the batch: one for all rows of one token, one for all others.

    Raises:
        InputError: flash-attn cannot be imported.
    """

    # What the library's kernels are made for. Builds of it may lack small heads, and then crash rather than refuse.
    DTYPES = (torch.bfloat16, torch.float16)
    HEAD_DIMS = (64, 128)
    PAGE_MULTIPLE = 256

    default_block_size = 256

    def __init__(self) -> None:
        try:
            from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
        except ImportError as error:
            problem = f"cannot be imported, expected flash-attn >= 2.7 built for this torch ({error})"
            raise InputError(problem, field="attention", value="flash") from error
        self._varlen, self._with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache

    @classmethod
    def check(cls, head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int) -> None:
        if device.type != "cuda":
            raise InputError("expected cuda: flash-attn runs on NVIDIA GPUs", field="device", value=str(device))
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            problem = "expected at least (8, 0), as flash-attn does"
            raise InputError(problem, field="the device's compute capability", value=capability)
        cls._check_shapes(head_dim, dtype, block_size)
        cls()

    @classmethod
    def _check_shapes(cls, head_dim: int, dtype: torch.dtype, block_size: int | None) -> None:
        """Refuse what the kernels are not made for; `block_size` is None without pages."""
        if dtype not in cls.DTYPES:
            raise InputError(f"expected {_either(cls.DTYPES)} for flash-attn", field="dtype", value=_name(dtype))
        if head_dim not in cls.HEAD_DIMS:
            raise InputError(f"expected {_either(cls.HEAD_DIMS)} for flash-attn", field="head_dim", value=head_dim)
        if block_size is not None and block_size % cls.PAGE_MULTIPLE:
            problem = f"expected a multiple of {cls.PAGE_MULTIPLE} for flash-attn"
            raise InputError(problem, field="block_size", value=block_size)

    def plan(self, metadata: AttentionMetadata, dtype: torch.dtype, device: torch.device) -> _FlashPlan:
        first, contexts = metadata.num_single, np.asarray(metadata.context_lens, dtype=np.int32)
        singles, prompts = None, None
        if first:
            tables = padded_tables(metadata.block_tables[:first], np.int32)
            singles = to_device(contexts[:first], device), to_device(tables, device)
        if first < len(contexts):
            queries = np.asarray(metadata.query_lens[first:], dtype=np.int32)
            tables = padded_tables(metadata.block_tables[first:], np.int32)
            prompts = (
                to_device(_cumulative(queries), device),
                to_device(_cumulative(contexts[first:]), device),
                int(queries.max()),
                int(contexts[first:].max()),
                to_device(tables, device),
            )
        return _FlashPlan(first, singles, prompts, metadata.window)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, plan: _FlashPlan) -> Tensor:
        first, outputs = plan.num_single, []
        if plan.singles is not None:
            outputs.append(self.decode_attention(query[:first], keys, values, *plan.singles, plan.window))
        if plan.prompts is not None:
            outputs.append(self.prefill_attention(query[first:], keys, values, *plan.prompts, plan.window))
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
        window: int | None = None,
    ) -> Tensor:
        """Causal attention of several tokens of each sequence, the last of which ends its context.

        Args:
            q: [tokens, heads, head_dim], the sequences' tokens one after another.
            k, v: [context tokens, kv_heads, head_dim], likewise; with `block_table`, pools
                [num_blocks, block_size, kv_heads, head_dim].
            cu_seqlens_q, cu_seqlens_k: [sequences + 1], int32, cumulative lengths of queries and of contexts: those of
                5, 3 and 7 tokens are 0, 5, 8, 15.
            max_seqlen_q, max_seqlen_k: the greatest of these lengths.
            block_table: [sequences, blocks], int32, each row's blocks in token order, then anything.
            window: as in `AttentionMetadata`.

        Returns:
            [tokens, heads, head_dim]

        Raises:
            InputError: a dtype, head size or block size that the kernels are not made for.
        """
        self._check_shapes(q.shape[-1], q.dtype, None if block_table is None else k.shape[1])
        # flash-attn aligns the causal mask with the end of the context, so a chunk sees all that came before it.
        return self._varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal=True,
            window_size=window_size(window),
            block_table=block_table,
        )

    def decode_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        context_lens: Tensor,
        block_table: Tensor,
        window: int | None = None,
    ) -> Tensor:
        """Attention of one token of each sequence over its context, which holds the token itself.

        Args:
            q: [sequences, heads, head_dim]
            k_cache, v_cache: pools [num_blocks, block_size, kv_heads, head_dim].
            context_lens: [sequences], int32.
            block_table: [sequences, blocks], int32, each row's blocks in token order, then anything.
            window: as in `AttentionMetadata`.

        Returns:
            [sequences, heads, head_dim]

        Raises:
            InputError: a dtype, head size or block size that the kernels are not made for.
        """
        self._check_shapes(q.shape[-1], q.dtype, k_cache.shape[1])
        output = self._with_kvcache(
            q[:, None],
            k_cache,
            v_cache,
            cache_seqlens=context_lens,
            block_table=block_table,
            causal=True,
            window_size=window_size(window),
        )
        return output[:, 0]


@dataclass(frozen=True)
class _FlashPlan:
    """A step's arguments of the two calls: of `decode_attention` from `context_lens` on, for the first `num_single`
    rows, and of `prefill_attention` from `cu_seqlens_q` on, for the others; None where there are no such rows; and
    the `window` of both."""

    num_single: int
    singles: tuple[Tensor, Tensor] | None
    prompts: tuple[Tensor, Tensor, int, int, Tensor] | None
    window: int | None


def window_size(window: int | None) -> tuple[int, int]:
    """A window as flash-attn takes it: tokens to the left of a query's own, and to its right; -1 is all."""
    return (-1, -1) if window is None else (window - 1, 0)


def slots_of(block_tables: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """Slots of `positions` [..., tokens] in the sequences that hold the blocks `block_tables` [..., blocks]."""
    blocks = np.take_along_axis(block_tables, positions // block_size, axis=-1)
    return blocks * block_size + positions % block_size


def padded_tables(block_tables: Seq[np.ndarray], dtype: type[np.integer]) -> np.ndarray:
    """Block tables as rows of one array, padded with block 0."""
    padded = np.zeros((len(block_tables), max(len(table) for table in block_tables)), dtype)
    for row, table in zip(padded, block_tables, strict=True):
        row[: len(table)] = table
    return padded


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    """0, then the sum of the lengths up to and with each."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _either(values: Seq[Any]) -> str:
    return " or ".join(_name(value) for value in values)
