"""Model shapes from Hugging Face configurations: by `model_type`, what nobody has looked at is refused by name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import orjson

import twinserve
from twinserve.settings.errors import InputError
from twinserve.settings.files import refuse_endless
from twinserve.sim.quantized_configs import SAID_OF_WEIGHTS, quantized
from twinserve.sim.shapes import (
    STORED_BITS,
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layers,
    LinearAttention,
    Mamba,
    Mixer,
    ModelShape,
)
from twinserve.traces.lines import json_file

_MOST = 1 << 24
"""No size of a model is larger by far."""
_MOST_LAYERS = 4096
DATA = Path(twinserve.__file__).parent / "data"
SHAPES_FOLDER = DATA / "shapes"
"""A folder a common shape with the config.json of its model; the engine makes models of random weights of them."""
MODELS_FILE = DATA / "models.json"
"""More shapes, which the engine does not run, each with its source and what it is published to have."""

_GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}


@dataclass(frozen=True)
class _Kind:
    """What a `model_type` says that a configuration need not.

    Attributes:
        is_gated: the feed-forward networks have a gate.
        tied: of a configuration that does not say `tie_word_embeddings`.
        full_every: of every so many layers the last attends to all tokens, the others to the window, where no
            `layer_types` say so; 1: none has a window; 0: all have.
        experts: the field with an expert's inner size; None: there are no experts.
        is_latent: attention is latent.
        is_mamba: layers of linear attention are Mamba's.
        gates_output: attention that is not linear projects a gate of its output.
        defaults: of fields that published configurations leave out.
    """

    is_gated: bool = True
    tied: bool = False
    full_every: int = 1
    experts: str | None = None
    is_latent: bool = False
    is_mamba: bool = False
    gates_output: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)


_DENSE, _TIED = _Kind(), _Kind(tied=True)
_UNGATED = _Kind(is_gated=False)
_MOE = _Kind(experts="moe_intermediate_size")
_WIDE_MOE = _Kind(experts="intermediate_size")
_LATENT_MOE = _Kind(experts="moe_intermediate_size", is_latent=True)
KINDS: dict[str, _Kind] = {
    **dict.fromkeys(
        (
            "apertus", "arcee", "gpt_neox", "nemotron", "phi",
        ),
        _UNGATED,
    ),
    **dict.fromkeys(
        (
            "llama", "qwen2", "qwen3", "glm", "glm4", "granite", "hunyuan_v1_dense", "internlm3", "ministral3",
            "olmo", "olmo2", "olmo3", "seed_oss", "stablelm", "helium", "cwm",
        ),
        _DENSE,
    ),
    **dict.fromkeys(("cohere", "ernie4_5", "gemma", "smollm3"), _TIED),
    "exaone4": _Kind(full_every=4),
    "mistral": _Kind(full_every=0, defaults={"sliding_window": 4096}),
    "phi3": _Kind(full_every=0),
    "starcoder2": _Kind(is_gated=False, tied=True, full_every=0),
    "cohere2": _Kind(tied=True, full_every=4),
    "gemma2": _Kind(tied=True, full_every=2, defaults={"sliding_window": 4096}),
    "gemma3_text": _Kind(tied=True, full_every=6, defaults=_GEMMA3),
    "mixtral": replace(_WIDE_MOE, full_every=0),
    "phimoe": replace(_WIDE_MOE, full_every=0),
    "gpt_oss": replace(_WIDE_MOE, full_every=2),
    **dict.fromkeys(("olmoe", "granitemoe", "minimax_m2"), _WIDE_MOE),
    **dict.fromkeys(("qwen2_moe", "glm4_moe"), _MOE),
    "qwen3_moe": replace(_MOE, full_every=0),
    "ernie4_5_moe": replace(_MOE, tied=True),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"), _LATENT_MOE),
    "llama4_text": replace(_WIDE_MOE, defaults={"attention_chunk_size": 8192}),
    "bamba": _Kind(is_mamba=True),
    "granitemoehybrid": replace(_WIDE_MOE, is_mamba=True),
    "nemotron_h": replace(_MOE, is_gated=False, is_mamba=True),
    "qwen3_next": replace(_MOE, gates_output=True),
    "qwen3_5_text": _Kind(gates_output=True),
    "qwen3_5_moe_text": replace(_MOE, gates_output=True),
}  # fmt: skip
"""transformers' `model_type` of every model that is known, held against transformers' own parameters in the tests."""

_LEFT_OUT: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 3, "n_shared_experts": 1, "q_lora_rank": 1536},
    "ernie4_5": {"num_key_value_heads": 2, "head_dim": 128},
    "ernie4_5_moe": {"num_key_value_heads": 4, "moe_layer_start_index": 1, "moe_num_shared_experts": 2},
    "gemma": {"head_dim": 256},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256},
    "glm4_moe": {"num_key_value_heads": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 768},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64},
    "granitemoehybrid": {"shared_intermediate_size": 1024},
    "minimax_m2": {"num_key_value_heads": 8, "head_dim": 128},
    "nemotron_h": {"num_key_value_heads": 8, "mamba_ssm_cache_dtype": "float32"},
    "qwen2_moe": {"shared_expert_intermediate_size": 5632},
    "qwen3_5_moe_text": {"num_key_value_heads": 2, "head_dim": 256, "shared_expert_intermediate_size": 512},
    "qwen3_next": {"num_key_value_heads": 2, "head_dim": 256, "shared_expert_intermediate_size": 512},
    "seed_oss": {"num_key_value_heads": 8, "head_dim": 128},
    **{
        name: {"num_key_value_heads": count}
        for count, names in {
            2: ("glm", "glm4", "internlm3", "starcoder2"),
            4: ("qwen3_5_text", "qwen3_moe", "smollm3"),
            8: ("bamba", "cwm", "llama4_text", "ministral3", "mistral", "mixtral", "phimoe"),
        }.items()
        for name in names
    },
}
"""What transformers takes for sizes that a configuration of a kind leaves out, where it is not what their absence means
elsewhere."""


class _Config:
    """Fields of a configuration; what is wrong is said with the file, the field and the value.

    Args:
        whole: in which a model of text and images has the text's as `text_config`.
    """

    def __init__(self, whole: dict[str, Any], path: Path):
        self.path, self._whole = path, whole
        text = whole.get("text_config")
        self.values: dict[str, Any] = text if isinstance(text, dict) else whole
        model_type = self.values.get("model_type", "llama")
        if not isinstance(model_type, str) or model_type not in KINDS:
            raise InputError(
                f"expected a model that is known: {', '.join(KINDS)}", path=path, field="model_type", value=model_type
            )
        self.kind = KINDS[model_type]
        self.values = _LEFT_OUT.get(model_type, {}) | self.kind.defaults | self.values

    def error(self, name: str, problem: str) -> InputError:
        """That the value of a field is wrong."""
        return InputError(problem, path=self.path, field=name, value=self.values.get(name))

    def size(self, *names: str) -> int:
        """The size that the first field of these names which is there gives."""
        found = self.optional(*names)
        if found is None:
            raise self.error(names[0], f"expected an integer from 1 to {_MOST}")
        return found

    def optional(self, *names: str, least: int = 1) -> int | None:
        """The same; None where none of them is there."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                if type(value) is not int or not least <= value <= _MOST:
                    raise self.error(name, f"expected an integer from {least} to {_MOST}")
                return value
        return None

    def anywhere(self, name: str) -> Any:
        """The value of a field of the text's configuration, or else of the whole one."""
        value = self.values.get(name)
        return self._whole.get(name) if value is None else value

    @property
    def num_layers(self) -> int:
        count = self.size("num_hidden_layers")
        if count > _MOST_LAYERS:
            raise self.error("num_hidden_layers", f"expected an integer from 1 to {_MOST_LAYERS}")
        return count

    def layer_list(self, name: str, known: tuple[str, ...]) -> list[str] | None:
        """A field that says a word a layer; None where it is not there."""
        words = self.values.get(name)
        if words is None:
            return None
        if not isinstance(words, list) or len(words) != self.num_layers or not all(word in known for word in words):
            raise self.error(name, f"expected {self.num_layers} of {', '.join(known)}")
        return words


