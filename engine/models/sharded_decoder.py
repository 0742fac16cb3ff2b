"""ShardedDecoder: a rank's part of a Decoder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from twinserve.engine.models.config import ModelConfig
from twinserve.engine.models.decoder import Decoder, DecoderLayer
from twinserve.engine.parallel.group import Group
from twinserve.engine.parallel.layers import SummedEmbedding, SummedLinear
from twinserve.engine.parallel.shards import Shard
from twinserve.settings.errors import InputError


def part_of(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The shape of a rank's part of a model, which is computed as a smaller model is."""
    kv_heads = shard.kv_heads(config.num_kv_heads)
    return replace(
        config,
        vocab_size=shard.vocabulary_size(config.vocab_size),
        intermediate_size=config.intermediate_size // shard.size,
        num_heads=config.num_heads // shard.size,
        num_kv_heads=kv_heads.stop - kv_heads.start,
    )


def check_size(config: ModelConfig, size: int) -> None:
    """Refuse a number of ranks that cannot share a model.

    Raises:
        InputError: heads or inner numbers are not divided by it, or KV heads neither divide it nor are divided.
    """
    for count, what in (
        (config.num_heads, "query heads"),
        (config.intermediate_size, "numbers of the intermediate layer"),
    ):
        if count % size:
            problem = f"expected a divisor of the model's {count} {what}"
            raise InputError(problem, field="tensor_parallel_size", value=size)
    if config.num_kv_heads % size and size % config.num_kv_heads:
        problem = f"expected a divisor or a multiple of the model's {config.num_kv_heads} KV heads"
        raise InputError(problem, field="tensor_parallel_size", value=size)


class ShardedDecoder(Decoder):
    """A rank's part of a Decoder, whose layers give on every rank what those of the whole model give.

    Args:
        config: of the whole model; the attribute is that of the rank's part.

    Attributes:
        group: the ranks.
        vocab_size: of the whole model.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, group: Group):
        super().__init__(part_of(config, group.shard), dtype)
        self.group, self.vocab_size = group, config.vocab_size
        tokens = group.shard.tokens(config.vocab_size)
        self.first_token, self._num_tokens = tokens.start, tokens.stop - tokens.start

    def join(self) -> ShardedDecoder:
        """Have the layers put together what the ranks give; once, when the weights are there."""
        self.embedding = SummedEmbedding(self.embedding, self.first_token, self.group)  # type: ignore[assignment]
        for module in self.layers:
            assert isinstance(module, DecoderLayer)
            module.attention.output = SummedLinear(module.attention.output, self.group)  # type: ignore[assignment]
            module.mlp.down = SummedLinear(module.mlp.down, self.group)  # type: ignore[assignment]
        return self

    def shard_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [rows, vocabulary of the rank] of the rank's own tokens; minus infinity for those of padding."""
        logits = super().logits(hidden, out)
        if self._num_tokens < logits.shape[-1]:
            logits[:, self._num_tokens :] = -torch.inf
        return logits

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [rows, vocab_size], gathered from all ranks."""
        return self.gathered(self.shard_logits(hidden, out))

    def gathered(self, logits: Tensor) -> Tensor:
        """Logits [rows, vocab_size] from each rank's `shard_logits`."""
        return self.group.gather(logits).transpose(0, 1).flatten(1)[:, : self.vocab_size]
