"""Which attention backend serves a model on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch

from twinserve.engine.layers.attention import AttentionBackend, FlashAttention
from twinserve.engine.layers.sdpa import SdpaAttention
from twinserve.traces.errors import InputError

BACKENDS: dict[str, type[AttentionBackend]] = {"flash": FlashAttention, "sdpa": SdpaAttention}


@dataclass(frozen=True)
class AttentionChoice:
    """An attention backend that can serve.

    Attributes:
        name: "flash" or "sdpa".
        block_size: tokens in a block.
        reason: why it was chosen, in words.
    """

    name: Literal["flash", "sdpa"]
    block_size: int
    reason: str

    def make(self) -> AttentionBackend:
        """The backend."""
        return BACKENDS[self.name]()


def choose_attention(
    wanted: str, head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int | None = None
) -> AttentionChoice:
    """The attention backend that was asked for; for "auto", flash where it can serve, else sdpa.

    Args:
        wanted: "auto", "flash" or "sdpa".
        block_size: tokens in a block; None leaves it to the backend.

    Raises:
        InputError: there is no such backend, or it cannot serve this model, device or block size.
    """
    if wanted == "auto":
        try:
            flash = choose_attention("flash", head_dim, dtype, device, block_size)
        except InputError as refusal:
            return replace(choose_attention("sdpa", head_dim, dtype, device, block_size), reason=str(refusal))
        number_format = str(dtype).removeprefix("torch.")
        return replace(flash, reason=f"the fastest for {number_format}, heads of {head_dim} and this device")
    if wanted not in BACKENDS:
        raise InputError(f"expected one of auto, {', '.join(BACKENDS)}", field="attention", value=wanted)
    backend = BACKENDS[wanted]
    block_size = block_size or backend.default_block_size
    backend.check(head_dim, dtype, device, block_size)
    return AttentionChoice(cast(Literal["flash", "sdpa"], wanted), block_size, "asked for")
