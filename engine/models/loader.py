"""Weights for a Decoder: from a Hugging Face folder, from a transformers model, or random."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from twinserve.engine.models.config import ModelConfig, read_json
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.options import Dtype, Quantization
from twinserve.engine.quantization import AbsMaxQuantizer, quantize_decoder
from twinserve.settings.errors import InputError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype) if name != "auto"}
"""Those that a model can be served in."""


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
) -> Decoder:
    """The Decoder of a Hugging Face folder: `config.json` and safetensors, in one file or in shards.

    Args:
        dtype: of the weights, whatever the files hold.
        quantization: "int8" quantizes each weight as it is read, so that the model is never there in full.

    Raises:
        InputError: the folder lacks something, or holds something that is not honoured.
    """
    if not folder.is_dir():
        raise InputError("expected a folder with config.json and safetensors", path=folder)
    config = ModelConfig.load(folder)
    with ExitStack() as stack:
        source = _open_weights(folder, stack)
        return _build(config, source, dtype, device, quantization)


def adopt_model(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
) -> Decoder:
    """A Decoder with a copy of the weights of a transformers model.

    Args:
        dtype: of the copy; None keeps the model's.
        quantization: "int8" makes a copy that runs from int8.

    Raises:
        InputError: the model's architecture, or something in its config, is not honoured.
    """
    config, tensors = config_of(model), model.state_dict()
    source = _Source(type(model).__name__, tensors, lambda name: tensors[name])
    return _build(config, source, dtype or next(model.parameters()).dtype, device, quantization)


def config_of(model: nn.Module) -> ModelConfig:
    """The shape of a transformers model.

    Raises:
        InputError: it is none, or its architecture, or something in its config, is not honoured.
    """
    name = type(model).__name__
    theirs: Any = getattr(model, "config", None)
    if not hasattr(theirs, "to_dict"):
        raise InputError("expected a Decoder or a causal language model of transformers", field="model", value=name)
    more_eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return ModelConfig.from_fields(theirs.to_dict(), name, f"config of {name}", more_eos=more_eos)


def random_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    std: float = 0.02,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
) -> Decoder:
    """A Decoder with weights drawn from a normal distribution of deviation `std`, norms at 1 and biases at 0.

    Args:
        quantization: "int8" draws all of them, and has the Decoder run from int8 then.
    """
    with torch.device("meta"):
        model = Decoder(config, dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, std, generator=generator)
    if quantization == "int8":
        quantize_decoder(model)
    return model.eval()


@dataclass(frozen=True)
class _Source:
    """Tensors by name, and where they are from."""

    path: object
    names: Collection[str]
    read: Callable[[str], Tensor]


def _open_weights(folder: Path, stack: ExitStack) -> _Source:
    """The tensors of the folder's safetensors files, read when asked for."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    weight_map: dict[str, str] = {}
    if index.exists():
        weight_map = _weight_map(index)
        paths = [folder / name for name in dict.fromkeys(weight_map.values())]
    elif single.exists():
        paths = [single]
    else:
        raise InputError(f"no weights: expected {single.name} or {index.name}", path=folder)
    files: dict[str, Any] = {}
    found: dict[str, str] = {}
    for path in paths:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError as error:  # also of one that may not be read
            problem = f"cannot be read: {error}" if path.exists() else f"is missing, but {index.name} names it"
            raise InputError(problem, path=path) from error
        except (OSError, SafetensorError) as error:
            raise InputError(f"expected safetensors: {error}", path=path) from error
        for name in list(file.keys()):
            if name in found:
                raise InputError("expected each tensor in one file, another has it too", path=path, field=name)
            files[name], found[name] = file, path.name
    for name, told in weight_map.items():
        if found.get(name) != told:
            problem = f"expected {found[name]}, which has it" if name in found else "expected a file that has it"
            raise InputError(problem, path=index, field=f"weight_map.{name}", value=told)
    return _Source(folder, files, lambda name: files[name].get_tensor(name))


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor; all lie beside their index.

    Raises:
        InputError: it says something else.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("expected the file of each tensor", path=index, field="weight_map", value=weight_map)
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or file == "..":
            raise InputError(
                "expected the name of a file beside it", path=index, field=f"weight_map.{name}", value=file
            )
    return weight_map


@dataclass(frozen=True)
class _Part:
    """A tensor of the checkpoint: its name, its shape, and the shape it is repeated to before it is stacked."""

    name: str
    shape: tuple[int, ...]
    repeated: tuple[int, ...] | None = None


