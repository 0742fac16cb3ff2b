"""ModelSource: a model as it was given, and all that is known of it before its weights are loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twinserve.engine.models.config import ModelConfig, read_json
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.dummy import dummy_model, shape_folder
from twinserve.engine.models.loader import DTYPES, adopt_model, config_of, load_model, quantization_of
from twinserve.engine.options import EngineOptions, Quantization
from twinserve.settings.errors import InputError

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The sampling parameters that a generation config may have."""


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded.

    Attributes:
        config: its shape.
        dtype: that its weights will have, those aside that are quantized.
        quantization: that its weights will have.
        load: loads the weights; with `device=` and `group=`, the part of a rank.
        tokenizer: None if it has none.
        sampling_defaults: those of SAMPLING that its generation_config.json says.
        is_splittable: `load` can load the part of a rank.
    """

    config: ModelConfig
    dtype: torch.dtype
    quantization: Quantization
    load: Callable[..., Decoder]
    tokenizer: Any = None
    sampling_defaults: dict[str, float] = field(default_factory=dict)
    is_splittable: bool = True

    @classmethod
    def of(cls, model: str | Path | nn.Module, options: EngineOptions, tokenizer: Any = None) -> ModelSource:
        """A model as `LLM` takes it.

        Args:
            tokenizer: for a model given as a module; a folder's is found in it.

        Raises:
            InputError: the model, or an option for it, cannot be used.
        """
        how: dict[str, Any] = {"device": options.device, "quantization": options.quantization}
        if isinstance(model, nn.Module):
            if options.load_format == "dummy":
                raise InputError("expected auto: the model has its weights", field="load_format", value="dummy")
            if isinstance(model, Decoder):
                _check_decoder(model, options)
                load = partial(model.to, options.device)
                return cls(model.config, model.dtype, model.quantization, load, tokenizer, is_splittable=False)
            config = config_of(model)
            dtype = _dtype(options, _name(next(model.parameters()).dtype))
            load = partial(adopt_model, model, dtype=dtype, **how)
            return cls(config, dtype, options.quantization, load, tokenizer)
        folder = shape_folder(model) if options.load_format == "dummy" else Path(model)
        config = ModelConfig.load(folder)
        dtype, quantization = _dtype(options, config.checkpoint_dtype), quantization_of(config, options.quantization)
        if options.load_format == "dummy":
            load = partial(dummy_model, folder, seed=options.seed, dtype=dtype, **how)
            return cls(config, dtype, quantization, load, load_tokenizer(Path(model)))
        load = partial(load_model, folder, dtype=dtype, **how)
        return cls(config, dtype, quantization, load, load_tokenizer(folder), _sampling_defaults(folder))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, the tokenizer's own first."""
        ids = (getattr(self.tokenizer, "eos_token_id", None), *self.config.eos_token_ids)
        return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _dtype(options: EngineOptions, own: str | None) -> torch.dtype:
    """What the weights will be in; `own` is what they are in, None where nobody says, which is float32.

    Raises:
        InputError: that is left to the checkpoint, and no model can be served in its dtype.
    """
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    if options.device == "cpu":
        return torch.float32
    if own is not None and own not in DTYPES:
        problem = f"expected {', '.join(DTYPES)}, as the checkpoint has {own}"
        raise InputError(problem, field="dtype", value="auto")
    return DTYPES[own or "float32"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_decoder(model: Decoder, options: EngineOptions) -> None:
    """Refuse an option that says otherwise than a Decoder is."""
    if options.dtype != "auto" and DTYPES[options.dtype] != model.dtype:
        raise InputError(f"expected {_name(model.dtype)}, as the Decoder is", field="dtype", value=options.dtype)
    if "quantization" in options.model_fields_set and options.quantization != model.quantization:
        problem = f"expected {model.quantization}, as the Decoder is; quantize_decoder quantizes it"
        raise InputError(problem, field="quantization", value=options.quantization)


def _sampling_defaults(folder: Path) -> dict[str, float]:
    """What a folder's generation_config.json says of sampling.

    Raises:
        InputError: it cannot be read, or says something else than a number.
    """
    path = folder / "generation_config.json"
    said = read_json(path) if path.exists() else {}
    found = {name: said[name] for name in SAMPLING if said.get(name) is not None}
    for name, value in found.items():
        if type(value) not in (int, float):
            raise InputError("expected a number", path=path, field=name, value=value)
    return found


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None if it has none.

    Raises:
        InputError: there is one, and it cannot be loaded.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of transformers, tokenizers and what they import: any
        needs = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
        if needs and importlib.util.find_spec("sentencepiece") is None:
            problem = "needs the package sentencepiece: pip install 'twinserve[engine]'"
            raise InputError(problem, path=folder / "tokenizer.model") from error
        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        path = next((folder / name for name in names if (folder / name).is_file()), folder)
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise InputError(f"expected a tokenizer that transformers can load: {reason}", path=path) from error
