"""ModelSource: a model as it was given, and all that is known of it before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twinserve.engine.models.config import ModelConfig
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.dummy import dummy_model, shape_folder
from twinserve.engine.models.loader import DTYPES, adopt_model, config_of, load_model
from twinserve.engine.options import EngineOptions
from twinserve.settings.errors import InputError


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded.

    Attributes:
        config: its shape.
        dtype: that its weights will have.
        load: loads the weights.
        tokenizer: None if it has none.
    """

    config: ModelConfig
    dtype: torch.dtype
    load: Callable[[], Decoder]
    tokenizer: Any = None

    @classmethod
    def of(cls, model: str | Path | nn.Module, options: EngineOptions, tokenizer: Any = None) -> ModelSource:
        """A model as `LLM` takes it.

        Args:
            tokenizer: for a model given as a module; a folder's is found in it.

        Raises:
            InputError: the model, or an option for it, cannot be used.
        """
        dtype = DTYPES[options.dtype]
        how: dict[str, Any] = {"dtype": dtype, "device": options.device, "quantization": options.quantization}
        if isinstance(model, nn.Module):
            if options.load_format == "dummy":
                raise InputError("expected auto: the model has its weights", field="load_format", value="dummy")
            if isinstance(model, Decoder):
                _check_quantization(model, options)
                return cls(model.config, model.dtype, partial(model.to, options.device), tokenizer)
            return cls(config_of(model), dtype, partial(adopt_model, model, **how), tokenizer)
        if options.load_format == "dummy":
            shape = shape_folder(model)
            load = partial(dummy_model, shape, seed=options.seed, **how)
            return cls(ModelConfig.load(shape), dtype, load, load_tokenizer(Path(model)))
        folder = Path(model)
        return cls(ModelConfig.load(folder), dtype, partial(load_model, folder, **how), load_tokenizer(folder))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, the tokenizer's own first."""
        ids = (getattr(self.tokenizer, "eos_token_id", None), *self.config.eos_token_ids)
        return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _check_quantization(model: Decoder, options: EngineOptions) -> None:
    """Refuse an option that says otherwise than a Decoder is."""
    if "quantization" in options.model_fields_set and options.quantization != model.quantization:
        problem = f"expected {model.quantization}, as the Decoder is; quantize_decoder makes it int8"
        raise InputError(problem, field="quantization", value=options.quantization)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None if it has none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
