"""Which runner runs a rank's part of the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.sharded_decoder import ShardedDecoder
from twinserve.engine.parallel.ranks import Ranks
from twinserve.engine.parallel.runner import ShardedRunner

if TYPE_CHECKING:
    from twinserve.engine.graphs.graph_runner import GraphRunner


def make_runner(
    decoder: Decoder, config: RunnerConfig, tokenizer: Any, ranks: Ranks | None
) -> ShardedRunner | GraphRunner:
    """What runs a rank's part of the steps.

    Args:
        ranks: the others, of rank 0; None is for one of them.
    """
    assert isinstance(decoder, ShardedDecoder), decoder
    if config.attention.graphs:
        from twinserve.engine.parallel.graph_runner import ShardedGraphRunner

        return ShardedGraphRunner(decoder, config, ranks)
    return ShardedRunner(
        decoder,
        tokenizer,
        decoder.device,
        ranks=ranks,
        num_blocks=config.num_blocks,
        block_size=config.settings.block_size,
        attention=cast(Literal["flash", "sdpa"], config.attention.name),
        seed=config.options.seed,
    )
