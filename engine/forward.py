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
    """Rows behind which drafts are wanted.

    Attributes:
        places: [rows], int64: their numbers in the layout.
        lengths: [rows], int64: of each one's text in tokens, so the position of its first draft.
        tables: the ids of each one's blocks.
        count: how many drafts are wanted of each, as far as its text stays within `max_model_len`.
    """

    places: Tensor
    lengths: Tensor
    tables: Seq[np.ndarray]
    count: int
    max_model_len: int


class Forward(Protocol):
    """A model's forward pass, over keys and values of its own.

    Attributes:
        most_single: tokens of the rows that have to lie first in a flat batch, see `Layout.of`.
        is_free: it lays rows whose places the device alone knows, and the host waits for nothing.
    """

    most_single: int
    is_free: bool

    def lay(self, layout: Layout, moved: Tensor | None = None) -> Any:
        """What `computed` has to know of a flat batch, on the device.

        Args:
            moved: [rows], int64: by how many tokens each row of the layout begins later; None is by none.
        """

    def computed(self, laid: Any, token_ids: Tensor) -> Tensor:
        """What the last layer gives for each token of a flat batch, [tokens, hidden_size], normalised; until the next
        one is computed."""

    def followed(self, drafted: Drafted, first: Tensor) -> list[Tensor]:
        """Tokens behind rows of the latest flat batch, `count` times [rows], int64: `first`, and then the most probable
        one behind each; whatever behind a row that wants no more."""


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
        self.is_free = self._device.type == "cpu"

    def lay(self, layout: Layout, moved: Tensor | None = None) -> Placed:
        if moved is not None:
            layout = layout.moved(moved.tolist())
        model, block_size, device = self._model, self._cache.block_size, self._device
        plans = plan_layers(self._backend, layout.metadata(block_size), model.config.windows, model.dtype, device)
        return Placed(to_device(layout.positions, device), to_device(layout.slots(block_size), device), plans)

    def computed(self, laid: Placed, token_ids: Tensor) -> Tensor:
        attention = PagedAttention(self._backend, self._cache, laid.slots, laid.plans)
        hidden: Tensor = self._model(token_ids, laid.positions, attention)
        return hidden

    def followed(self, drafted: Drafted, first: Tensor) -> list[Tensor]:
        tokens, lengths = [first], drafted.lengths.tolist()
        for number in range(1, drafted.count):
            going = [row for row, length in enumerate(lengths) if length + number < drafted.max_model_len]
            if not going:
                tokens.append(first)
                continue
            spans = [(lengths[row] + number - 1, 1) for row in going]
            layout = Layout.of(spans, [drafted.tables[row] for row in going])
            places = to_device(np.array([going[place] for place in layout.order]), self._device)
            hidden = self.computed(self.lay(layout), tokens[-1][places])
            tokens.append(first.index_copy(0, places, self._model.logits(hidden).argmax(dim=-1)))
        return tokens
