"""ModelConfig: the shape of a decoder, read from a Hugging Face config and refused where it asks for more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinserve.traces.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """What an architecture's name says beyond the fields of its config.

    Attributes:
        qk_norm: each head's query and key are normalised before the rotation.
        sliding_window: the window where the config has no such field; None attends to everything.
    """

    qk_norm: bool = False
    sliding_window: int | None = None


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(sliding_window=4096),
    "Qwen3ForCausalLM": Architecture(qk_norm=True),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated SiLU.

    Attributes:
        num_heads: query heads; each group of `num_heads / num_kv_heads` of them shares a key-value head.
        qk_norm: each head's query and key are normalised before the rotation (Qwen3).
        attention_bias: the four projections of the attention have a bias.
        tie_word_embeddings: the output projection is the embedding.
        eos_token_ids: any of them ends a text.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qk_norm: bool = False
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """The config of a Hugging Face folder; `generation_config.json` adds its end-of-sequence ids.

        Raises:
            InputError: a file cannot be read, or asks for something that is not honoured.
        """
        path = folder / "config.json"
        values = read_json(path)
        generation = folder / "generation_config.json"
        more_ids = read_json(generation).get("eos_token_id") if generation.exists() else None
        architectures = values.get("architectures") or [None]
        return cls.from_fields(values, architectures[0], path, more_eos=more_ids)

    @classmethod
    def from_fields(
        cls, values: Mapping[str, Any], architecture: object, path: object, *, more_eos: object = None
    ) -> ModelConfig:
        """The config from Hugging Face's field names.

        Args:
            architecture: the name of the model's class.
            path: what to name in an error.
            more_eos: an id, or a list of ids, that ends a text beside `eos_token_id`.

        Raises:
            InputError: a field is missing, malformed, or asks for something that is not honoured.
        """
        fields = _Fields(values, path)
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise InputError(f"expected one of {known}", path=path, field="architectures", value=architecture)
        kind = ARCHITECTURES[str(architecture)]
        max_positions = fields.positive("max_position_embeddings")
        fields.refuse_unhonoured(kind, max_positions)
        hidden_size, num_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
        num_kv_heads = fields.positive("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"expected a divisor of num_attention_heads ({num_heads})")
        head_dim = fields.positive("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise fields.error("head_dim", "expected an even number, as rotary positions pair its halves")
        return cls(
            vocab_size=fields.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size"),
            num_layers=fields.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=fields.rope_theta(),
            qk_norm=kind.qk_norm,
            attention_bias=fields.switch("attention_bias"),
            tie_word_embeddings=fields.switch("tie_word_embeddings"),
            eos_token_ids=tuple(dict.fromkeys((*fields.ids("eos_token_id"), *_as_ids(more_eos)))),
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from error
    except ValueError as error:
        raise InputError(f"expected JSON: {error}", path=path) from error
    if not isinstance(values, dict):
        raise InputError("expected a JSON object", path=path)
    return values


def _as_ids(value: object) -> tuple[int, ...]:
    """Token ids from an id, a list of them or None."""
    ids = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    return tuple(int(token_id) for token_id in ids)


class _Fields:
    """Reads fields of a config, and says in one line what is wrong with one."""

    def __init__(self, values: Mapping[str, Any], path: object):
        self._values, self._path = values, path

    def error(self, field: str, expected: str) -> InputError:
        return InputError(expected, path=self._path, field=field, value=self._values.get(field))

    def positive(self, field: str, default: int | None = None) -> int:
        value = self._values.get(field)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise self.error(field, "expected an integer >= 1")
        return value

    def number(self, field: str, default: float) -> float:
        value = self._values.get(field, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.error(field, "expected a number > 0")
        return float(value)

    def switch(self, field: str) -> bool:
        value = self._values.get(field) or False
        if value is not True and value is not False:
            raise self.error(field, "expected true or false")
        return value

    def ids(self, field: str) -> tuple[int, ...]:
        try:
            return _as_ids(self._values.get(field))
        except (TypeError, ValueError) as error:
            raise self.error(field, "expected a token id or a list of them") from error

    def rope_theta(self) -> float:
        """The base of the rotation; any scaling of positions is refused."""
        theta = self.number("rope_theta", 10000.0)
        for field in ("rope_parameters", "rope_scaling"):
            rope = self._values.get(field)
            if rope is None:
                continue
            kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
            if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
                raise self.error(field, 'expected none, or rope_type "default": scaled positions are not supported')
            theta = float(rope.get("rope_theta", theta))
        return theta

    def refuse_unhonoured(self, kind: Architecture, max_positions: int) -> None:
        """Raise InputError for what would change the numbers and is not implemented."""
        values = self._values
        if values.get("hidden_act", "silu") != "silu":
            raise self.error("hidden_act", 'expected "silu"')
        if values.get("quantization_config"):
            raise self.error("quantization_config", "expected none: quantized checkpoints are not supported")
        if values.get("mlp_bias"):
            raise self.error("mlp_bias", "expected false")
        if values.get("partial_rotary_factor", 1.0) != 1.0:
            raise self.error("partial_rotary_factor", "expected 1.0")
        window = values.get("sliding_window", kind.sliding_window)
        windowed = values.get("use_sliding_window", window is not None) and window is not None
        if windowed and window < max_positions:
            expected = f"expected null, or at least max_position_embeddings ({max_positions})"
            raise InputError(expected, path=self._path, field="sliding_window", value=window)
        if any(layer != "full_attention" for layer in values.get("layer_types") or ()):
            raise self.error("layer_types", 'expected "full_attention" in every layer')
