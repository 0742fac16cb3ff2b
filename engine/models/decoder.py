"""Decoder: the forward pass of Llama, Mistral, Qwen2 and Qwen3 over a flat batch of tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinserve.engine.float8 import FLOAT8
from twinserve.engine.models.config import ModelConfig
from twinserve.engine.models.rope import rotation
from twinserve.engine.options import Quantization
from twinserve.engine.quantization import Int8Embedding


class Attention(Protocol):
    """How the tokens of one forward pass attend; where earlier keys and values come from is its own business."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention's output in layer `layer`.

        Args:
            query: [tokens, heads, head_dim], rotated.
            key, value: [tokens, kv_heads, head_dim], the keys rotated; not yet known to any cache.

        Returns:
            [tokens, heads, head_dim]
        """


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467) of the last dimension, computed in float32.

    Args:
        shape: of the weight; its last dimension is normalised, those before it have weights of their own.
    """

    def __init__(self, shape: tuple[int, ...], eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class Rotation:
    """Rotary position embedding (arXiv:2104.09864) in the layout of halves: dimension i turns with i + head_dim / 2.

    The angles are computed once for a forward pass, in float32.

    Args:
        positions: [tokens].
        config: has the frequencies, and how they are scaled.
    """

    def __init__(self, positions: Tensor, config: ModelConfig):
        cos, sin = rotation(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        self._cos, self._sin = cos[:, None], sin[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [tokens, heads, head_dim], each token turned to its position."""
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = self._cos, self._sin
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Linear(nn.Linear):
    """A projection whose weights are given to it. None are drawn for it where it is made, which on torch's device
    "meta" imports modules for seconds."""

    def reset_parameters(self) -> None:
        """Draws nothing."""


class SelfAttention(nn.Module):
    """Grouped-query attention with one projection for queries, keys and values."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.layer = layer
        self.head_dim = head_dim
        self.splits = [heads, kv_heads, kv_heads]
        qkv_size, bias = (heads + 2 * kv_heads) * head_dim, config.attention_bias
        self.qkv = Linear(config.hidden_size, qkv_size, bias=bias or config.qkv_bias, dtype=dtype)
        self.output = Linear(heads * head_dim, config.hidden_size, bias=bias, dtype=dtype)
        # A weight for each head, so that queries and keys are normalised at once.
        self.qk_norm = RMSNorm((heads + kv_heads, head_dim), config.rms_norm_eps, dtype) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        heads, kv_heads, _ = self.splits
        qk, value = self.qkv(x).view(len(x), -1, self.head_dim).split((heads + kv_heads, kv_heads), dim=1)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        query, key = rotation(qk).split((heads, kv_heads), dim=1)
        return self.output(attention(self.layer, query, key, value).reshape(len(x), -1))


class GatedMlp(nn.Module):
    """SiLU-gated feed-forward network (arXiv:2002.05202) with one projection for gate and up."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(hidden, 2 * inner, bias=bias, dtype=dtype)
        self.down = Linear(inner, hidden, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and feed-forward network, each normalised before and added to what came in."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.attention_norm = RMSNorm((config.hidden_size,), config.rms_norm_eps, dtype)
        self.attention = SelfAttention(config, layer, dtype)
        self.mlp_norm = RMSNorm((config.hidden_size,), config.rms_norm_eps, dtype)
        self.mlp = GatedMlp(config, dtype)

    def forward(self, x: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, attention)
        return x + self.mlp(self.mlp_norm(x))


class Embedding(nn.Embedding):
    """A table of token vectors that a tied output projection multiplies by as well."""

    def reset_parameters(self) -> None:
        """Draws nothing, as in `Linear`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [rows, hidden] times every token's vector, [rows, vocabulary]."""
        return F.linear(hidden, self.weight)


class Decoder(nn.Module):
    """A decoder-only transformer over a flat batch: the tokens of all rows one after another, no padding.

    Llama, Mistral, Qwen2 and Qwen3 are this one class; what tells them apart is in the config. Its weights are given by
    `load_model`, `adopt_model` or `random_model`.

    Attributes:
        dtype: of what the layers are given and give.
    """

    embedding: Embedding | Int8Embedding

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, dtype) for layer in range(config.num_layers))
        self.norm = RMSNorm((config.hidden_size,), config.rms_norm_eps, dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def quantization(self) -> Quantization:
        """Of the weights; `quantize_decoder` has a Decoder run from int8 or float8."""
        if self.embedding.weight.dtype == torch.int8:
            return "int8"
        return "fp8" if any(tensor.dtype == FLOAT8 for tensor in self.layers.buffers()) else "none"

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """The last layer's normalised output.

        Args:
            token_ids: [tokens], integers.
            positions: [tokens], each token's place in its own sequence, from 0.
            attention: how the tokens attend.

        Returns:
            [tokens, hidden_size]
        """
        rotate = Rotation(positions, self.config)
        x = self.embedding(token_ids)
        for layer in self.layers:
            x = layer(x, rotate, attention)
        return self.norm(x)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [rows, vocab_size] of the rows `hidden` [rows, hidden_size] of `forward`; in `out` if there is one."""
        head = self.embedding if self.lm_head is None else self.lm_head
        if out is not None and head.weight.dtype == hidden.dtype:
            return torch.mm(hidden, head.weight.t(), out=out)
        logits = self.embedding.logits(hidden) if self.lm_head is None else self.lm_head(hidden)
        return logits if out is None else out.copy_(logits)
