"""Which attention backend serves a model on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch

from twinserve.engine.capability import Capability
from twinserve.engine.kernels.cuts import shared_bytes
from twinserve.engine.layers.attention import AttentionBackend, FlashAttention
from twinserve.engine.layers.sdpa import SdpaAttention
from twinserve.engine.options import Attention, Execution
from twinserve.settings.errors import InputError

BACKENDS: dict[str, type[AttentionBackend]] = {"flash": FlashAttention, "sdpa": SdpaAttention}

AttentionName = Literal["flash", "triton", "sdpa"]
TRITON_BLOCK_SIZE = 16


@dataclass(frozen=True)
class AttentionChoice:
    """An attention backend that can serve.

    Attributes:
        name: "flash", "sdpa", or, in graphs alone, "triton": the project's own kernels.
        block_size: tokens in a block.
        reason: why it was chosen, in words.
        graphs: steps are run as CUDA graphs.
    """

    name: AttentionName
    block_size: int
    reason: str
    graphs: bool = False

    def make(self) -> AttentionBackend:
        """The backend of steps that torch runs kernel by kernel."""
        return BACKENDS[self.name]()


def choose_attention(
    wanted: str,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int | None = None,
    execution: Execution = "eager",
    group: int = 1,
) -> AttentionChoice:
    """The attention backend that was asked for; for "auto", the fastest that can serve.

    Args:
        wanted: "auto", "flash", "triton" or "sdpa".
        block_size: tokens in a block; None leaves it to the backend.
        execution: "triton" runs in graphs alone, "sdpa" in none.
        group: query heads to a KV head.

    Raises:
        InputError: there is no such backend, or it cannot serve this model, device or block size.
    """
    if wanted not in get_args(Attention):
        raise InputError(f"expected one of {', '.join(get_args(Attention))}", field="attention", value=wanted)
    if execution == "graphs" or (execution == "auto" and wanted != "sdpa" and device.type == "cuda"):
        try:
            return _choose_in_graphs(wanted, head_dim, dtype, device, block_size, group)
        except InputError as refusal:
            if execution == "graphs" or wanted == "triton":
                raise
            eager = choose_attention(wanted, head_dim, dtype, device, block_size)
            return replace(eager, reason=f"{eager.reason}; no graphs: {refusal}")
    if wanted == "triton":
        raise InputError("expected graphs: triton runs in no other", field="execution", value=execution)
    if wanted == "auto":
        try:
            flash = choose_attention("flash", head_dim, dtype, device, block_size)
        except InputError as refusal:
            return replace(choose_attention("sdpa", head_dim, dtype, device, block_size), reason=str(refusal))
        number_format = str(dtype).removeprefix("torch.")
        return replace(flash, reason=f"the fastest for {number_format}, heads of {head_dim} and this device")
    backend = BACKENDS[wanted]
    block_size = block_size or backend.default_block_size
    backend.check(head_dim, dtype, device, block_size)
    return AttentionChoice(cast(AttentionName, wanted), block_size, "asked for")


def _choose_in_graphs(
    wanted: str, head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int | None, group: int
) -> AttentionChoice:
    """As `choose_attention`, for steps that are graphs: triton unless flash is asked for."""
    if device.type != "cuda":
        raise InputError("expected cuda: graphs run on NVIDIA GPUs", field="device", value=str(device))
    if find_spec("triton") is None:
        raise InputError("triton cannot be imported, expected triton >= 3.2", field="execution", value="graphs")
    if wanted == "sdpa":
        raise InputError("expected flash or triton: sdpa does not run in graphs", field="attention", value=wanted)
    # Prompts attend by triton with flash, too.
    capability = Capability.of(device)
    capability.check_shared_memory(shared_bytes(group, head_dim, dtype, capability.level), head_dim)
    if wanted == "flash":
        size = block_size or FlashAttention.default_block_size
        FlashAttention.check(head_dim, dtype, device, size)
        return AttentionChoice("flash", size, "asked for", True)
    size = block_size or TRITON_BLOCK_SIZE
    if size % 16:
        raise InputError("expected a multiple of 16 for triton", field="block_size", value=size)
    reason = "as fast as flash-attn on an H100, and for any dtype and any multiple of 16 tokens a block"
    return AttentionChoice("triton", size, "asked for" if wanted == "triton" else reason, True)
