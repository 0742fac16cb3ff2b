"""KVCache: the keys and values of every layer in blocks of a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twinserve.traces.errors import InputError

if TYPE_CHECKING:
    # The models' package imports layers, and these import this module.
    from twinserve.engine.models.config import ModelConfig

CPU_BUDGET_BYTES = 1 << 30
CUDA_BUDGET_SHARE = 0.8


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
    memory_share: float = CUDA_BUDGET_SHARE,
) -> int:
    """Blocks that fit the default budget: 1 GiB of a CPU's memory, or `memory_share` of what a CUDA device has free.

    The weights are on the device by then; the rest is left for what steps need for a while.

    Raises:
        InputError: `memory_share` is not between 0 and 1.
    """
    if not 0 < memory_share < 1:
        raise InputError("expected a number between 0 and 1", field="kv_memory_share", value=memory_share)
    device = torch.device(device)
    budget = memory_share * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else CPU_BUDGET_BYTES
    return max(1, int(budget) // bytes_per_block(config, block_size, dtype))
