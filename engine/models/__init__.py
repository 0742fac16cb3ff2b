"""Decoder models: their shapes, their weights and their forward pass."""

from twinserve.engine.models.config import ModelConfig
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.loader import adopt_model, load_model, random_model

__all__ = ["Decoder", "ModelConfig", "adopt_model", "load_model", "random_model"]
