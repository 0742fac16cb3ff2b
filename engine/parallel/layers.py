"""The layers of a Decoder whose results the ranks have to put together."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from twinserve.engine.parallel.group import Group


class SummedLinear(nn.Module):
    """A linear layer of which each rank has the weights for some of the inputs, summed over the ranks.

    Args:
        linear: the rank's own; its bias, if there is one, is zero on all ranks but one.
    """

    def __init__(self, linear: nn.Module, group: Group):
        super().__init__()
        self.linear, self._group = linear, group

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of the rank's own inputs [..., in / ranks], alike on all ranks."""
        return self._group.sum(self.linear(x))


class SummedEmbedding(nn.Module):
    """A table of token vectors of which each rank has some tokens.

    Args:
        table: the rank's own rows, an Embedding or an Int8Embedding.
        first: the token of its first row.
    """

    table: Any

    def __init__(self, table: nn.Module, first: int, group: Group):
        super().__init__()
        self.table, self._first, self._group = table, first, group

    @property
    def weight(self) -> Tensor:
        """The rank's own rows."""
        weight: Tensor = self.table.weight
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [rows, hidden] times the vectors of the rank's own tokens."""
        logits: Tensor = self.table.logits(hidden)
        return logits

    def forward(self, token_ids: Tensor) -> Tensor:
        """The vectors [..., hidden] of `token_ids` [...], which any rank may have."""
        return self._group.sum(self.part(token_ids))

    def part(self, token_ids: Tensor) -> Tensor:
        """The vectors [..., hidden] of those of `token_ids` [...] that the rank has; zeros for the others."""
        places = token_ids - self._first
        is_elsewhere = (places < 0) | (places >= len(self.weight))
        vectors: Tensor = self.table(places.clamp(0, len(self.weight) - 1))
        return vectors.masked_fill(is_elsewhere[..., None], 0.0)
