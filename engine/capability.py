"""What a CUDA device can compute with; asked before a model is loaded for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from twinserve.engine.float8 import FLOAT8
from twinserve.engine.options import Quantization
from twinserve.settings.errors import InputError

BFLOAT16_FROM = (8, 0)
FLOAT8_FROM = (8, 9)


@dataclass(frozen=True)
class Capability:
    """What is known of a CUDA device.

    Attributes:
        name: the card's.
        level: its compute capability.
        shared_bytes: shared memory that a block of threads may have, at most.
    """

    name: str
    level: tuple[int, int]
    shared_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Capability:
        """That of a CUDA device."""
        properties: Any = torch.cuda.get_device_properties(device)
        return cls(properties.name, (properties.major, properties.minor), properties.shared_memory_per_block_optin)

    def check_formats(self, dtype: torch.dtype, kv_cache_dtype: torch.dtype, quantization: Quantization) -> None:
        """Refuse numbers that this device has no instructions for.

        Args:
            dtype: of weights, and of what layers give.
            quantization: of weights.

        Raises:
            InputError: it has none for these.
        """
        if dtype == torch.bfloat16 and self.level < BFLOAT16_FROM:
            problem = f"expected float16 or float32: {self._lacks('bfloat16', BFLOAT16_FROM)}"
            raise InputError(problem, field="dtype", value="bfloat16")
        if kv_cache_dtype == FLOAT8 and self.level < FLOAT8_FROM:
            problem = f"expected auto: {self._lacks('float8', FLOAT8_FROM)}"
            raise InputError(problem, field="kv_cache_dtype", value="fp8")
        if quantization == "fp8" and self.level < FLOAT8_FROM:
            problem = f"expected weights of 16 bits, or int8: {self._lacks('float8', FLOAT8_FROM)}"
            raise InputError(problem, field="quantization", value="fp8")
        if quantization == "fp8" and dtype != torch.bfloat16:
            problem = "expected bfloat16 with float8 weights on CUDA, as their products are"
            raise InputError(problem, field="dtype", value=str(dtype).removeprefix("torch."))

    def check_shared_memory(self, needed: int, head_dim: int) -> None:
        """Refuse heads for which the kernels of attention need more shared memory than there is.

        Raises:
            InputError: they do.
        """
        if needed > self.shared_bytes:
            problem = (
                f"expected smaller heads for triton: its attention needs {needed:,} bytes of shared memory, "
                f"and {self.name} has {self.shared_bytes:,}"
            )
            raise InputError(problem, field="head_dim", value=head_dim)

    def _lacks(self, what: str, level: tuple[int, int]) -> str:
        own, least = (".".join(map(str, one)) for one in (self.level, level))
        return f"{self.name} has compute capability {own}, and {what} begins with {least}"
