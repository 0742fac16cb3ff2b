"""ModelConfig: the shape of a decoder, read from a Hugging Face config and refused where it asks for more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twinserve.engine.models.float8_checkpoint import is_float8
from twinserve.engine.models.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling, yarn_amplitude
from twinserve.settings.errors import InputError
from twinserve.settings.files import refuse_endless
from twinserve.traces.lines import json_file


@dataclass(frozen=True)
class Architecture:
    """What an architecture's name says beyond the fields of its config, as transformers reads it.

    Attributes:
        qk_norm: each head's query and key are normalised before the rotation.
        biases: the fields among "attention_bias" and "mlp_bias" that it knows.
        qkv_bias: the projections of queries, keys and values have a bias, whatever the config says.
        window: what `sliding_window` is to it: nothing ("none"), that of every layer ("all"), or, where
            `use_sliding_window` is true, that of the layers that `layer_types` or `max_window_layers` says ("some").
        defaults: what a field means that the config lacks, where that is more than what null means.
    """

    qk_norm: bool = False
    biases: frozenset[str] = frozenset()
    qkv_bias: bool = False
    window: Literal["none", "all", "some"] = "none"
    defaults: Mapping[str, Any] | None = None


_QWEN: dict[str, Any] = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(biases=frozenset({"attention_bias", "mlp_bias"})),
    "MistralForCausalLM": Architecture(window="all", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, window="some", defaults=_QWEN),
    "Qwen3ForCausalLM": Architecture(
        qk_norm=True, biases=frozenset({"attention_bias"}), window="some", defaults=_QWEN | {"head_dim": 128}
    ),
}

_NO_EXPERTS = "expected none: mixtures of experts are not supported"
UNHONOURED: dict[str, tuple[tuple[object, ...], str]] = {
    "hidden_act": (("silu",), 'expected "silu"'),
    "partial_rotary_factor": ((1.0,), "expected 1.0"),
    "compression_config": (({},), "expected none: quantized checkpoints say so in quantization_config"),
    "num_experts": ((0,), _NO_EXPERTS),
    "num_local_experts": ((0,), _NO_EXPERTS),
    "num_experts_per_tok": ((0,), _NO_EXPERTS),
    "n_routed_experts": ((0,), _NO_EXPERTS),
    "moe_intermediate_size": ((0,), _NO_EXPERTS),
}
"""Fields that would change the numbers and are not implemented: values that ask for nothing, and what is expected."""

_ROPE_FIELDS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"},
}
"""What each rope type takes beside its name and `rope_theta`."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated SiLU.

    Attributes:
        num_heads: query heads; each group of `num_heads / num_kv_heads` of them shares a key-value head.
        qk_norm: each head's query and key are normalised before the rotation (Qwen3).
        rope_scaling: how the rotation is slowed down for long contexts; None leaves it.
        attention_bias: the four projections of the attention have a bias.
        qkv_bias: those of queries, keys and values have one, whatever the fourth has (Qwen2).
        mlp_bias: the three projections of the feed-forward network have a bias.
        tie_word_embeddings: the output projection is the embedding.
        eos_token_ids: any of them ends a text.
        sliding_window: tokens that a token attends to in a layer with a window, itself among them; None where no layer
            has one, or none that hides anything.
        windowed_layers: the layers that have it.
        checkpoint_dtype: what the config says that the weights were saved in; None where it says nothing.
        is_float8: the weights of the checkpoint's linear layers are in float8; its dtype is that of the others.
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
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    checkpoint_dtype: str | None = None
    is_float8: bool = False

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest context, which the scaling of the rotation makes longer, by vLLM's rule for it."""
        return _longest(self.max_position_embeddings, self.rope_scaling)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """`sliding_window` for each layer that has it, None for each that has none."""
        return tuple(self.sliding_window if layer in self.windowed_layers else None for layer in range(self.num_layers))

    @property
    def num_layer_parameters(self) -> int:
        """Weights of the projections of all layers."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """The config of a Hugging Face folder; `generation_config.json` adds its end-of-sequence ids.

        Raises:
            InputError: a file cannot be read, or asks for something that is not honoured.
        """
        refuse_endless(folder)
        path = folder / "config.json"
        values = read_json(path)
        generation = folder / "generation_config.json"
        more_ids = _Fields(read_json(generation), generation).ids("eos_token_id") if generation.exists() else ()
        architectures = values.get("architectures") or [None]
        if not isinstance(architectures, list):
            raise InputError("expected a list", path=path, field="architectures", value=architectures)
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
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise InputError(f"expected one of {known}", path=path, field="architectures", value=architecture)
        kind = ARCHITECTURES[architecture]
        fields = _Fields({**(kind.defaults or {}), **values}, path)
        max_positions, num_layers = fields.positive("max_position_embeddings"), fields.positive("num_hidden_layers")
        fields.refuse_unhonoured()
        rope_theta, rope_scaling = fields.rope()
        window, windowed = fields.windows(kind, num_layers, _longest(max_positions, rope_scaling))
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
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qk_norm=kind.qk_norm,
            attention_bias=fields.bias("attention_bias", kind),
            mlp_bias=fields.bias("mlp_bias", kind),
            tie_word_embeddings=fields.switch("tie_word_embeddings"),
            eos_token_ids=tuple(dict.fromkeys((*fields.ids("eos_token_id"), *_as_ids(more_eos)))),
            qkv_bias=kind.qkv_bias,
            sliding_window=window,
            windowed_layers=windowed,
            checkpoint_dtype=fields.dtype(),
            is_float8=is_float8(values, path),
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    values = json_file(path)
    if not isinstance(values, dict):
        raise InputError("expected a JSON object", path=path)
    return values


def _longest(max_positions: int, scaling: RopeScaling | None) -> int:
    """`ModelConfig.max_model_len`."""
    if isinstance(scaling, LinearScaling):
        return max(1, int(max_positions * scaling.factor))
    if isinstance(scaling, YarnScaling):
        return max(1, int(scaling.original_max_position_embeddings * scaling.factor))
    return max_positions


def _as_ids(value: object) -> tuple[int, ...]:
    """Token ids from an id, a list of them or None.

    Raises:
        TypeError: it is something else.
    """
    ids = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    if not all(type(token_id) is int and 0 <= token_id < _MOST for token_id in ids):
        raise TypeError(value)
    return tuple(ids)


_MOST = 1 << 24
"""No size of a model, and no id of a token, is larger by far."""


class _Fields:
    """Reads fields of a config, and says in one line what is wrong with one.

    Args:
        prefix: what goes before a field's name in an error.
    """

    def __init__(self, values: Mapping[str, Any], path: object, prefix: str = ""):
        self._values, self._path, self._prefix = values, path, prefix

    def error(self, field: str, expected: str) -> InputError:
        return InputError(expected, path=self._path, field=self._prefix + field, value=self._values.get(field))

    def positive(self, field: str, default: int | None = None) -> int:
        value = self._values.get(field)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= _MOST:
            raise self.error(field, "expected an integer >= 1" + (f" and <= {_MOST}" if type(value) is int else ""))
        return value

    def whole(self, field: str) -> int:
        value = self._values.get(field)
        if type(value) is not int or not 0 <= value <= _MOST:
            raise self.error(field, "expected an integer >= 0")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self._values.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.error(field, "expected a number > 0")
        return float(value)

    def dtype(self) -> str | None:
        """`ModelConfig.checkpoint_dtype`; newer configs call the field `dtype`."""
        field = "torch_dtype" if self.has("torch_dtype") else "dtype"
        value = self._values.get(field)
        if value is not None and (not isinstance(value, str) or not value.isidentifier()):
            raise self.error(field, "expected the name of a dtype")
        return value

    def switch(self, field: str) -> bool:
        value = self._values.get(field) or False
        if value is not True and value is not False:
            raise self.error(field, "expected true or false")
        return value

    def bias(self, field: str, kind: Architecture) -> bool:
        """A switch that is on only where the architecture has such a bias."""
        value = self.switch(field)
        if value and field not in kind.biases:
            raise self.error(field, "expected false: this architecture has no such bias")
        return value

    def ids(self, field: str) -> tuple[int, ...]:
        try:
            return _as_ids(self._values.get(field))
        except (TypeError, ValueError) as error:
            raise self.error(field, "expected a token id or a list of them") from error

    def rope(self) -> tuple[float, RopeScaling | None]:
        """The base of the rotation and its scaling.

        Both spellings are read: `rope_parameters`, which holds the base too, and the older `rope_scaling` beside
        `rope_theta`, which goes first where a config has both, as it does in transformers.
        """
        name = "rope_scaling" if self._values.get("rope_scaling") else "rope_parameters"
        values = self._values.get(name) or {}
        if not isinstance(values, Mapping):
            raise self.error(name, "expected an object with a rope_type")
        rope = _Fields(values, self._path, f"{name}.")
        theta = rope.number("rope_theta", self.number("rope_theta", 10000.0))
        named = "rope_type" if "rope_type" in values else "type"
        kind = values.get(named, "default")
        if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
            raise rope.error(named, f"expected one of {', '.join(_ROPE_FIELDS)}")
        rope.refuse_beyond(_ROPE_FIELDS[kind] | {"rope_theta", "rope_type", "type"}, f'beside rope_type "{kind}"')
        if kind == "default":
            return theta, None
        factor = rope.number("factor")
        if kind == "linear":
            return theta, LinearScaling(factor)
        return theta, self._llama3(rope, factor) if kind == "llama3" else self._yarn(rope, factor)

    def _llama3(self, rope: _Fields, factor: float) -> Llama3Scaling:
        """The scaling of Llama 3.1; `self` are the fields around those of `rope`."""
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error("high_freq_factor", f"expected more than low_freq_factor ({low:g})")
        return Llama3Scaling(factor, low, high, self._original(rope))

    def _yarn(self, rope: _Fields, factor: float) -> YarnScaling:
        """The scaling by YaRN; `self` are the fields around those of `rope`."""
        fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
        if fast < slow:
            raise rope.error("beta_fast", f"expected at least beta_slow ({slow:g})")
        original = self._original(rope, self.positive("max_position_embeddings"))
        scales = [rope.number(name, 0.0) for name in ("mscale", "mscale_all_dim") if rope.has(name)]
        amplitude = yarn_amplitude(factor)
        if len(scales) == 2:
            amplitude = yarn_amplitude(factor, scales[0]) / yarn_amplitude(factor, scales[1])
        truncate = rope.switch("truncate") if rope.has("truncate") else True
        return YarnScaling(factor, original, rope.number("attention_factor", amplitude), fast, slow, truncate)

    def _original(self, rope: _Fields, default: int | None = None) -> int:
        """Tokens of the context of the first training; what the rope's own fields say may be said around them, too."""
        original = rope.positive("original_max_position_embeddings", default)
        if self.positive("original_max_position_embeddings", original) != original:
            raise self.error("original_max_position_embeddings", f"expected none, or {original} as in the rope's own")
        return original

    def refuse_beyond(self, known: Collection[str], where: str) -> None:
        """Raise InputError for a field that is neither known nor asks for nothing."""
        for field, value in self._values.items():
            harmless, expected = UNHONOURED.get(field, ((), f"expected none {where}"))
            if field not in known and value is not None and value not in harmless:
                raise self.error(field, expected)

    def has(self, field: str) -> bool:
        """Is the field there, and not null?"""
        return self._values.get(field) is not None

    def refuse_unhonoured(self) -> None:
        """Raise InputError for what would change the numbers and is not implemented."""
        values = self._values
        for field, (harmless, expected) in UNHONOURED.items():
            if values.get(field) is not None and values[field] not in harmless:
                raise self.error(field, expected)

    def windows(self, kind: Architecture, num_layers: int, longest: int) -> tuple[int | None, tuple[int, ...]]:
        """The sliding window, and the layers that have it; none where it hides nothing of the `longest` context."""
        types = self._layer_types(kind, num_layers)
        if kind.window == "some" and not self.switch("use_sliding_window"):
            if "sliding_attention" in types:
                raise self.error("layer_types", 'expected "full_attention" alone where use_sliding_window is false')
            return None, ()
        if kind.window == "none" and self._values.get("use_sliding_window") is False:
            return None, ()
        window = self.positive("sliding_window", longest)
        if window >= longest:
            return None, ()
        if kind.window == "none":
            problem = f"expected null, or at least the longest context ({longest}), as this architecture has no window"
            raise self.error("sliding_window", problem)
        if types:
            return window, tuple(layer for layer, name in enumerate(types) if name == "sliding_attention")
        first = self.whole("max_window_layers") if kind.window == "some" else 0
        return window, tuple(range(first, num_layers))

    def _layer_types(self, kind: Architecture, num_layers: int) -> list[str]:
        """How each layer attends, where the config says so."""
        types = self._values.get("layer_types") or []
        known = ("full_attention", "sliding_attention") if kind.window == "some" else ("full_attention",)
        named = " or ".join(f'"{name}"' for name in known)
        if not isinstance(types, list) or any(name not in known for name in types):
            raise self.error("layer_types", f"expected {named} in every layer")
        if types and len(types) != num_layers:
            raise self.error("layer_types", f"expected one for each of {num_layers} layers")
        return types if kind.window == "some" else []