def _parts(config: ModelConfig) -> dict[str, list[_Part]]:
    """For each weight of a Decoder, the checkpoint's tensors that make it when stacked."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    parts = {
        "embedding.weight": [_Part("model.embed_tokens.weight", (config.vocab_size, hidden))],
        "norm.weight": [_Part("model.norm.weight", (hidden,))],
    }
    if not config.tie_word_embeddings:
        parts["lm_head.weight"] = [_Part("lm_head.weight", (config.vocab_size, hidden))]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        attention = f"{theirs}self_attn."
        projections = (("q_proj", rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        gate_up = [_Part(f"{theirs}mlp.{name}.weight", (inner, hidden)) for name in ("gate_proj", "up_proj")]
        parts |= {
            f"{ours}attention_norm.weight": [_Part(f"{theirs}input_layernorm.weight", (hidden,))],
            f"{ours}attention.qkv.weight": [_Part(f"{attention}{p}.weight", (n, hidden)) for p, n in projections],
            f"{ours}attention.output.weight": [_Part(f"{attention}o_proj.weight", (hidden, rows))],
            f"{ours}mlp_norm.weight": [_Part(f"{theirs}post_attention_layernorm.weight", (hidden,))],
            f"{ours}mlp.gate_up.weight": gate_up,
            f"{ours}mlp.down.weight": [_Part(f"{theirs}mlp.down_proj.weight", (hidden, inner))],
        }
        if config.attention_bias or config.qkv_bias:
            parts[f"{ours}attention.qkv.bias"] = [_Part(f"{attention}{p}.bias", (n,)) for p, n in projections]
        if config.attention_bias:
            parts[f"{ours}attention.output.bias"] = [_Part(f"{attention}o_proj.bias", (hidden,))]
        if config.mlp_bias:
            biases = [_Part(f"{theirs}mlp.{name}.bias", (inner,)) for name in ("gate_proj", "up_proj")]
            parts[f"{ours}mlp.gate_up.bias"] = biases
            parts[f"{ours}mlp.down.bias"] = [_Part(f"{theirs}mlp.down_proj.bias", (hidden,))]
        if config.qk_norm:
            parts[f"{ours}attention.qk_norm.weight"] = [
                _Part(f"{attention}q_norm.weight", (head_dim,), (config.num_heads, head_dim)),
                _Part(f"{attention}k_norm.weight", (head_dim,), (config.num_kv_heads, head_dim)),
            ]
    return parts


def _build(
    config: ModelConfig, source: _Source, dtype: torch.dtype, device: torch.device | str, quantization: Quantization
) -> Decoder:
    """A Decoder with the tensors of `source`, each of which must be there, have its shape, and be known."""
    parts = _parts(config)
    known = {part.name for stack in parts.values() for part in stack}
    for name in source.names:
        # A tied output projection may be saved beside the embedding, and old checkpoints hold rotary constants.
        if name not in known and name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            raise InputError("not a tensor of this architecture", path=source.path, field=name)
    _check_tied(config, source, *parts["embedding.weight"])
    with torch.device("meta"):
        model = Decoder(config, dtype)
        if quantization == "int8":
            quantize_decoder(model)
    in_int8 = {name.removesuffix("scale") + "weight" for name, _ in model.named_buffers() if name.endswith("scale")}
    weights: dict[str, Tensor] = {}
    for name, stack in parts.items():
        kept = torch.float32 if name in in_int8 else dtype
        weight = _stacked(source, stack, kept, device)
        if name in in_int8:
            weights[name], weights[name.removesuffix("weight") + "scale"] = AbsMaxQuantizer.quantize(weight)
        else:
            weights[name] = nn.Parameter(weight, requires_grad=False)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _stacked(source: _Source, stack: list[_Part], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The tensors of `stack`, each copied to its place as it is read: beside the weight there is one at a time."""
    shapes = [part.repeated or part.shape for part in stack]
    lengths = [shape[0] for shape in shapes]
    weight = torch.empty((sum(lengths), *shapes[0][1:]), dtype=dtype, device=device)
    for place, part in zip(weight.split(lengths), stack, strict=True):
        place.copy_(_read(source, part))
    return weight


def _check_tied(config: ModelConfig, source: _Source, embedding: _Part) -> None:
    """Refuse an output projection beside a tied embedding that is not the same: it is unclear which one is meant."""
    head = _Part("lm_head.weight", embedding.shape)
    if not config.tie_word_embeddings or head.name not in source.names:
        return
    if not torch.equal(_read(source, head), _read(source, embedding)):
        problem = f"expected the numbers of {embedding.name}, as the config has tie_word_embeddings"
        raise InputError(problem, path=source.path, field=head.name)


def _read(source: _Source, part: _Part) -> Tensor:
    """The tensor of `part`, its shape checked."""
    if part.name not in source.names:
        problem = f"expected a tensor of shape {list(part.shape)}, found none"
        raise InputError(problem, path=source.path, field=part.name)
    tensor = source.read(part.name)
    if tensor.shape != part.shape or not tensor.is_floating_point():
        problem = f"expected floating point numbers of shape {list(part.shape)}"
        found = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
        raise InputError(problem, path=source.path, field=part.name, value=found)
    return tensor if part.repeated is None else tensor.expand(part.repeated)
