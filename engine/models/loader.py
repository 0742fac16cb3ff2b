"""Weights for a Decoder: from a Hugging Face folder, from a transformers model, or random."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from twinserve.engine.float8 import FLOAT8
from twinserve.engine.models.config import ModelConfig, read_json
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.float8_checkpoint import INPUT_SCALE, WEIGHT_SCALE
from twinserve.engine.models.sharded_decoder import ShardedDecoder
from twinserve.engine.options import Dtype, Quantization
from twinserve.engine.parallel.group import Group
from twinserve.engine.parallel.shards import Shard
from twinserve.engine.quantization import AbsMaxQuantizer, quantize_decoder
from twinserve.engine.quantization.quantizer import absmax_scale
from twinserve.settings.errors import InputError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype) if name != "auto"}
"""Those that a model can be served in."""


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    group: Group | None = None,
) -> Decoder:
    """The Decoder of a Hugging Face folder: `config.json` and safetensors, in one file or in shards.

    Args:
        dtype: of the weights, whatever the files hold.
        quantization: "int8" and "fp8" quantize each weight as it is read, so that the model is never there in full. A
            checkpoint in float8 is loaded as it is.
        group: the ranks that share the model; of it, this one reads its own part alone.

    Raises:
        InputError: the folder lacks something, or holds something that is not honoured.
    """
    if not folder.is_dir():
        raise InputError("expected a folder with config.json and safetensors", path=folder)
    config = ModelConfig.load(folder)
    with ExitStack() as stack:
        source = _open_weights(folder, stack)
        return _build(config, source, dtype, device, quantization, group)


def adopt_model(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    group: Group | None = None,
) -> Decoder:
    """A Decoder with a copy of the weights of a transformers model.

    Args:
        dtype: of the copy; None keeps the model's.
        quantization: "int8" and "fp8" make a copy that runs from int8 or float8.
        group: the ranks that share the model; this one copies its own part.

    Raises:
        InputError: the model's architecture, or something in its config, is not honoured.
    """
    config, tensors = config_of(model), model.state_dict()
    source = _Source(
        type(model).__name__,
        tensors,
        lambda name: tensors[name].shape,
        lambda name, own: tensors[name][own],
        lambda name: str(tensors[name].dtype).removeprefix("torch."),
    )
    return _build(config, source, dtype or next(model.parameters()).dtype, device, quantization, group)


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
    config = ModelConfig.from_fields(theirs.to_dict(), name, f"config of {name}", more_eos=more_eos)
    if config.is_float8:
        # Its layers are of a kind of their own, which may have unpacked the weights or not.
        raise InputError("expected a folder: quantized models are not adopted", field="model", value=name)
    return config


def quantization_of(config: ModelConfig, asked: Quantization) -> Quantization:
    """How the weights of a model will be kept.

    Raises:
        InputError: that is not what its checkpoint has.
    """
    if config.is_float8 and asked == "int8":
        raise InputError("expected none or fp8: the checkpoint is in float8", field="quantization", value=asked)
    return "fp8" if config.is_float8 else asked


def random_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    std: float = 0.02,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    group: Group | None = None,
) -> Decoder:
    """A Decoder with weights drawn from a normal distribution of deviation `std`, norms at 1 and biases at 0.

    Args:
        quantization: "int8" and "fp8" draw all of them, and have the Decoder run from int8 or float8 then.
        group: the ranks that share the model; each draws all of it, one weight at a time, and keeps its own part.
    """
    with torch.device(device):
        model = _decoder(config, dtype, group)
    parts, generator = _parts(config, _shard_of(group)), torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        elif group is None:
            parameter.normal_(0.0, std, generator=generator)
        else:
            stack = parts[name]
            whole = parameter.new_empty(sum(part.shape[0] for part in stack), *stack[0].shape[1:])
            pieces = whole.normal_(0.0, std, generator=generator).split([part.shape[0] for part in stack])
            own = [piece[part.own] for part, piece in zip(stack, pieces, strict=True)]
            _put(parameter, own, [part.length for part in stack])
    quantization = quantization_of(config, quantization)
    if quantization != "none":
        quantize_decoder(model, _scale_of(group, quantization), quantization)
    return _joined(model)


@dataclass(frozen=True)
class _Source:
    """Tensors by name, and where they are from: `shape` and `dtype` of one, the latter as the source calls it, and
    `read` what lies in a slice of each dimension."""

    path: object
    names: Collection[str]
    shape: Callable[[str], Seq[int]]
    read: Callable[[str, tuple[slice, ...]], Tensor]
    dtype: Callable[[str], str]


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
    return _Source(
        folder,
        files,
        lambda name: files[name].get_slice(name).get_shape(),
        lambda name, own: files[name].get_slice(name)[own] if own else files[name].get_tensor(name),
        lambda name: files[name].get_slice(name).get_dtype(),
    )


def dequantised_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the folder of a checkpoint in float8, which `load_model` can load: by name, what they stand for.

    Raises:
        InputError: a file cannot be read.
    """
    with ExitStack() as stack:
        source = _open_weights(folder, stack)
        tensors = {name: source.read(name, ()) for name in source.names}
    scales = {name for name in tensors if name.endswith((f"weight{WEIGHT_SCALE}", INPUT_SCALE))}
    for name in scales:
        weight = name.removesuffix(WEIGHT_SCALE)
        if weight != name:
            tensors[weight] = AbsMaxQuantizer.dequantize(tensors[weight], tensors[name].float())
    return {name: tensor for name, tensor in tensors.items() if name not in scales}


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
    """A tensor of the checkpoint that a weight is made of.

    Attributes:
        shape: its whole shape.
        own: the slices of its dimensions that the rank has; none is all.
        length: rows of the weight that it makes; those beyond it are zeros.
        repeated: so many rows like it; None is itself.
        is_zero: the rank has zeros of it: what is added once for all ranks is rank 0's.
    """

    name: str
    shape: tuple[int, ...]
    own: tuple[slice, ...]
    length: int
    repeated: int | None = None
    is_zero: bool = False


