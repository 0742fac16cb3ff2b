"""KVCache: the keys and values of every layer in blocks of a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twinserve.engine.options import GPU_MEMORY_UTILIZATION
from twinserve.traces.errors import InputError

if TYPE_CHECKING:
    # The models' package imports layers, and these import this module.
    from twinserve.engine.models.config import ModelConfig

CPU_BUDGET_BYTES = 1 << 30


class KVCache:
    """A pool of KV blocks. Slot s of a layer is place s % block_size of block s // block_size.

    Raises:
        InputError: the pool does not fit the device's memory.

    Attributes:
        keys, values: a tensor [num_blocks, block_size, kv_heads, head_dim] for each layer.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        # No slot is read before it is written. The zeros make the memory resident: a CPU's untouched pages would cost
        # faults within steps, and reading them (all one page of zeros) is ten times faster than reading real KV.
        try:
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
            self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        except RuntimeError as error:
            size = num_blocks * bytes_per_block(config, block_size, dtype)
            problem = f"expected fewer: {size:,} bytes of KV do not fit the memory of {device}"
            raise InputError(problem, field="num_gpu_blocks", value=num_blocks) from error

    def fill(self, seed: int) -> None:
        """Let every block hold the same noise, as real keys and values are no zeros."""
        shape = self.keys[0].shape[1:]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(shape, generator=generator).to(self.keys[0].device, self.keys[0].dtype)
        for pool in (*self.keys, *self.values):
            pool.copy_(noise.expand(pool.shape))

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Store `key` and `value` [tokens, kv_heads, head_dim] in the slots `slots` [tokens] of a layer."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of a block in all layers, keys and values."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def default_num_blocks(
    config: ModelConfig,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    step_bytes: int | None = None,
) -> int:
    """Blocks that fit the default budget: 1 GiB of a CPU's memory, or what a CUDA device has left.

    That is `gpu_memory_utilization` of all its memory, less what is taken already, the weights among it, and less what
    the largest step needs for a while.

    Args:
        step_bytes: of the largest step, where it was measured; None takes a tenth of what is left.

    Raises:
        InputError: `gpu_memory_utilization` leaves nothing.
    """
    device, block_bytes = torch.device(device), bytes_per_block(config, block_size, dtype)
    if device.type != "cuda":
        return max(1, CPU_BUDGET_BYTES // block_bytes)
    free, total = torch.cuda.mem_get_info(device)
    budget = gpu_memory_utilization * total - (total - free)
    num_blocks = int(budget - (budget / 10 if step_bytes is None else step_bytes)) // block_bytes
    if num_blocks < 1:
        problem = f"expected more: of {total:,} bytes {total - free:,} are taken, and nothing is left for KV"
        raise InputError(problem, field="gpu_memory_utilization", value=gpu_memory_utilization)
    return num_blocks
