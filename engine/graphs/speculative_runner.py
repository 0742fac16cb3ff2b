"""GraphSpeculativeRunner: steps with drafts on CUDA, by fused kernels, captured where they have no prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.device_queue import to_device
from twinserve.engine.graphs.device_rows import DeviceRows
from twinserve.engine.graphs.fused_decoder import FusedDecoder, StepRows
from twinserve.engine.graphs.graph_runner import capture_each, captured
from twinserve.engine.graphs.step_sizes import GraphOptions, StepSize, StepSizes
from twinserve.engine.kernels.cuts import longest_first, prompt_tiles, tile_tokens
from twinserve.engine.layout import Layout
from twinserve.engine.model_runner import FlatStep, ModelRunner
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.speculation.proposers import Proposer
from twinserve.engine.speculation.runner import SpeculativeRunner


@dataclass(frozen=True)
class _Laid:
    """Where the tokens of a step lie, int32 on the device; the rows of `tables` are those of the layout.

    Attributes:
        num_single: tokens of rows that attend as decodes; they are the first.
        rows, positions: [tokens], of each token its row of `tables` and its place in its sequence.
        tables: [rows, blocks of the longest].
        tiles: [tiles, 4], of the other rows, see `prefill_attention`.
    """

    num_single: int
    rows: Tensor
    positions: Tensor
    tables: Tensor
    tiles: Tensor


class GraphSpeculativeRunner(SpeculativeRunner):
    """A SpeculativeRunner whose model runs in fused kernels over the same pool.

    Each token of a row with drafts attends as a decode does, over the context up to itself: all keys and values of a
    layer are written before any token attends. So a step of so many such tokens, whatever rows they are of, is one
    captured graph, which the device is told tokens, places and tables of. Steps with longer rows, of prompts, run
    kernel by kernel. Sampling and verifying are those of SpeculativeRunner, behind the graph.

    Args:
        config: as of GraphRunner.
    """

    def __init__(
        self, model: Decoder, tokenizer: Any, config: RunnerConfig, make_proposer: Callable[[ModelRunner], Proposer]
    ):
        settings, speculative = config.settings, config.settings.speculative_config
        assert speculative is not None
        super().__init__(
            model,
            tokenizer,
            model.device,
            num_blocks=config.num_blocks,
            block_size=settings.block_size,
            seed=config.options.seed,
            make_proposer=make_proposer,
            is_async=settings.pipeline_depth > 0,
            acceptance_rate=speculative.synthetic_acceptance_rate,
        )
        self._most_single = 1 + speculative.num_speculative_tokens
        budget = settings.max_num_batched_tokens
        most = min(settings.max_num_seqs * self._most_single, budget)
        self._sizes = StepSizes(most, budget, 2.0 * self.model.config.num_layer_parameters)
        self._options = config.graph_options or GraphOptions()
        self._memory_share = config.options.gpu_memory_utilization
        shape = self.model.config
        width = -(-config.max_model_len // self.block_size)
        # Of what it keeps for each row, the tables alone are used: tokens and places are told anew for each step.
        self._rows = DeviceRows(
            settings.max_num_seqs, width, shape.vocab_size, self.num_blocks, self.device, self._generator
        )
        self._decoder = FusedDecoder(
            self.model,
            self._cache,
            self._rows,
            attention=cast(Literal["triton", "flash"], config.attention.name),
            max_decodes=most,
            max_tokens=max(most, budget),
            max_sampled=1,
            max_positions=config.max_model_len,
        )
        self._tile = tile_tokens(shape.num_heads // shape.num_kv_heads, self.model.dtype)
        self._scratch = torch.full((1,), self._rows.scratch, dtype=torch.int32, device=self.device)
        self._first = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._out = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._graphs: dict[StepSize, tuple[Tensor, Callable[[], None]]] = {}

    def capture(self) -> None:
        """Capture the graphs, unless that was done.

        Raises:
            InputError: they do not fit the memory that is left.
        """
        sizes = [] if self._options.captured == "none" else self._sizes.captured("decodes")
        if not self._graphs and sizes:
            self._graphs = capture_each(sizes, self._capture, self.device, self._memory_share)

    @torch.inference_mode()
    def _capture(self, size: StepSize, pool: Any, stream: torch.cuda.Stream) -> tuple[Tensor, Callable[[], None]]:
        """The inputs of a captured step, all of it padding yet, and what replays it."""
        inputs = torch.zeros(3, size.tokens, dtype=torch.int32, device=self.device)
        inputs[0].fill_(self._rows.scratch)
        step = self._step_rows(inputs[0], inputs[1], inputs[2], size.tokens)
        return inputs, captured(lambda: self._decoder.run(step, self._out), self.device, pool, stream)[1]

    def _step_rows(
        self, rows: Tensor, tokens: Tensor, positions: Tensor, num_single: int, tiles: Tensor | None = None
    ) -> StepRows:
        """The rows of a step; what it samples itself goes to the scratch row, and nobody reads it."""
        none = tokens[:0].view(0, 4)
        return StepRows(
            rows[:num_single], rows, tokens, positions, none if tiles is None else tiles, self._scratch, self._first
        )

    def _plans(self, layout: Layout) -> list[Any]:
        lengths = [length for _, length in layout.spans]
        width = max(len(table) for table in layout.tables)
        tables = np.zeros((len(lengths), width), dtype=np.int32)
        cut, offset, num_single = list[tuple[int, int, int, int]](), 0, 0
        for number, (table, (start, length)) in enumerate(zip(layout.tables, layout.spans, strict=True)):
            tables[number, : len(table)] = table
            if length > self._most_single:
                cut += prompt_tiles(number, offset, start, length, self._tile)
            else:
                num_single += length
            offset += length
        longest_first(cut)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        tiles = np.array(cut, dtype=np.int32).reshape(-1, 4)
        arrays = (rows.astype(np.int32), layout.positions.astype(np.int32), tables, tiles)
        return [_Laid(num_single, *(to_device(array, self.device) for array in arrays))]

    def _hidden(self, flat: FlatStep, token_ids: Tensor) -> Tensor:
        (laid,) = flat.plans
        count, (num_rows, width) = len(token_ids), laid.tables.shape
        self._rows.tables[:num_rows, :width].copy_(laid.tables)
        graph = None
        if laid.num_single == count:
            graph = self._graphs.get(self._sizes.padded(StepSize(count, count)))
        if graph is None:
            rows = self._step_rows(laid.rows, token_ids.int(), laid.positions, laid.num_single, laid.tiles)
            self._decoder.run(rows, self._out)
        else:
            inputs, replay = graph
            inputs[0].fill_(self._rows.scratch)
            for own, values in zip(inputs, (laid.rows, token_ids, laid.positions), strict=True):
                own[:count].copy_(values)
            replay()
        return self._decoder.hidden[:count]
