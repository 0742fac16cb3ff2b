"""How many blocks the KV pool has where nobody says: what fits a budget beside the weights and the largest step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.kv_cache import bytes_per_block
from twinserve.engine.models.config import ModelConfig
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.sharded_decoder import ShardedDecoder
from twinserve.engine.options import GPU_MEMORY_UTILIZATION
from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST_BLOCKS

if TYPE_CHECKING:
    from twinserve.engine.graphs.graph_runner import GraphRunner

CPU_BUDGET_BYTES = 1 << 30


def with_pool(config: RunnerConfig, decoder: Decoder, drafting: Decoder | None = None) -> RunnerConfig:
    """`config` with a pool that fits beside the weights of `decoder`, unless it has one; a model that drafts has as
    many blocks of its own. Ranks that share a model have as many as fit on each of their devices.

    Raises:
        InputError: `gpu_memory_utilization` leaves nothing.
    """
    if config.settings.num_gpu_blocks is not None:
        return config
    step_bytes = None
    if config.attention.graphs and config.settings.speculative_config is None:
        step_bytes = _graph_runner(decoder, config.with_blocks(1)).step_bytes()
    num_blocks = default_num_blocks(
        decoder.config,
        config.settings.block_size,
        config.kv_cache_dtype,
        decoder.device,
        config.options.gpu_memory_utilization,
        step_bytes,
        0 if drafting is None else bytes_per_block(drafting.config, config.settings.block_size, drafting.dtype),
    )
    if isinstance(decoder, ShardedDecoder):
        num_blocks = decoder.group.least(num_blocks, decoder.device)
    return config.with_blocks(num_blocks)


def _graph_runner(decoder: Decoder, config: RunnerConfig) -> GraphRunner:
    """A runner of graphs, or of a rank's part of them."""
    if isinstance(decoder, ShardedDecoder):
        from twinserve.engine.parallel.graph_runner import ShardedGraphRunner

        return ShardedGraphRunner(decoder, config, None)
    from twinserve.engine.graphs.graph_runner import GraphRunner

    return GraphRunner(decoder, config)


def default_num_blocks(
    config: ModelConfig,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    step_bytes: int | None = None,
    more_block_bytes: int = 0,
) -> int:
    """Blocks that fit the default budget, 1 GiB of a CPU's memory or what a CUDA device has left, and the settings.

    That is `gpu_memory_utilization` of all its memory, less what is taken already, the weights among it, and less what
    the largest step needs for a while.

    Args:
        step_bytes: of the largest step, where it was measured; None takes a tenth of what is left.
        more_block_bytes: of what another model keeps for each block.

    Raises:
        InputError: `gpu_memory_utilization` leaves nothing.
    """
    device, block_bytes = torch.device(device), bytes_per_block(config, block_size, dtype) + more_block_bytes
    if device.type != "cuda":
        return min(max(1, CPU_BUDGET_BYTES // block_bytes), MOST_BLOCKS)
    free, total = torch.cuda.mem_get_info(device)
    budget = gpu_memory_utilization * total - (total - free)
    num_blocks = int(budget - (budget / 10 if step_bytes is None else step_bytes)) // block_bytes
    if num_blocks < 1:
        problem = f"expected more: of {total:,} bytes {total - free:,} are taken, and nothing is left for KV"
        raise InputError(problem, field="gpu_memory_utilization", value=gpu_memory_utilization)
    return min(num_blocks, MOST_BLOCKS)
