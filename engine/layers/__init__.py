"""Layers whose implementation is chosen by device."""

from twinserve.engine.layers.attention import AttentionBackend, PagedAttention, SdpaAttention, StepRows

__all__ = ["AttentionBackend", "PagedAttention", "SdpaAttention", "StepRows"]