def _parts(config: ModelConfig, shard: Shard) -> dict[str, list[_Part]]:
    """For each weight of a Decoder, the checkpoint's tensors that make a rank's part of it when stacked."""
    hidden, inner, head_dim, is_whole = config.hidden_size, config.intermediate_size, config.head_dim, shard.size == 1

    def rows(name: str, count: int, own: slice, width: int = 1, *shape: int, length: int | None = None) -> _Part:
        """`count` times `width` rows, of which the rank has some."""
        cut = slice(own.start * width, own.stop * width)
        length = cut.stop - cut.start if length is None else length
        return _Part(name, (count * width, *shape), () if is_whole else (cut,), length)

    def columns(name: str, count: int, own: slice, width: int = 1) -> _Part:
        cut = slice(own.start * width, own.stop * width)
        return _Part(name, (hidden, count * width), () if is_whole else (slice(None), cut), hidden)

    def alike(name: str, size: int = hidden, repeated: int | None = None) -> _Part:
        """What every rank has."""
        return _Part(name, (size,), (), size if repeated is None else repeated, repeated)

    def summed_bias(name: str) -> _Part:
        return replace(alike(name), is_zero=shard.rank > 0)

    vocabulary, tokens = config.vocab_size, shard.tokens(config.vocab_size)
    heads, kv_heads = shard.part(config.num_heads), shard.kv_heads(config.num_kv_heads)

    def table(name: str) -> list[_Part]:
        return [rows(name, vocabulary, tokens, 1, hidden, length=shard.vocabulary_size(vocabulary))]

    parts = {"embedding.weight": table("model.embed_tokens.weight"), "norm.weight": [alike("model.norm.weight")]}
    if not config.tie_word_embeddings:
        parts["lm_head.weight"] = table("lm_head.weight")
    projections = (
        ("q_proj", config.num_heads, heads),
        ("k_proj", config.num_kv_heads, kv_heads),
        ("v_proj", config.num_kv_heads, kv_heads),
    )
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
        gates = [f"{mlp}gate_proj", f"{mlp}up_proj"]
        parts |= {
            f"{ours}attention_norm.weight": [alike(f"{theirs}input_layernorm.weight")],
            f"{ours}attention.qkv.weight": [
                rows(f"{attention}{name}.weight", count, own, head_dim, hidden) for name, count, own in projections
            ],
            f"{ours}attention.output.weight": [columns(f"{attention}o_proj.weight", config.num_heads, heads, head_dim)],
            f"{ours}mlp_norm.weight": [alike(f"{theirs}post_attention_layernorm.weight")],
            f"{ours}mlp.gate_up.weight": [
                rows(f"{name}.weight", inner, shard.part(inner), 1, hidden) for name in gates
            ],
            f"{ours}mlp.down.weight": [columns(f"{mlp}down_proj.weight", inner, shard.part(inner))],
        }
        if config.attention_bias or config.qkv_bias:
            parts[f"{ours}attention.qkv.bias"] = [
                rows(f"{attention}{name}.bias", count, own, head_dim) for name, count, own in projections
            ]
        if config.attention_bias:
            parts[f"{ours}attention.output.bias"] = [summed_bias(f"{attention}o_proj.bias")]
        if config.mlp_bias:
            parts[f"{ours}mlp.gate_up.bias"] = [rows(f"{name}.bias", inner, shard.part(inner)) for name in gates]
            parts[f"{ours}mlp.down.bias"] = [summed_bias(f"{mlp}down_proj.bias")]
        if config.qk_norm:
            parts[f"{ours}attention.qk_norm.weight"] = [
                alike(f"{attention}q_norm.weight", head_dim, heads.stop - heads.start),
                alike(f"{attention}k_norm.weight", head_dim, kv_heads.stop - kv_heads.start),
            ]
    return parts


