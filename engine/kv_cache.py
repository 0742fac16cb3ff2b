"""KVCache: the keys and values of every layer in blocks of a pool."""

from __future__ import annotations

import torch
from torch import Tensor

from twinserve.engine.models.config import ModelConfig
from twinserve.settings.errors import InputError


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
