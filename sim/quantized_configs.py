"""Quantisation as Hugging Face configurations say it: stored bits of weights and of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from twinserve.settings.errors import InputError
from twinserve.sim.shapes import STORED_BITS, ModelShape
from twinserve.traces.kinds import checker
from twinserve.traces.lines import Line

SAID_OF_WEIGHTS = ("dtype", "torch_dtype", "quantization_config")
"""The fields of a configuration that are read here."""
_LEFT_OUT = ("lm_head", "embed", "gate", "norm", "router", "visual", "vision", "indexer")
"""What is not quantised and need not be: small, or counted with 16 bits anyway."""


_STRICT = with_config(ConfigDict(strict=True))
_Size = Annotated[int, Field(ge=1, le=1 << 24)]


@_STRICT
class _Numbers(TypedDict):
    """How some numbers are stored."""

    type: NotRequired[str]
    num_bits: Annotated[int, Field(ge=1, le=32)]
    group_size: NotRequired[int | None]


@_STRICT
class _Group(TypedDict):
    """Of compressed-tensors, what is stored alike."""

    targets: NotRequired[list[str]]
    weights: NotRequired[_Numbers | None]
    input_activations: NotRequired[_Numbers | None]


@_STRICT
class _Quantization(TypedDict):
    """Of a quantization_config, the fields that are read."""

    quant_method: str
    modules_to_not_convert: NotRequired[list[str] | None]
    ignore: NotRequired[list[str] | None]
    weight_block_size: NotRequired[Annotated[list[_Size], Field(min_length=2, max_length=2)] | None]
    config_groups: NotRequired[dict[str, _Group] | None]
    kv_cache_scheme: NotRequired[_Numbers | None]


@_STRICT
class _Config(TypedDict):
    quantization_config: _Quantization


_check_kinds = checker(_Config)


def quantized(shape: ModelShape, config: dict[str, Any], path: Path) -> ModelShape:
    """The shape with the bits that its configuration says, of which `config` has the fields `SAID_OF_WEIGHTS`.

    Raises:
        InputError: it says something that is not modelled.
    """
    for name in ("dtype", "torch_dtype"):
        if (dtype := config.get(name)) not in (None, "bfloat16", "float16"):
            raise InputError(
                "expected bfloat16 or float16, other arithmetic is not modelled", path=path, field=name, value=dtype
            )
    said = config.get("quantization_config")
    if said is None:
        return shape
    _check_kinds(Line(path, None, {"quantization_config": said}))
    method = said["quant_method"]
    if method not in _METHODS:
        known = f"expected one that is known: {', '.join(_METHODS)}"
        raise InputError(known, path=path, field="quantization_config.quant_method", value=method)
    return _METHODS[method](shape, said, path)


def with_float8(shape: ModelShape) -> ModelShape:
    """The shape with weights of 8 bits, and arithmetic on such, as vLLM's `--quantization fp8` has it.

    Raises:
        ValueError: its weights are quantised already.
    """
    if shape.weight_bits != STORED_BITS or shape.expert_bits is not None:
        raise ValueError(f"quantization is fp8, expected none: {shape.name} is quantised already")
    return replace(shape, weight_bits=8, arithmetic="float8")


def _float8(shape: ModelShape, said: dict[str, Any], path: Path) -> ModelShape:
    _check_whole(said.get("modules_to_not_convert"), path, "modules_to_not_convert")
    block = said.get("weight_block_size")
    scale_bits = 32 / (block[0] * block[1]) if block else 0.0
    return replace(shape, weight_bits=8 + scale_bits, arithmetic="float8")


def _grouped(shape: ModelShape, said: dict[str, Any], path: Path) -> ModelShape:
    """AWQ and GPTQ: integers of few bits with a scale and a zero a group of weights, multiplied in 16 bits."""
    _check_whole(said.get("modules_to_not_convert"), path, "modules_to_not_convert")
    bits, group = said.get("bits", 4), said.get("group_size", 128)
    if bits not in (4, 8):
        raise InputError("expected 4 or 8", path=path, field="quantization_config.bits", value=bits)
    return replace(shape, weight_bits=bits + _per_weight(group, STORED_BITS + bits, path))


def _mxfp4(shape: ModelShape, said: dict[str, Any], path: Path) -> ModelShape:
    """Experts alone in 4 bits, with a scale of 8 bits for each 32 of them (OCP Microscaling Formats 1.0)."""
    return replace(shape, expert_bits=4 + 8 / 32)


def _compressed(shape: ModelShape, said: dict[str, Any], path: Path) -> ModelShape:
    """compressed-tensors, of which one group is for all linear layers."""
    _check_whole(said.get("ignore"), path, "ignore")
    groups = list((said.get("config_groups") or {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise InputError(
            "expected one group, for Linear", path=path, field="quantization_config.config_groups", value=len(groups)
        )
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    kinds = tuple(f"{part.get('type')}{part['num_bits']}" if part else None for part in (weights, inputs))
    if kinds not in (("float8", "float8"), ("float8", None), ("int8", None), ("int4", None)):
        problem = "expected float8 weights, or int8 or int4 ones with activations of 16 bits"
        raise InputError(problem, path=path, field="quantization_config.config_groups", value=kinds)
    kv_scheme = said.get("kv_cache_scheme")
    return replace(
        shape,
        weight_bits=weights["num_bits"] + _per_weight(weights.get("group_size") or -1, STORED_BITS, path),
        arithmetic="float8" if inputs else "bfloat16",
        kv_bits=kv_scheme["num_bits"] if kv_scheme else shape.kv_bits,
    )


def _per_weight(group: int, bits: int, path: Path) -> float:
    """Bits a weight of what is said of each group of weights; of a whole row, with -1, next to none."""
    if type(group) is not int or (group != -1 and group < 1):
        raise InputError("expected an integer >= 1 or -1", path=path, field="group_size", value=group)
    return 0.0 if group == -1 else bits / group


def _check_whole(left_out: Any, path: Path, name: str) -> None:
    """Refuse a model of which some large matrices are quantised and others are not."""
    for module in left_out or []:
        if not any(part in str(module) for part in _LEFT_OUT):
            raise InputError(
                f"expected no large matrix: only {', '.join(_LEFT_OUT)} may stay as they are",
                path=path,
                field=f"quantization_config.{name}",
                value=module,
            )


_METHODS: dict[str, Callable[[ModelShape, dict[str, Any], Path], ModelShape]] = {
    "fp8": _float8,
    "awq": _grouped,
    "gptq": _grouped,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
}
