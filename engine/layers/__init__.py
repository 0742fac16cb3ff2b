"""Layers whose implementation is chosen by device."""

from twinserve.engine.layers.attention import AttentionBackend, FlashAttention, PagedAttention, StepRows
from twinserve.engine.layers.choice import AttentionChoice, choose_attention
from twinserve.engine.layers.sdpa import SdpaAttention

__all__ = [
    "AttentionBackend",
    "AttentionChoice",
    "FlashAttention",
    "PagedAttention",
    "SdpaAttention",
    "StepRows",
    "choose_attention",
]
