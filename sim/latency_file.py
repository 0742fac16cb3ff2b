"""What a latency file holds: names, kinds and units, checked before a model is made of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, Strict, with_config
from typing_extensions import TypedDict

from twinserve.settings.limits import MOST_REPLICAS
from twinserve.traces.kinds import checker

_STRICT = with_config(ConfigDict(strict=True))
_MOST = 1 << 40
"""More than any count of tokens, and in nanoseconds 18 minutes: no step takes so long."""

Nanoseconds = Annotated[float, Field(ge=0, le=_MOST, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Range = Annotated[tuple[Count, Count], Strict(False)]
Level = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]


@_STRICT
class Part(TypedDict):
    """Of the host, the device or the lead: coefficients in nanoseconds a unit, and where ramps over tokens end."""

    knots: list[Count]
    ns: dict[str, Nanoseconds]


@_STRICT
class Regime(TypedDict):
    """Steps of decodes, steps with prompts, or those beyond captured graphs."""

    host: Part
    device: Part
    lead: NotRequired[Part]


@_STRICT
class Regimes(TypedDict):
    """Each with its coefficients."""

    decode: Regime
    prompt: Regime
    eager: NotRequired[Regime]


@_STRICT
class Ranges(TypedDict):
    """The least and the most of each feature that was measured, by regime."""

    decode: dict[str, Range]
    prompt: dict[str, Range]
    eager: NotRequired[dict[str, Range]]


@_STRICT
class About(TypedDict):
    """What was measured."""

    model: str
    device: str
    shape: NotRequired[dict[str, Any]]
    dtype: NotRequired[str]
    kv_cache_dtype: NotRequired[str]
    quantization: NotRequired[str]
    tensor_parallel_size: NotRequired[Annotated[int, Field(ge=1, le=MOST_REPLICAS)]]


@_STRICT
class LatencyFile(TypedDict):
    """A latency file; `drift` are factors on the host's part."""

    schema: Literal["twinserve-latency/1", "twinserve-latency/2"]
    about: About
    regimes: Regimes
    range: Ranges
    residuals: dict[str, Any]
    drift: NotRequired[list[Level]]
    captured_tokens: NotRequired[Count | None]
    kernels: NotRequired[dict[str, Any]]


check_latency_file = checker(LatencyFile)
