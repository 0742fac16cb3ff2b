"""ShardedGraphRunner: a rank's part of steps that are graphs, with what the ranks do together inside them."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.device_queue import CudaQueue, Step, to_device
from twinserve.engine.graphs.fused_decoder import FusedDecoder, StepRows
from twinserve.engine.graphs.graph_runner import GraphRunner, GraphStep
from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.kernels.few_rows import product
from twinserve.engine.kernels.peer_sums import (
    add_peers,
    add_peers_and_norm,
    add_peers_and_norm_float8,
    embed_part,
    gather_peers,
    sum_peers,
)
from twinserve.engine.kernels.sampling import draw_rows, sampled_blocks
from twinserve.engine.logprobs import PromptLogprobs
from twinserve.engine.models.decoder import Decoder, DecoderLayer, Linear
from twinserve.engine.models.sharded_decoder import ShardedDecoder
from twinserve.engine.parallel.layers import SummedEmbedding, SummedLinear
from twinserve.engine.parallel.ranks import Ranks
from twinserve.engine.sampler import GREEDY_BELOW, is_plain
from twinserve.policies import SamplingParams


class ShardedFusedDecoder(FusedDecoder):
    """A rank's part of a FusedDecoder, which leaves the same tokens on every rank."""

    model: ShardedDecoder

    def __init__(self, model: Decoder, *others: Any, max_tokens: int, options: GraphOptions, **named: Any):
        assert isinstance(model, ShardedDecoder), model
        config, self._sums = model.config, None
        if options.peer_sums:
            self._sums = model.group.peer_sums(model.dtype, max_tokens, config.hidden_size, 3 + 2 * config.num_layers)
        super().__init__(model, *others, max_tokens=max_tokens, options=options, **named)

    def forward(self, step: StepRows) -> Tensor:
        """Compute a step without sampling; what the last layer gives, the first of `hidden`."""
        if self._sums is not None:
            self._sums.begin()
        return super().forward(step)

    def _embedded(self, token_ids: Tensor) -> Tensor:
        embedding = self.model.embedding
        if self._sums is None or not self._sums.has(len(token_ids)):
            return embedding(token_ids)
        assert isinstance(embedding, SummedEmbedding)
        one = self._sums.sum(0, len(token_ids))
        if isinstance(embedding.table, nn.Embedding):
            embed_part(token_ids, embedding.weight, self.model.first_token, one.own)
        else:
            one.own.copy_(embedding.part(token_ids))
        return sum_peers(one, torch.empty_like(one.own))

    def _linears(self, layer: DecoderLayer) -> list[nn.Module]:
        linears = super()._linears(layer)
        return linears if self._sums is None else [getattr(one, "linear", one) for one in linears]

    def _add(self, linear: nn.Module, x: Tensor, residual: Tensor, number: int) -> None:
        assert self._sums is not None and isinstance(linear, SummedLinear)
        one = self._sums.sum(1 + number, len(residual))
        product(x, cast(Linear, linear.linear), out=one.own)
        add_peers(one, residual, early=True)

    def _add_and_norm(
        self, linear: nn.Module, x: Any, residual: Tensor, number: int, weight: Tensor, out: Tensor | None = None
    ) -> Any:
        if self._sums is None or not self._sums.has(len(residual)):
            return super()._add_and_norm(linear, x, residual, number, weight, out)
        assert isinstance(linear, SummedLinear)
        one, own, eps = self._sums.sum(1 + number, len(residual)), linear.linear, self.model.config.rms_norm_eps
        if type(own) is Linear and own.bias is None:
            torch.mm(x, own.weight.T, out=one.own)
        else:
            one.own.copy_(own(x))
        if self._is_float8 and out is None:
            return add_peers_and_norm_float8(one, residual, weight, eps)
        return add_peers_and_norm(one, residual, weight, eps, out)

    def _sample(self, step: StepRows, hidden: Tensor, last: Tensor, positions: Tensor, out: Tensor) -> Tensor:
        """Sample from all ranks' logits, of which each tells the others its blocks' largest and sums alone."""
        model, rows, group = self.model, self.rows, self.model.group
        logits = model.shard_logits(hidden, self._logits[: len(hidden)])
        tops, places, sums = sampled_blocks(logits, step.sample_rows, rows.temperatures)
        own = torch.stack((tops.view(torch.int32), places + model.first_token, sums.view(torch.int32)))
        number = 1 + 2 * model.config.num_layers
        # [3, sampled, blocks of all ranks]
        every = self._of_ranks(own, number).permute(1, 2, 0, 3).flatten(2).contiguous()
        blocks = every[0].view(torch.float32), every[1], every[2].view(torch.float32)
        state = rows.temperatures, rows.seeds, rows.tokens, rows.computed, out
        first_block = group.shard.rank * tops.shape[1]
        draw_rows(logits, step.sample_rows, last, positions, *state, blocks, first_block, True)
        # All but the rank on whose tokens a draw falls have none.
        sampled = torch.amax(self._of_ranks(out[: len(logits)], 1 + number), 0, out=out[: len(logits)])
        rows.tokens.index_copy_(0, step.sample_rows.long(), sampled.clamp(min=0))
        return logits

    def _of_ranks(self, x: Tensor, number: int) -> Tensor:
        """All ranks' `x` of int32, one behind another: [ranks, *x.shape]; after the step's sums, the `number`-th."""
        if self._sums is None or not self._sums.has_words(x.numel()):
            return self.model.group.gather(x)
        one = self._sums.words(number, x.numel())
        one.own.copy_(x.reshape(-1))
        return gather_peers(one).view(-1, *x.shape)


