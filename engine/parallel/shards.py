"""Shard: which part of a model one of several ranks has, as Megatron-LM splits it (arXiv:1909.08053, section 3)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """A rank's part of a model.

    Projections into heads, gate and up are split by what they give, so a rank computes whole heads and whole inner
    numbers by itself; those out of them are split by what they take, so that what the ranks give has to be summed. The
    vocabulary is split, for the embedding and for the logits alike.

    Attributes:
        rank: which of them, from 0.
        size: how many ranks there are.
    """

    rank: int = 0
    size: int = 1

    def part(self, count: int) -> slice:
        """Its own of `count` things that the ranks share evenly."""
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def kv_heads(self, count: int) -> slice:
        """Its own of `count` KV heads: some of them, or, of fewer heads than ranks, one that it shares with others."""
        if count >= self.size:
            return self.part(count)
        head = self.rank * count // self.size
        return slice(head, head + 1)

    def vocabulary_size(self, count: int) -> int:
        """Tokens of each rank, those of padding included."""
        return -(-count // self.size)

    def tokens(self, count: int) -> slice:
        """Its own of `count` tokens of the vocabulary; the last ranks can have fewer than the others, or none."""
        own = self.vocabulary_size(count)
        return slice(min(self.rank * own, count), min((self.rank + 1) * own, count))
