"""Models of a real shape with random weights: what a step costs hangs on the shape, not on what the weights say."""

from __future__ import annotations

from pathlib import Path

import torch

import twinserve
from twinserve.engine.models.config import ModelConfig
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.loader import random_model
from twinserve.engine.options import Quantization
from twinserve.engine.parallel.group import Group
from twinserve.settings.errors import InputError

SHAPES = Path(twinserve.__file__).parent / "data" / "shapes"


def shape_names() -> list[str]:
    """The shapes that ship: Hugging Face folders without weights."""
    return sorted(folder.name for folder in SHAPES.iterdir())


def shape_folder(model: str | Path) -> Path:
    """The folder with the config.json of a shape.

    Args:
        model: a shape that ships, or a folder with config.json.

    Raises:
        InputError: it is neither.
    """
    if str(model) in shape_names():
        return SHAPES / str(model)
    if not Path(model).is_dir():
        problem = f"expected {', '.join(shape_names())}, or a folder with config.json, for random weights"
        raise InputError(problem, field="model", value=str(model))
    return Path(model)


def dummy_model(
    model: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    group: Group | None = None,
) -> Decoder:
    """A Decoder of a shape with random weights.

    Args:
        model: as `shape_folder` takes it.
        quantization, group: as `random_model` takes them.

    Raises:
        InputError: there is no such shape, or its config asks for something that is not honoured.
    """
    config = ModelConfig.load(shape_folder(model))
    return random_model(config, seed=seed, dtype=dtype, device=device, quantization=quantization, group=group)