class ShardedGraphRunner(GraphRunner):
    """Runs a rank's part of steps over CUDA graphs.

    Rank 0's tells the others what it tells its own device: what changes of the rows that lie there, and the numbers of
    the step. Steps sample greedily and by temperature; rows that ask for more are sampled behind them by rank 0, from
    logits that are gathered for them alone.

    Args:
        ranks: the others, of rank 0; None is for one of them.
    """

    # Threads of NCCL look at its events while a step is captured.
    _ERROR_MODE = "thread_local"
    _DECODER = ShardedFusedDecoder
    model: ShardedDecoder

    def __init__(self, model: ShardedDecoder, config: RunnerConfig, ranks: Ranks | None):
        super().__init__(model, config)
        self._ranks = ranks
        if ranks is not None:
            self._queue = CudaQueue(self.device, ranks.check)
        # NCCL does not end before the graphs that it is in, so they go first, whether or not this is closed.
        self._forget_graphs = weakref.finalize(self, self._graphs.clear)

    @staticmethod
    def _samples_itself(params: SamplingParams) -> bool:
        """Does a step sample as `params` ask for?"""
        keeps_all = params.top_k <= 0 and params.top_p >= 1.0 and params.min_p <= 0.0
        return is_plain(params) and (keeps_all or params.temperature < GREEDY_BELOW)

    def capture(self) -> None:
        """Have all ranks capture their graphs, unless that was done."""
        if self._ranks is not None and not self._graphs:
            self._ranks.tell("capture")
        super().capture()

    def fill_cache(self, seed: int) -> None:
        """Have all ranks fill their pools with noise."""
        if self._ranks is not None:
            self._ranks.tell("fill_cache", seed)
        super().fill_cache(seed)

    def close(self) -> None:
        """Wait for what was launched, and drop the graphs."""
        super().close()
        self._forget_graphs()

    def follow(self, step: GraphStep) -> Step:
        """Start the part of a step of a rank that is told of it."""
        return self._queue.submit(lambda: self._follow(step))

    def _follow(self, step: GraphStep) -> Tensor:
        """The tokens of a step, whose part is computed as rank 0 computes its own."""
        logits, group = self._computed(step), self.model.group
        if step.prompt_places:
            prompt_places = to_device(torch.tensor(step.prompt_places), self.device)
            for some in prompt_places.split(PromptLogprobs.AT_ONCE):
                self.model.logits(self._decoder.hidden[some])
        if step.special[0]:
            places, rows = (to_device(torch.tensor(numbers), self.device) for numbers in step.special)
            self._whole(logits[places])
            tokens = group.from_first(torch.empty(len(places), dtype=torch.int64, device=self.device))
            self._put(tokens, places, rows)
        return self._out

    def _run(self, *step: Any) -> Tensor:
        assert self._ranks is not None
        with self._ranks.failing_together():
            return super()._run(*step)

    def _tell(self, step: GraphStep) -> None:
        assert self._ranks is not None
        self._ranks.tell("follow", step)

    def _whole(self, logits: Tensor) -> Tensor:
        return self.model.gathered(logits)

    def _put(self, tokens: Tensor, places: Tensor, rows: Tensor) -> None:
        if self._ranks is not None:
            self.model.group.from_first(tokens)
        super()._put(tokens, places, rows)
