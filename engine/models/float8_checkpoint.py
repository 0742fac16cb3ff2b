"""Checkpoints in float8: which a config's `quantization_config` says that can be loaded as they are.

The weights of the linear layers are e4m3 with a scale a row or a tensor, `NAME.weight_scale` beside `NAME.weight`.
That is compressed-tensors' `float-quantized`, and `fp8` as vLLM reads it. Which tensors are in float8 the files say;
lists of layers that are left out are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinserve.settings.errors import InputError

WEIGHT_SCALE, INPUT_SCALE = "_scale", "input_scale"
"""Behind the name of a weight; in place of its `weight`, for activations: those are scaled by their own largest."""

_FP8: dict[str, tuple[object, ...]] = {
    "activation_scheme": ("dynamic", "static", None),
    "weight_block_size": (None,),
    "fmt": ("e4m3", None),
    "scale_fmt": (None,),
}
_COMPRESSED: dict[str, tuple[object, ...]] = {
    "format": ("float-quantized",),
    "quantization_status": ("compressed", None),
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_GROUP: dict[str, tuple[object, ...]] = {
    "targets": (["Linear"],),
    "format": ("float-quantized", None),
    "output_activations": (None,),
}
_NUMBERS: dict[str, tuple[object, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "symmetric": (True, None),
    "group_size": (None,),
    "block_structure": (None,),
}
_WEIGHTS = _NUMBERS | {"strategy": ("channel", "tensor"), "dynamic": (False, None)}
_ACTIVATIONS = _NUMBERS | {"strategy": ("token", "tensor"), "dynamic": (True, False)}


def is_float8(values: Mapping[str, Any], path: object) -> bool:
    """Whether a config says that its weights are in float8, which is all that a `quantization_config` may say.

    Raises:
        InputError: it says something else.
    """
    said = values.get("quantization_config")
    if said is None or said == {}:
        return False
    config = _Said(said, path, "quantization_config")
    method = config.one_of("quant_method", ("fp8", "compressed-tensors"))
    if method == "fp8":
        config.refuse_beyond(_FP8)
        return True
    config.refuse_beyond(_COMPRESSED)
    groups = config.part("config_groups")
    if len(groups.values) != 1:
        raise groups.error("expected one group, for Linear", sorted(groups.values))
    group = groups.part(next(iter(groups.values)))
    group.refuse_beyond(_GROUP)
    group.part("weights").refuse_beyond(_WEIGHTS)
    group.part("input_activations").refuse_beyond(_ACTIVATIONS)
    return True


class _Said:
    """An object of a config, by the name that an error has for it."""

    def __init__(self, values: object, path: object, name: str):
        self._path, self._name = path, name
        if not isinstance(values, Mapping):
            raise self.error("expected an object", values)
        self.values: Mapping[str, Any] = values

    def error(self, expected: str, value: object, field: str = "") -> InputError:
        return InputError(expected, path=self._path, field=self._name + field, value=value)

    def part(self, field: str) -> _Said:
        return _Said(self.values.get(field), self._path, f"{self._name}.{field}")

    def one_of(self, field: str, allowed: tuple[object, ...]) -> object:
        value = self.values.get(field)
        if value not in allowed:
            names = " or ".join("none" if one is None else str(one) for one in allowed)
            raise self.error(f"expected {names}", value, f".{field}")
        return value

    def refuse_beyond(self, known: Mapping[str, tuple[object, ...]]) -> None:
        """Raise InputError for a field that asks for another scheme."""
        for field, allowed in known.items():
            self.one_of(field, allowed)
