"""FusedDecoder: a Decoder's forward pass in few kernels over rows that the device describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from twinserve.engine.graphs.device_rows import DeviceRows, aligned
from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.kernels.few_rows import MOST_ROWS, attend, fits, has_product, product
from twinserve.engine.kernels.filtered_sampling import ROOM, sample_filtered_rows
from twinserve.engine.kernels.fused import (
    rms_norm,
    rms_norm_float8,
    rotate_and_store,
    silu_and_mul,
    silu_and_mul_float8,
)
from twinserve.engine.kernels.paged_attention import decode_attention, prefill_attention
from twinserve.engine.kernels.sampling import sample_rows
from twinserve.engine.kernels.step_rows import gather_tables, read_rows
from twinserve.engine.kv_cache import KVCache
from twinserve.engine.layers.attention import window_size
from twinserve.engine.models.decoder import Decoder, DecoderLayer, Linear
from twinserve.engine.models.rope import rotation


@dataclass(frozen=True)
class StepRows:
    """The rows of a step by their places in `DeviceRows`, int32 on the device; its tokens are those of decodes, of
    prompts and of padding, in this order.

    Attributes:
        decode_rows: [decodes], the device rows of the first tokens; scratch for those that are no decodes.
        rows: [tokens], the device row of each token; scratch for padding. The same in a step of decodes alone.
        prompt_tokens, prompt_positions: [tokens], see `read_rows`; empty in a step of decodes alone.
        tiles: [tiles, 4], see `prefill_attention`.
        sample_rows: [sampled], the device row of each one's sequence; scratch where none is to go on.
        last: [sampled], places in the flat batch of the tokens after which they sample; None where all decodes do.
    """

    decode_rows: Tensor
    rows: Tensor
    prompt_tokens: Tensor
    prompt_positions: Tensor
    tiles: Tensor
    sample_rows: Tensor
    last: Tensor | None


class FusedDecoder:
    """Runs steps of a Decoder over a pool of paged KV, from the device's rows to the tokens they sample.

    Args:
        attention: of decodes: "triton", or "flash" (flash-attn). Prompts attend by Triton's kernel.
        max_decodes: rows of the largest step.
        max_tokens: of the largest step, padding included.
        max_sampled: rows that a step samples at most.
        max_positions: tokens of the longest context.
        options: what is switched off.

    Attributes:
        hidden: [max_tokens, hidden_size], what the last layer gives for each token of the latest step, normalised.
        token_ids: [max_tokens], int32, the tokens of the latest step.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        rows: DeviceRows,
        *,
        attention: Literal["triton", "flash"],
        max_decodes: int,
        max_tokens: int,
        max_sampled: int,
        max_positions: int,
        options: GraphOptions,
    ):
        self.model, self.cache, self.rows = model, cache, rows
        config, device = model.config, model.device
        positions = torch.arange(max_positions, device=device)
        self._rotation = rotation(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        # A window over every position hides nothing, and what is not looked for costs nothing.
        self._windows = [None if window is None or window >= max_positions else window for window in config.windows]
        self._order = torch.arange(max_decodes, dtype=torch.int32, device=device)
        # One for all steps: what a captured step gives stays in memory of its own.
        self._flat = torch.empty(3, aligned(max_tokens), dtype=torch.int32, device=device)
        self.token_ids = self._flat[0]
        self.hidden = torch.empty(max_tokens, config.hidden_size, dtype=model.dtype, device=device)
        self._logits = torch.empty(max_sampled, config.vocab_size, dtype=model.dtype, device=device)
        near = torch.empty(max_sampled, ROOM, dtype=model.dtype, device=device)
        self._near = near, torch.empty_like(near, dtype=torch.int32)
        can_wait = options.few_rows and model.dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (9, 0)
        self._attends_few = can_wait and attention == "triton"
        self._multiplies_few = can_wait and all(fits(self._linears(cast(DecoderLayer, one))) for one in model.layers)
        self._is_float8 = model.quantization == "fp8"
        self._flash: Any = None
        if attention == "flash":
            from flash_attn import flash_attn_with_kvcache

            self._flash = flash_attn_with_kvcache
            self._lengths = torch.zeros(max_decodes, dtype=torch.int32, device=device)
            self._gathered = torch.zeros(max_decodes, rows.tables.shape[1], dtype=torch.int32, device=device)

    def run(self, step: StepRows, out: Tensor) -> Tensor:
        """Compute a step and sample; `out` [at least sampled] takes the tokens. The logits [sampled, vocabulary], until
        the next step."""
        hidden = self.forward(step)
        if step.last is not None:
            hidden = hidden[step.last]
        last = self._order[: len(step.sample_rows)] if step.last is None else step.last
        return self._sample(step, hidden, last, self._flat[1, : len(step.rows)], out)

    def forward(self, step: StepRows) -> Tensor:
        """Compute a step without sampling; what the last layer gives, the first of `hidden`."""
        rows, cache, decodes = self.rows, self.cache, len(step.decode_rows)
        # Kernels would write behind them, and nobody would know.
        assert len(step.rows) <= len(self.hidden) and decodes <= len(self._order), (len(step.rows), decodes)
        token_ids, positions, slots = self._flat[:, : len(step.rows)]
        read_rows(
            step.rows, rows.tokens, rows.computed, rows.tables, step.prompt_tokens, step.prompt_positions,
            cache.block_size, (token_ids, positions, slots),
        )  # fmt: skip
        if self._flash is not None and decodes:
            lengths, gathered = self._lengths[:decodes], self._gathered[:decodes]
            gather_tables(step.decode_rows, positions, rows.tables, cache.block_size, lengths, gathered)
        return self._layers(step, token_ids, positions, slots)

    def _sample(self, step: StepRows, hidden: Tensor, last: Tensor, positions: Tensor, out: Tensor) -> Tensor:
        """Sample a token behind each row of `hidden` [sampled, hidden_size]; the logits."""
        rows, logits = self.rows, self.model.logits(hidden, self._logits[: len(hidden)])
        state = rows.seeds, rows.tokens, rows.computed, out
        blocks = sample_rows(logits, step.sample_rows, last, positions, rows.temperatures, *state)
        sample_filtered_rows(logits, step.sample_rows, rows.temperatures, rows.filters, *state, blocks, self._near)
        return logits

    def _layers(self, step: StepRows, token_ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """The last layer's normalised output [tokens, hidden_size]."""
        model, eps = self.model, self.model.config.rms_norm_eps
        residual = self._embedded(token_ids)
        layers = [cast(DecoderLayer, layer) for layer in model.layers]
        if self._multiplies_few and has_product(len(token_ids), self.model.config):
            for number, layer in enumerate(layers):
                x = product(residual, layer.attention.qkv, layer.attention_norm.weight, eps)
                attended = self._attended(step, x, number, positions, slots)
                self._add(layer.attention.output, attended, residual, 2 * number)
                x = product(residual, layer.mlp.gate_up, layer.mlp_norm.weight, eps, gated=True)
                self._add(layer.mlp.down, x, residual, 2 * number + 1)
            return rms_norm(residual, model.norm.weight, eps, out=self.hidden[: len(residual)])
        # What a product with float8 weights takes is rounded by the kernel that makes it.
        norm, gated = (rms_norm_float8, silu_and_mul_float8) if self._is_float8 else (rms_norm, silu_and_mul)
        taken: Any = norm(residual, layers[0].attention_norm.weight, eps)
        for number, layer in enumerate(layers):
            attended = self._attended(step, layer.attention.qkv(taken), number, positions, slots)
            taken = self._add_and_norm(layer.attention.output, attended, residual, 2 * number, layer.mlp_norm.weight)
            inner: Any = gated(layer.mlp.gate_up(taken))
            is_last = layer is layers[-1]
            weight = model.norm.weight if is_last else layers[number + 1].attention_norm.weight
            out = self.hidden[: len(residual)] if is_last else None
            taken = self._add_and_norm(layer.mlp.down, inner, residual, 2 * number + 1, weight, out)
        return cast(Tensor, taken)

    def _embedded(self, token_ids: Tensor) -> Tensor:
        """The vectors of tokens [tokens, hidden_size], in memory of their own."""
        return self.model.embedding(token_ids)

    def _linears(self, layer: DecoderLayer) -> list[nn.Module]:
        """A layer's products, as this computes them."""
        return [layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down]

    def _add(self, linear: nn.Module, x: Tensor, residual: Tensor, number: int) -> None:
        """Add a product of a few rows to `residual`; it is the `number`-th of the step that is added, from 0."""
        product(x, cast(Linear, linear), residual=residual)

    def _add_and_norm(
        self, linear: nn.Module, x: Any, residual: Tensor, number: int, weight: Tensor, out: Tensor | None = None
    ) -> Any:
        """Add a product to `residual`, as `_add` does, and normalise the result for the next product, or in `out`."""
        eps = self.model.config.rms_norm_eps
        if self._is_float8 and out is None:
            return rms_norm_float8(linear(x), weight, eps, residual)
        return rms_norm(linear(x), weight, eps, residual, out)

    def _attended(self, step: StepRows, qkv: Tensor, number: int, positions: Tensor, slots: Tensor) -> Tensor:
        """Attention in a layer [tokens, heads * head_dim], whose keys and values go into the pool."""
        model, keys, values = self.model, self.cache.keys[number], self.cache.values[number]
        norm, eps = cast(DecoderLayer, model.layers[number]).attention.qk_norm, model.config.rms_norm_eps
        weights, window = None if norm is None else norm.weight, self._windows[number]
        # Of one sequence several tokens may be told, which have to lie in the pool before any of them attends.
        if self._attends_few and len(qkv) <= MOST_ROWS and not len(step.prompt_tokens):
            rows, tables = step.decode_rows, self.rows.tables
            return attend(qkv, self._rotation, weights, eps, keys, values, rows, tables, positions, window)
        query = rotate_and_store(qkv, positions, slots, self._rotation, weights, eps, keys, values)
        return self._attend(step, query, keys, values, positions, window).flatten(1)

    def _attend(
        self, step: StepRows, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None
    ) -> Tensor:
        """Attention of decodes over a layer's pool, then of prompts, which may lie among the decodes' places."""
        tables, decodes = self.rows.tables, len(step.decode_rows)
        out = torch.empty_like(query)
        if decodes and self._flash is not None:
            lengths, gathered = self._lengths[:decodes], self._gathered[:decodes]
            attended = self._flash(
                query[:decodes, None], keys, values, cache_seqlens=lengths, block_table=gathered, causal=True,
                window_size=window_size(window),
            )[:, 0]  # fmt: skip
            if decodes == len(query):
                return attended
            out[:decodes] = attended
        elif decodes:
            decode_attention(query[:decodes], keys, values, step.decode_rows, tables, positions, out[:decodes], window)
        if len(step.tiles):
            prefill_attention(query, keys, values, step.tiles, tables, out, window)
        return out