def _build(
    config: ModelConfig,
    source: _Source,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization,
    group: Group | None,
) -> Decoder:
    """A Decoder with the tensors of `source`, each of which must be there, have its shape, and be known."""
    quantization = quantization_of(config, quantization)
    parts = _parts(config, _shard_of(group))
    with torch.device("meta"):
        model = _decoder(config, dtype, group)
        if quantization != "none":
            quantize_decoder(model, quantization=quantization)
    narrow = {name.removesuffix("scale") + "weight" for name, _ in model.named_buffers() if name.endswith("scale")}
    kept = narrow if config.is_float8 else set[str]()
    _check_names(source, parts, kept)
    _check_tied(config, source, *parts["embedding.weight"])
    weights: dict[str, Tensor] = {}
    scale_of = _scale_of(group, quantization)
    for name, stack in parts.items():
        scale = name.removesuffix("weight") + "scale"
        if name in kept:
            weights[name] = _stacked(source, stack, FLOAT8, device)
            weights[scale] = torch.cat([_weight_scale(source, part) for part in stack]).to(device)
        elif name in narrow:
            weight = _stacked(source, stack, torch.float32, device)
            weights[name], weights[scale] = AbsMaxQuantizer.quantize(
                weight, scale_of(name, weight), _STORED[quantization]
            )
        else:
            weights[name] = nn.Parameter(_stacked(source, stack, dtype, device), requires_grad=False)
    model.load_state_dict(weights, assign=True)
    return _joined(model)


def _check_names(source: _Source, parts: dict[str, list[_Part]], kept: set[str]) -> None:
    """Refuse a tensor that is not known, and one that is in float8 where its scale is not, or the other way around.

    Args:
        kept: the weights that are loaded as float8.
    """
    known = {part.name for stack in parts.values() for part in stack}
    narrow = {part.name for name in kept for part in parts[name]}
    known |= {name + WEIGHT_SCALE for name in narrow}
    known |= {name.removesuffix("weight") + INPUT_SCALE for name in narrow}
    for name in source.names:
        # A tied output projection may be saved beside the embedding, and old checkpoints hold rotary constants.
        if name not in known and name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            raise InputError("not a tensor of this architecture", path=source.path, field=name)
        found = source.dtype(name)
        is_float8 = found.lower().startswith(("f8", "float8"))
        if name in narrow and found not in _FLOAT8_NAMES:
            problem = "expected F8_E4M3, as the config has a quantization_config"
        elif name not in narrow and is_float8:
            problem = "expected 16 or 32 bits a number, as its scale is not known"
        else:
            continue
        raise InputError(problem, path=source.path, field=name, value=found)


_FLOAT8_NAMES = ("F8_E4M3", "float8_e4m3fn")
"""Of FLOAT8, in safetensors and in torch."""

