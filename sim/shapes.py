"""Model shapes: what a decoder-only transformer reads, computes and keeps for each token, from its configuration."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import twinserve
from twinserve.settings.errors import InputError
from twinserve.traces.lines import json_file

DENSE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "ernie4_5",
    "exaone4",
    "gemma",
    "glm",
    "glm4",
    "granite",
    "hunyuan_v1_dense",
    "olmo",
    "olmo2",
    "phi3",
    "seed_oss",
    "smollm3",
)
"""transformers' `model_type` of decoders with grouped-query attention over all tokens and a gated feed-forward network
in every layer."""
_MOST = 1 << 24
"""No size of a model is larger by far."""
SHAPES_FOLDER = Path(twinserve.__file__).parent / "data" / "shapes"
"""A folder a common shape with the config.json of its model; the engine makes models of random weights of them."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with grouped-query attention and a gated feed-forward network.

    Attributes:
        tied: the output projection is the embedding, so it is stored once.
        bytes_per_value: of a weight and of a key's or value's element; 2 for bfloat16.
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool = False
    bytes_per_value: int = 2

    @property
    def layer_matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's projections: QKV, output, gate and up, down."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return [(hidden, heads + 2 * kv_heads), (heads, hidden), (hidden, 2 * inner), (inner, hidden)]

    @property
    def num_parameters(self) -> int:
        """Weights of projections and embeddings; norms are left out."""
        layer = sum(inputs * outputs for inputs, outputs in self.layer_matrices)
        return self.num_layers * layer + self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token's keys and values take in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_value

    def as_dict(self) -> dict[str, Any]:
        """The sizes by name."""
        return asdict(self)

    @classmethod
    def of_facts(cls, name: str, facts: dict[str, Any]) -> ModelShape:
        """The shape that an engine's facts describe."""
        sizes = {field.name: facts[field.name] for field in fields(cls) if type(facts.get(field.name)) is int}
        return cls(name, **sizes, tied=facts["tie_word_embeddings"])

    @classmethod
    def load(cls, path: Path) -> ModelShape:
        """The shape that a Hugging Face config.json, or the folder that holds one, describes.

        Raises:
            InputError: it cannot be read, or lacks a size.
        """
        path = path / "config.json" if os.path.isdir(path) else path
        config = json_file(path)
        if not isinstance(config, dict):
            raise InputError("expected a JSON object", path=path)
        _check_kind(config, path)
        sizes: dict[str, int] = {}
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            value = config.get(field)
            if type(value) is not int or not 1 <= value <= _MOST:
                raise InputError(f"expected an integer from 1 to {_MOST}", path=path, field=field, value=value)
            sizes[field] = value
        heads = sizes["num_attention_heads"]
        return cls(
            path.parent.name or path.stem,
            sizes["vocab_size"],
            sizes["hidden_size"],
            sizes["intermediate_size"],
            sizes["num_hidden_layers"],
            heads,
            _size(config, "num_key_value_heads", path) or heads,
            _size(config, "head_dim", path) or max(1, sizes["hidden_size"] // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
        )


def _size(config: dict[str, Any], field: str, path: Path) -> int | None:
    """A size that a configuration need not say."""
    value = config.get(field)
    if value is not None and (type(value) is not int or not 1 <= value <= _MOST):
        raise InputError(f"expected an integer from 1 to {_MOST}", path=path, field=field, value=value)
    return value


def _check_kind(config: dict[str, Any], path: Path) -> None:
    """Refuse a model that is no dense decoder with keys and values of all tokens in every layer.

    Raises:
        InputError: it is of another kind, or of one that nobody has looked at.
    """
    if isinstance(config.get("text_config"), dict):
        raise InputError("expected a model of text alone: its sizes lie in text_config", path=path, field="text_config")
    for name, value in config.items():
        if "experts" in name and value:
            raise InputError("expected none: mixtures of experts are not supported", path=path, field=name, value=value)
    if config.get("model_type", "llama") not in DENSE:
        expected = f"expected a dense decoder: {', '.join(DENSE)}"
        raise InputError(expected, path=path, field="model_type", value=config["model_type"])
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise InputError("expected full_attention in every layer", path=path, field="layer_types", value=kinds)


SHAPES = {
    shape.name: shape
    for folder in sorted(SHAPES_FOLDER.iterdir())
    for shape in [replace(ModelShape.load(folder), name=folder.name.removesuffix("-shape"))]
}
"""Common shapes, as the config.json of each model on the Hugging Face hub has them (Mistral 7B: v0.3)."""
