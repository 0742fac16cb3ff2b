"""FlatSteps: a Decoder's forward pass over rows that are told anew for each step, captured where it can be."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.device_queue import to_device
from twinserve.engine.forward import Drafted
from twinserve.engine.graphs.device_rows import DeviceRows, aligned
from twinserve.engine.graphs.fused_decoder import FusedDecoder, StepRows
from twinserve.engine.graphs.graph_runner import capture_each, captured
from twinserve.engine.graphs.step_sizes import GraphOptions, StepSize, StepSizes
from twinserve.engine.kernels.cuts import decode_cuts, longest_first, prompt_tiles, tile_tokens
from twinserve.engine.kv_cache import KVCache
from twinserve.engine.layout import Layout
from twinserve.engine.models.decoder import Decoder


@dataclass(frozen=True)
class Laid:
    """A flat batch as FlatSteps have it, int32 on the device; the rows of `tables` are those of the layout.

    Attributes:
        size: of the step, padding included where it is captured.
        places: [2, at least size], of each token its row of `tables`, scratch for padding, and its place in its
            sequence.
        tables: [rows, blocks of the longest].
        singles: [decodes of `size`], the rows of the tokens that attend as decodes, the first ones; scratch beyond.
        tiles: [tiles, 4], of the other rows, see `prefill_attention`; what pads them has no tokens.
    """

    size: StepSize
    places: Tensor
    tables: Tensor
    singles: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class _Captured:
    """A captured step: what it reads, and what replays it.

    Attributes:
        flat: [3, at least size], places as of Laid, and tokens.
        singles, tiles: as of Laid; where all tokens attend as decodes, the first of `flat` are, and there are no tiles.
    """

    flat: Tensor
    singles: Tensor
    tiles: Tensor
    replay: Callable[[], None]


class FlatSteps:
    """Each token of a short row attends as a decode does, over the context up to itself: all keys and values of a layer
    are written before any token attends. So a step of so many such tokens, whatever rows they are of, is one captured
    graph, which the device is told tokens, places and tables of. One with longer rows, of prompts, is a graph as well,
    which is told the tiles in which they attend, or runs kernel by kernel where it has more tokens or rows.

    Args:
        cache: of the model's own keys and values.
        config: as of GraphRunner.
        most_single: tokens of a row that is short.
        follows: steps go on behind their rows, see `followed`.

    Attributes:
        most_single: as given; such rows have to lie first in a flat batch.
        cache: as given.
    """

    is_free = True

    def __init__(
        self, model: Decoder, cache: KVCache, config: RunnerConfig, most_single: int, *, follows: bool = False
    ) -> None:
        settings, shape, device = config.settings, model.config, model.device
        self.most_single, self.cache, self._device = most_single, cache, device
        # What a model drafts behind is a token longer, in each row, than what was computed.
        budget = settings.max_num_batched_tokens + settings.max_num_seqs * follows
        most = min(settings.max_num_seqs * most_single, budget)
        self._sizes = StepSizes(most, budget, 2.0 * shape.num_layer_parameters)
        self._following = StepSizes(settings.max_num_seqs, budget, 2.0 * shape.num_layer_parameters)
        self._follows = follows
        self._options = config.graph_options or GraphOptions()
        self._memory_share = config.options.gpu_memory_utilization
        width = -(-config.max_model_len // settings.block_size)
        # Of what it keeps for each row, the tables alone are used: tokens and places are told anew for each step.
        generator = random.Random(config.options.seed)
        self._rows = DeviceRows(settings.max_num_seqs, width, shape.vocab_size, config.num_blocks, device, generator)
        self._decoder = FusedDecoder(
            model,
            cache,
            self._rows,
            attention=cast(Literal["triton", "flash"], config.attention.name),
            max_decodes=most,
            max_tokens=self._sizes.most_tokens,
            max_sampled=settings.max_num_seqs if follows else 1,
            max_positions=config.max_model_len,
            options=self._options,
        )
        self._tile = tile_tokens(shape.num_heads // shape.num_kv_heads, model.dtype)
        self._cuts = decode_cuts(most, shape.num_kv_heads, model.dtype) if config.attention.name == "triton" else []
        self._out = torch.zeros(settings.max_num_seqs, dtype=torch.int32, device=device)
        self._graphs: dict[StepSize, _Captured] = {}
        self._followers: dict[StepSize, tuple[Tensor, Callable[[], Any]]] = {}

    def kernel_facts(self) -> dict[str, Any]:
        """How steps are padded and cut, as the facts of a run say it (`twinserve.sim.kernels.Kernels`)."""
        facts = self._sizes.as_facts(self._options.captured)
        return facts | {"prompt_tile": self._tile, "single": self.most_single, "decode_cuts": self._cuts}

    def capture(self) -> None:
        """Capture the graphs, unless that was done.

        Raises:
            InputError: they do not fit the memory that is left.
        """
        if self._graphs or self._options.captured == "none":
            return
        sizes = self._sizes.captured(self._options.captured)
        self._graphs = capture_each(sizes, self._capture, self._device, self._memory_share)
        if self._follows:
            sizes = self._following.captured("decodes")
            self._followers = capture_each(sizes, self._capture_follower, self._device, self._memory_share)

    def lay(self, layout: Layout, moved: Tensor | None = None) -> Laid:
        lengths = [length for _, length in layout.spans]
        cut, offset, num_single = list[tuple[int, int, int, int]](), 0, 0
        for number, (start, length) in enumerate(layout.spans):
            if length > self.most_single:
                cut += prompt_tiles(number, offset, start, length, self._tile)
            else:
                num_single += length
            offset += length
        longest_first(cut)
        num_prompts = sum(length > self.most_single for length in lengths)
        size = StepSize(num_single, offset, num_prompts)
        if (padded := self._sizes.padded(size)) in self._graphs:
            size = padded
        num_tiles = len(self._graphs[size].tiles) if size in self._graphs else len(cut)
        # One copy for all of it; each part begins at 64 bytes, as the kernels are compiled for.
        width, tokens = max(map(len, layout.tables)), aligned(size.tokens)
        sizes = 2 * tokens, aligned(len(lengths) * width), aligned(size.decodes), 4 * num_tiles
        ends = list(accumulate(sizes))
        flat = np.zeros(ends[-1], dtype=np.int32)
        flat[:tokens] = flat[ends[1] : ends[2]] = self._rows.scratch
        flat[:offset] = np.repeat(np.arange(len(lengths)), lengths)
        flat[tokens : tokens + offset] = layout.positions
        for number, table in enumerate(layout.tables):
            begin = ends[0] + number * width
            flat[begin : begin + len(table)] = table
        flat[ends[1] : ends[1] + num_single] = flat[:num_single]
        flat[ends[2] : ends[2] + 4 * len(cut)] = np.ravel(cut)
        told = to_device(flat, self._device)
        if moved is not None:
            rows, positions = told[:offset].long(), told[tokens : tokens + offset]
            positions += moved[rows].int()
        tables = told[ends[0] : ends[0] + len(lengths) * width].view(-1, width)
        singles = told[ends[1] : ends[1] + size.decodes]
        return Laid(size, told[: ends[0]].view(2, -1), tables, singles, told[ends[2] :].view(-1, 4))

    def computed(self, laid: Laid, token_ids: Tensor) -> Tensor:
        count, (num_rows, width) = len(token_ids), laid.tables.shape
        self._rows.tables[:num_rows, :width].copy_(laid.tables)
        graph = self._graphs.get(laid.size)
        if graph is None:
            self._decoder.forward(_flat_rows(laid.places[:, :count], token_ids.int(), laid.singles, laid.tiles))
        else:
            graph.flat[:2].copy_(laid.places)
            graph.flat[2, :count].copy_(token_ids)
            if len(graph.tiles):
                graph.singles.copy_(laid.singles)
                graph.tiles.copy_(laid.tiles)
            graph.replay()
        return self._decoder.hidden[:count]

    def followed(self, drafted: Drafted, first: Tensor) -> list[Tensor]:
        """As a `Forward` has it; each step leaves on the device what the next begins with, and the host waits for none.

        Theirs are plain steps of decodes, whose rows' tables the flat batch has left.
        """
        self._rows.tokens.index_copy_(0, drafted.places, first.int())
        self._rows.computed.index_copy_(0, drafted.places, drafted.lengths.int())
        size = self._following.padded(StepSize(len(first), len(first)))
        inputs, step = self._followers.get(size) or self._follower(size)
        inputs.fill_(self._rows.scratch)
        tokens = [first]
        for number in range(1, drafted.count):
            going = drafted.lengths + number < drafted.max_model_len
            inputs[: len(first)].copy_(drafted.places.where(going, self._rows.scratch))
            step()
            tokens.append(self._out[: len(first)].long())
        return tokens

    @torch.inference_mode()
    def _capture_follower(
        self, size: StepSize, pool: Any, stream: torch.cuda.Stream
    ) -> tuple[Tensor, Callable[[], Any]]:
        """A `_follower` that is captured."""
        rows, step = self._follower(size)
        return rows, captured(step, self._device, pool, stream)[1]

    def _follower(self, size: StepSize) -> tuple[Tensor, Callable[[], Tensor]]:
        """The rows of a step of decodes, all of it padding yet, and what launches it."""
        rows = torch.full((size.tokens,), self._rows.scratch, dtype=torch.int32, device=self._device)
        none = rows[:0]
        step = StepRows(rows, rows, none, none, none.view(0, 4), rows, None)
        return rows, lambda: self._decoder.run(step, self._out)

    @torch.inference_mode()
    def _capture(self, size: StepSize, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        """A captured step, all of it padding yet."""
        num_tiles = size.tokens // self._tile + size.prompts if size.prompts else 0
        flat = torch.zeros(3, aligned(size.tokens), dtype=torch.int32, device=self._device)
        flat[0].fill_(self._rows.scratch)
        own, singles = flat[:, : size.tokens], flat[0, : size.decodes]
        if num_tiles:
            singles = singles.clone()
        tiles = torch.zeros(num_tiles, 4, dtype=torch.int32, device=self._device)
        step = _flat_rows(own[:2], own[2], singles, tiles)
        replay = captured(lambda: self._decoder.forward(step), self._device, pool, stream)[1]
        return _Captured(flat, singles, tiles, replay)


def _flat_rows(places: Tensor, token_ids: Tensor, singles: Tensor, tiles: Tensor) -> StepRows:
    """The rows of a step of tokens that are given, which samples nothing."""
    rows, positions = places
    return StepRows(singles, rows, token_ids, positions, tiles, rows[:0], None)
