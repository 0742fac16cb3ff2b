"""Forward: a model's forward pass over flat batches and keys and values of its own."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from twinserve.engine.device_queue import to_device
from twinserve.engine.kv_cache import KVCache
from twinserve.engine.layers.attention import AttentionBackend, PagedAttention, plan_layers
from twinserve.engine.layout import Layout
from twinserve.engine.models.decoder import Decoder


@dataclass(frozen=True)
class Drafted:
    """A row behind which drafts are wanted.

    Attributes:
        place: its number in the layout.
        length: tokens of its text, so the position of the first draft.
        count: how many drafts.
        table: the ids of its blocks.
    """

    place: int
    length: int
    count: int
    table: np.ndarray


class Forward(Protocol):
    """A model's forward pass, over keys and values of its own.

    Attributes:
        most_single: tokens of the rows that have to lie first in a flat batch, see `Layout.of`.
    """

    most_single: int

    def lay(self, layout: Layout) -> Any:
        """What `computed` has to know of a flat batch, on the device."""

    def computed(self, laid: Any, token_ids: Tensor) -> Tensor:
        """What the last layer gives for each token of a flat batch, [tokens, hidden_size], normalised; until the next
        one is computed."""

    def followed(self, rows: Seq[Drafted], first: Tensor) -> list[Tensor]:
        """Tokens behind rows of the latest flat batch, each time [rows], int64: `first`, and then as long as any row
        wants more the most probable one behind each; whatever behind a row that wants none."""


@dataclass(frozen=True)
class Placed:
    """A flat batch as EagerForward has it.

    Attributes:
        positions, slots: [tokens].
        plans: the attention backend's, of each layer.
    """

    positions: Tensor
    slots: Tensor
    plans: list[Any]


class EagerForward:
    """A Forward that torch launches kernel by kernel."""

    most_single = 1

    def __init__(self, model: Decoder, backend: AttentionBackend, cache: KVCache) -> None:
        self._model, self._backend, self._cache = model, backend, cache
        self._device = torch.device(model.device)

    def lay(self, layout: Layout) -> Placed:
        model, block_size, device = self._model, self._cache.block_size, self._device
        plans = plan_layers(self._backend, layout.metadata(block_size), model.config.windows, model.dtype, device)
        return Placed(to_device(layout.positions, device), to_device(layout.slots(block_size), device), plans)

    def computed(self, laid: Placed, token_ids: Tensor) -> Tensor:
        attention = PagedAttention(self._backend, self._cache, laid.slots, laid.plans)
        hidden: Tensor = self._model(token_ids, laid.positions, attention)
        return hidden

    def followed(self, rows: Seq[Drafted], first: Tensor) -> list[Tensor]:
        tokens = [first]
        for number in range(1, max(row.count for row in rows)):
            going = [place for place, row in enumerate(rows) if row.count > number]
            spans = [(rows[place].length + number - 1, 1) for place in going]
            layout = Layout.of(spans, [rows[place].table for place in going])
            places = to_device(np.array([going[place] for place in layout.order]), self._device)
            hidden = self.computed(self.lay(layout), tokens[-1][places])
            tokens.append(first.index_copy(0, places, self._model.logits(hidden).argmax(dim=-1)))
        return tokens