def load_shape(path: Path) -> ModelShape:
    """The shape that a Hugging Face config.json, or the folder that holds one, describes.

    Raises:
        InputError: it cannot be read, lacks a size, or is of a model that is not known.
    """
    if os.path.isdir(path):
        refuse_endless(path)
        path = path / "config.json"
    config = json_file(path)
    beside = path.with_name("hf_quant_config.json")
    if beside.exists():
        raise InputError("expected none beside config.json: what it says of weights is not modelled", path=beside)
    if not isinstance(config, dict):
        raise InputError("expected a JSON object", path=path)
    return shape_of(config, path.parent.name or path.stem, path)


def shape_of(config: dict[str, Any], name: str, path: Path) -> ModelShape:
    """The shape that a configuration describes; `path` is where it is from.

    Raises:
        InputError: it lacks a size, or is of a model that is not known.
    """
    read = _Config(config, path)
    _check_known(read)
    alike = Counter(_blocks(read) if read.values.get("model_type") == "nemotron_h" else _layers(read))
    tied = read.anywhere("tie_word_embeddings")
    shape = ModelShape(
        name,
        read.size("vocab_size"),
        read.size("hidden_size"),
        tuple(Layers(count, mixer, network) for (mixer, network), count in alike.items()),
        read.kind.tied if tied is None else bool(tied),
    )
    return quantized(shape, {name: read.anywhere(name) for name in SAID_OF_WEIGHTS}, path)


