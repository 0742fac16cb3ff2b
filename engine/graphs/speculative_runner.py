"""GraphSpeculativeRunner: steps with drafts on CUDA, by fused kernels, captured where they can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.forward import Forward
from twinserve.engine.graphs.flat_steps import FlatSteps
from twinserve.engine.kv_cache import KVCache
from twinserve.engine.layers.choice import choose_attention
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.speculation.proposers import DraftModel, Proposer
from twinserve.engine.speculation.runner import SpeculativeRunner
from twinserve.settings.errors import InputError


class GraphSpeculativeRunner(SpeculativeRunner):
    """A SpeculativeRunner whose model, and the one that drafts for it, are FlatSteps. Sampling and verifying are those
    of SpeculativeRunner, behind the graph.

    Args:
        config: as of GraphRunner.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        config: RunnerConfig,
        make_proposer: Callable[[SpeculativeRunner], Proposer | DraftModel],
    ):
        settings, speculative = config.settings, config.settings.speculative_config
        assert speculative is not None
        self._config, self._most_drafts = config, speculative.num_speculative_tokens
        self._all_steps: list[FlatSteps] = []
        super().__init__(
            model,
            tokenizer,
            model.device,
            num_blocks=config.num_blocks,
            block_size=settings.block_size,
            seed=config.options.seed,
            make_proposer=make_proposer,
            max_model_len=config.max_model_len,
            is_async=settings.pipeline_depth > 0,
            acceptance_rate=speculative.synthetic_acceptance_rate,
        )
        self._forward = self._steps = self._steps_of(self.model, self._cache, 1 + self._most_drafts)

    def forward_of(self, model: Decoder) -> Forward:
        shape, name = model.config, self._config.attention.name
        group = shape.num_heads // shape.num_kv_heads
        try:
            choose_attention(name, shape.head_dim, model.dtype, self.device, self.block_size, "graphs", group)
        except InputError:
            return super().forward_of(model)
        # A row that drafts computes its last token again, before a run of at most one more than the drafts.
        return self._steps_of(model, self._cache_for(model), 2 + self._most_drafts, follows=True)

    def _steps_of(self, model: Decoder, cache: KVCache, most_single: int, *, follows: bool = False) -> FlatSteps:
        self._all_steps.append(FlatSteps(model, cache, self._config, most_single, follows=follows))
        return self._all_steps[-1]

    def kernel_facts(self) -> dict[str, Any]:
        return self._steps.kernel_facts() | super().kernel_facts()

    def fill_cache(self, seed: int) -> None:
        """Fill the pools with noise, see `KVCache.fill`."""
        for steps in self._all_steps:
            steps.cache.fill(seed)

    def capture(self) -> None:
        """Capture the graphs, unless that was done.

        Raises:
            InputError: they do not fit the memory that is left.
        """
        for steps in self._all_steps:
            steps.capture()
