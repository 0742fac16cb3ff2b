"""Layers whose implementation is chosen by device."""

from twinserve.engine.layers.attention import AttentionBackend, AttentionMetadata, FlashAttention, PagedAttention
from twinserve.engine.layers.choice import AttentionChoice, choose_attention
from twinserve.engine.layers.sdpa import SdpaAttention

__all__ = [
    "AttentionBackend",
    "AttentionChoice",
    "FlashAttention",
    "PagedAttention",
    "SdpaAttention",
    "AttentionMetadata",
    "choose_attention",
]