def _check_known(read: _Config) -> None:
    """Refuse what the kind of model has no room for.

    Raises:
        InputError: a dense model has experts, or one with keys and values has a latent.
    """
    for name, value in read.values.items():
        if read.kind.experts is None and ("expert" in name or "moe" in name) and value and value != 1:
            raise read.error(name, "expected none: this kind of model is priced without experts")
        if not read.kind.is_latent and name == "kv_lora_rank" and value:
            raise read.error(name, "expected none: this kind of model is priced without latent attention")


def _layers(read: _Config) -> list[tuple[Mixer, FeedForward | Experts]]:
    """What each layer mixes the tokens with, and its network."""
    return list(zip(_mixers(read), _networks(read), strict=True))


_BLOCKS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""What the letters of a pattern stand for."""
_OLD_WORDS = {"mamba": "linear_attention", "attention": "full_attention"}
"""Words of older configurations."""


def _blocks(read: _Config) -> list[tuple[Mixer, FeedForward | Experts]]:
    """The layers of a model that lists mixers and networks as blocks of their own: a network belongs to the mixer
    before it, and a mixer before another one has none."""
    pattern = read.values.get("hybrid_override_pattern")
    words = [_BLOCKS.get(letter) for letter in pattern] if isinstance(pattern, str) else None
    if words is None:
        found = read.values.get("layers_block_type")
        words = [_OLD_WORDS.get(str(word), str(word)) for word in found] if isinstance(found, list) else []
    if not words or not set(words) <= set(_BLOCKS.values()) or words[0] not in ("linear_attention", "full_attention"):
        name = "layers_block_type" if pattern is None else "hybrid_override_pattern"
        raise read.error(name, f"expected blocks of {', '.join(_BLOCKS.values())}, the first no network")
    if read.values.get("moe_latent_size"):
        raise read.error("moe_latent_size", "expected none: experts of a latent are not modelled")
    layers: list[tuple[Mixer, FeedForward | Experts]] = []
    for word in words:
        if word in ("linear_attention", "full_attention"):
            layers.append((_mamba(read) if word == "linear_attention" else _full(read), FeedForward(0)))
            continue
        mixer, network = layers[-1]
        if network != FeedForward(0):
            raise read.error("hybrid_override_pattern", "expected no network behind a network")
        layers[-1] = mixer, _experts(read) if word == "moe" else FeedForward(read.size("intermediate_size"), False)
    return layers


def _full(read: _Config) -> Attention:
    """Attention to all tokens."""
    heads = read.size("num_attention_heads")
    return Attention(
        heads,
        read.optional("num_key_value_heads") or heads,
        read.optional("head_dim", "attention_head_dim") or max(1, read.size("hidden_size") // heads),
        is_gated=read.kind.gates_output,
    )


def _mixers(read: _Config) -> list[Mixer]:
    """What mixes the tokens, a layer."""
    if read.kind.is_latent:
        return [_latent(read)] * read.num_layers
    full = _full(read)
    of_word: dict[str, Callable[[], Mixer]] = {
        "full_attention": lambda: full,
        "sliding_attention": lambda: replace(full, window=read.size("sliding_window")),
    }
    if (chunk := read.optional("attention_chunk_size")) is not None:
        of_word["chunked_attention"] = lambda: replace(full, window=chunk)
    if read.kind.is_mamba:
        of_word["linear_attention"] = lambda: _mamba(read)
        of_word |= {old: of_word[word] for old, word in _OLD_WORDS.items()}
    elif read.kind.gates_output:
        of_word["linear_attention"] = lambda: _linear(read)
    words = read.layer_list("layer_types", tuple(of_word)) or _windows(read)
    if set(words) == {"linear_attention"}:
        raise read.error("layer_types", "expected attention to tokens in some layers")
    return [of_word[word]() for word in words]


def _windows(read: _Config) -> list[str]:
    """The kinds of layers of a configuration that does not list them."""
    count = read.num_layers
    if read.kind.is_mamba:
        attending = read.values.get("attn_layer_indices") or []
        if not isinstance(attending, list):
            raise read.error("attn_layer_indices", "expected a list of layers")
        return ["full_attention" if layer in attending else "linear_attention" for layer in range(count)]
    if read.values.get("model_type") == "llama4_text":
        return ["full_attention" if (layer + 1) % 4 == 0 else "chunked_attention" for layer in range(count)]
    if read.kind.gates_output:
        every = read.optional("full_attention_interval") or 4
        return ["linear_attention" if (layer + 1) % every else "full_attention" for layer in range(count)]
    is_asked = read.values.get("use_sliding_window", True)
    if not read.values.get("sliding_window") or not is_asked:
        return ["full_attention"] * count
    every = read.optional("sliding_window_pattern", "_sliding_window_pattern") or read.kind.full_every
    if every == 1:
        first = read.optional("max_window_layers", least=0)
        if first is None:
            raise read.error("sliding_window", "expected layer_types beside it, which say the layers that have one")
        return ["full_attention" if layer < first else "sliding_attention" for layer in range(count)]
    return ["sliding_attention" if not every or (layer + 1) % every else "full_attention" for layer in range(count)]


def _latent(read: _Config) -> LatentAttention:
    return LatentAttention(
        read.size("num_attention_heads"),
        read.optional("q_lora_rank"),
        read.size("kv_lora_rank"),
        read.size("qk_nope_head_dim"),
        read.size("qk_rope_head_dim"),
        read.size("v_head_dim"),
    )


def _linear(read: _Config) -> LinearAttention:
    return LinearAttention(
        read.size("linear_num_key_heads"),
        read.size("linear_num_value_heads"),
        read.size("linear_key_head_dim"),
        read.size("linear_value_head_dim"),
        read.size("linear_conv_kernel_dim"),
    )


def _mamba(read: _Config) -> Mamba:
    return Mamba(
        read.size("mamba_n_heads", "mamba_num_heads"),
        read.size("mamba_d_head", "mamba_head_dim"),
        read.size("mamba_d_state", "ssm_state_size"),
        read.size("mamba_n_groups", "n_groups"),
        read.size("mamba_d_conv", "conv_kernel"),
        32 if read.values.get("mamba_ssm_cache_dtype") == "float32" else STORED_BITS,
    )


def _networks(read: _Config) -> list[FeedForward | Experts]:
    """The feed-forward network, a layer."""
    if read.kind.experts is None:
        return [FeedForward(read.size("intermediate_size"), read.kind.is_gated)] * read.num_layers
    if read.values.get("num_local_experts") == 0:
        return [FeedForward(read.size("shared_intermediate_size"), read.kind.is_gated)] * read.num_layers
    experts = _experts(read)
    dense = ("intermediate_size_mlp", "intermediate_size")
    return [experts if sparse else FeedForward(read.size(*dense), read.kind.is_gated) for sparse in _sparse(read)]


def _experts(read: _Config) -> Experts:
    num = read.size("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    top_k = read.size("num_experts_per_tok", "moe_k", "moe_topk")
    if top_k > num:
        raise read.error("num_experts_per_tok", f"expected at most the {num} experts")
    inner = read.size(read.kind.experts or "")
    gated = read.optional("shared_expert_intermediate_size", least=0)
    shared = read.optional("shared_intermediate_size", "moe_shared_expert_intermediate_size", least=0)
    if shared is None:
        count = read.optional("n_shared_experts", "moe_num_shared_experts", least=0) or 0
        shared = (1 if read.values.get("model_type") == "llama4_text" else count) * inner if gated is None else gated
    return Experts(num, top_k, inner, shared, read.kind.is_gated, has_shared_gate=bool(gated))


def _sparse(read: _Config) -> list[bool]:
    """Whether each layer has experts."""
    words = read.layer_list("mlp_layer_types", ("dense", "sparse"))
    if words is not None:
        return [word == "sparse" for word in words]
    sparse_layers = read.values.get("moe_layers")
    if isinstance(sparse_layers, list):
        return [layer in sparse_layers for layer in range(read.num_layers)]
    dense_layers = read.values.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list):
        raise read.error("mlp_only_layers", "expected a list of layers")
    first = read.optional("first_k_dense_replace", "moe_layer_start_index", least=0) or 0
    last = read.optional("moe_layer_end_index", least=0)
    step = (
        read.optional("decoder_sparse_step", "moe_layer_interval", "moe_layer_freq", "interleave_moe_layer_step") or 1
    )
    offset = 0 if "moe_layer_freq" in read.values else 1
    return [
        first <= layer <= (read.num_layers if last is None else last)
        and (layer + offset) % step == 0
        and layer not in dense_layers
        for layer in range(read.num_layers)
    ]


def shipped_models() -> dict[str, dict[str, Any]]:
    """The shapes of `MODELS_FILE`: where each configuration is from, the published parameters, and it itself."""
    return orjson.loads(MODELS_FILE.read_bytes())


@cache
def _shipped() -> dict[str, tuple[dict[str, Any] | None, Path]]:
    """By the names of the shapes that ship: the configuration and its file; None where the file is a folder's own."""
    folders = {folder.name.removesuffix("-shape"): (None, folder) for folder in sorted(SHAPES_FOLDER.iterdir())}
    return folders | {name: (model["config"], MODELS_FILE) for name, model in shipped_models().items()}


@cache
def _shape(name: str) -> ModelShape:
    config, path = _shipped()[name]
    return replace(load_shape(path), name=name) if config is None else shape_of(config, name, path)


class _Shapes(Mapping[str, ModelShape]):
    """Shapes by name, each made of its configuration when it is first asked for."""

    def __getitem__(self, name: str) -> ModelShape:
        return _shape(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_shipped())

    def __len__(self) -> int:
        return len(_shipped())


SHAPES = _Shapes()
"""Common shapes, as the config.json of each model on the Hugging Face hub has them (Mistral 7B: v0.3)."""