_STORED = {"int8": torch.int8, "fp8": FLOAT8}
"""What a quantization keeps weights in."""


def _weight_scale(source: _Source, part: _Part) -> Tensor:
    """The scales of the rank's rows of a weight in float8, [rows, 1], float32; a whole weight's is that of each row."""
    name, rows = part.name + WEIGHT_SCALE, part.shape[0]
    shape = tuple(source.shape(name)) if name in source.names else None
    if shape not in ((), (1,), (rows, 1)):
        problem = f"expected scales of shape [1] or [{rows}, 1]"
        raise InputError(problem, path=source.path, field=name, value=None if shape is None else list(shape))
    scale = source.read(name, ()).float().reshape(-1, 1).expand(rows, 1)
    if not bool(((scale >= 0) & scale.isfinite()).all()):
        raise InputError("expected finite numbers >= 0", path=source.path, field=name)
    return scale[part.own[:1]]


def _shard_of(group: Group | None) -> Shard:
    return Shard() if group is None else group.shard


def _decoder(config: ModelConfig, dtype: torch.dtype, group: Group | None) -> Decoder:
    """A Decoder, or a rank's part of one, without weights."""
    return Decoder(config, dtype) if group is None else ShardedDecoder(config, dtype, group)


def _joined(model: Decoder) -> Decoder:
    """The model, its weights being there, ready to run."""
    return (model.join() if isinstance(model, ShardedDecoder) else model).eval()


def _scale_of(group: Group | None, quantization: Quantization) -> Callable[[str, Tensor], Tensor | None]:
    """The scales of a weight by its name: those of the whole rows, where the rank has parts of them; None where
    the weight has whole rows, each with a scale of its own."""

    def scale(name: str, weight: Tensor) -> Tensor | None:
        if group is None or not name.endswith((".output.weight", ".down.weight")):
            return None
        exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return group.max(absmax_scale(exact, _STORED[quantization]))

    return scale


def _stacked(source: _Source, stack: list[_Part], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The tensors of `stack`, each copied to its place as it is read: beside the weight there is one at a time."""
    lengths = [part.length for part in stack]
    first = stack[0]
    shape = [len(range(*own.indices(size))) for size, own in zip(first.shape, first.own, strict=False)]
    shape += first.shape[len(shape) :]
    shape = [sum(lengths), *(first.shape if first.repeated else shape[1:])]
    weight = torch.empty(shape, dtype=dtype, device=device)
    return _put(weight, (_read(source, part) for part in stack), lengths)


def _put(weight: Tensor, own: Iterable[Tensor], lengths: list[int]) -> Tensor:
    """`weight`, each of the tensors in its place of so many rows, with zeros behind it where it has fewer."""
    tensors = iter(own)
    for place in weight.split(lengths):
        tensor = next(tensors)
        place[: len(tensor)].copy_(tensor)
        place[len(tensor) :].zero_()
        del tensor  # before the next one is read
    return weight


def _check_tied(config: ModelConfig, source: _Source, embedding: _Part) -> None:
    """Refuse an output projection beside a tied embedding that is not the same: it is unclear which one is meant."""
    head = replace(embedding, name="lm_head.weight")
    if not config.tie_word_embeddings or head.name not in source.names:
        return
    if not torch.equal(_read(source, head), _read(source, embedding)):
        problem = f"expected the numbers of {embedding.name}, as the config has tie_word_embeddings"
        raise InputError(problem, path=source.path, field=head.name)


def _read(source: _Source, part: _Part) -> Tensor:
    """The rank's own of the tensor of `part`, its whole shape checked."""
    if part.name not in source.names:
        problem = f"expected a tensor of shape {list(part.shape)}, found none"
        raise InputError(problem, path=source.path, field=part.name)
    shape = tuple(source.shape(part.name))
    tensor = source.read(part.name, part.own if shape == part.shape else ())
    if shape != part.shape or not tensor.is_floating_point():
        problem = f"expected floating point numbers of shape {list(part.shape)}"
        found = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
        raise InputError(problem, path=source.path, field=part.name, value=found)
    if part.is_zero:
        tensor = torch.zeros_like(tensor)
    return tensor if part.repeated is None else tensor.expand(part.repeated, *part.shape)
