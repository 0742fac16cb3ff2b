"""Layout: the rows of a step in the order of its flat batch, and where their tokens lie."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np

from twinserve.engine.layers.attention import AttentionMetadata, slots_of


@dataclass(frozen=True)
class Layout:
    """A flat batch: rows of one token, or of some at most, first; the longest context first among them.

    Attributes:
        order: the numbers of the rows, as they lie in the batch.
        spans: (position of the first token, tokens) of each row, in that order.
        tables: ids of the blocks of each row, in that order.
        last: by number of the row, the place of its last token in the batch.
        positions: [tokens], of each token in its sequence.
    """

    order: list[int]
    spans: list[tuple[int, int]]
    tables: list[np.ndarray]
    last: list[int]
    positions: np.ndarray

    @classmethod
    def of(cls, spans: Seq[tuple[int, int]], tables: Seq[np.ndarray], most_single: int = 1) -> Layout:
        """The layout of rows that begin at positions and have so many tokens; first those of at most `most_single`."""
        order = sorted(range(len(spans)), key=lambda i: (spans[i][1] > most_single, -spans[i][0]))
        ordered = [spans[i] for i in order]
        ends = np.cumsum([length for _, length in ordered])
        last_of = dict(zip(order, (ends - 1).tolist(), strict=True))
        return cls(
            order,
            ordered,
            [tables[i] for i in order],
            [last_of[i] for i in range(len(spans))],
            np.concatenate([np.arange(start, start + length) for start, length in ordered]),
        )

    def moved(self, more: Seq[int]) -> Layout:
        """The same rows, each of which begins so many tokens later; in their order here."""
        spans = [(start + own, length) for (start, length), own in zip(self.spans, more, strict=True)]
        lengths = [length for _, length in self.spans]
        return replace(self, spans=spans, positions=self.positions + np.repeat(more, lengths))

    def metadata(self, block_size: int) -> AttentionMetadata:
        """What attention is planned by."""
        return AttentionMetadata(
            num_single=sum(length == 1 for _, length in self.spans),
            query_lens=[length for _, length in self.spans],
            context_lens=[start + length for start, length in self.spans],
            block_tables=self.tables,
            block_size=block_size,
        )

    def slots(self, block_size: int) -> np.ndarray:
        """Where the keys and values of each token go."""
        return np.concatenate(
            [
                slots_of(table, np.arange(start, start + length), block_size)
                for (start, length), table in zip(self.spans, self.tables, strict=True)
            ]
        )
