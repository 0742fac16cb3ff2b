"""What a model is in numbers, and on a device."""

from __future__ import annotations

from typing import Any

from twinserve.settings.errors import InputError
from twinserve.sim.latency import StepFeatures
from twinserve.sim.roofline import RooflineLatency, named_shape
from twinserve.sim.shapes import Attention, Experts, Layers, LinearAttention, Mamba, ModelShape

BLOCK_SIZE = 16
CONTEXT = 1024
_DECODES = (1, 16, 128)


def described(text: str) -> dict[str, Any]:
    """What there is to say of "MODEL", "MODEL@DEVICE" or "MODEL@DEVICE:tp=N": values by what they are, with units.

    Raises:
        InputError: the model or the device is not known, or the model does not fit.
    """
    if "@" not in text:
        return _of_shape(named_shape(text))
    latency = RooflineLatency.parse(text)
    split = latency.split
    weights = [stage.weight_bytes(latency.shape, split) for stage in latency.stages]
    count = split.num_devices * split.data
    try:
        blocks = latency.num_blocks(BLOCK_SIZE)
    except ValueError as error:
        raise InputError(str(error), field="model", value=text) from error
    rows = _of_shape(latency.shape) | {
        "device": ", ".join(filter(None, (f"{count} x {latency.device.name}", str(split), latency.basis))),
        "weights a device, GB": _gigabytes(weights),
        f"blocks of {BLOCK_SIZE} tokens": blocks,
        "tokens in the pool": blocks * BLOCK_SIZE,
    }
    for count in _DECODES:
        rows[f"step of {count} decodes at {CONTEXT}, ms"] = _milliseconds(latency, _decodes(count))
    rows[f"step of a prompt of {CONTEXT}, ms"] = _milliseconds(latency, _prompt(CONTEXT))
    return rows


def _of_shape(shape: ModelShape) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "parameters, billions": round(shape.num_parameters / 1e9, 2),
        "of which a token uses": round(shape.num_active_parameters / 1e9, 2),
        "weights, GB": round(shape.weight_bytes() / 1e9, 2),
        "layers": "; ".join(map(_words_of, shape.layers)),
        "KV a token, bytes": round(shape.kv_bytes_per_token()),
    }
    if shape.state_bytes:
        rows["state a sequence, MB"] = round(shape.state_bytes / 1e6, 1)
    return rows


def _words_of(layers: Layers) -> str:
    mixer, network = layers.mixer, layers.network
    if isinstance(mixer, Attention):
        window = f" in a window of {mixer.window}" if mixer.window else ""
        words = f"{mixer.num_heads} heads, {mixer.num_kv_heads} of KV, {mixer.head_dim} wide{window}"
    elif isinstance(mixer, Mamba):
        words = f"Mamba of {mixer.num_heads} heads of {mixer.head_dim}, {mixer.state_dim} kept of each value"
    elif isinstance(mixer, LinearAttention):
        words = f"linear attention of {mixer.num_value_heads} heads"
    else:
        words = f"latent attention of {mixer.num_heads} heads, {mixer.kv_rank} + {mixer.rope_dim} kept"
    if isinstance(network, Experts):
        shared = f" and {network.shared_inner} shared" if network.shared_inner else ""
        return f"{layers.count} with {words}; {network.top_k} of {network.num} experts of {network.inner}{shared}"
    if not network.inner:
        return f"{layers.count} with {words}; no network"
    return f"{layers.count} with {words}; {'gated ' if network.is_gated else ''}network of {network.inner}"


def _gigabytes(weights: list[float]) -> float | str:
    """Of the stages of a pipeline, those of each."""
    sizes = [round(size / 1e9, 2) for size in weights]
    return sizes[0] if len(sizes) == 1 else ", ".join(map(str, sizes))


def _milliseconds(latency: RooflineLatency, features: StepFeatures) -> float:
    return round(latency.step_cost(features)[1] / 1e6, 3)


def _decodes(rows: int) -> StepFeatures:
    tokens = rows * CONTEXT
    return StepFeatures(0, rows, 0, rows, tokens, tokens, rows, longest_decode=CONTEXT)


def _prompt(tokens: int) -> StepFeatures:
    return StepFeatures(0, 1, tokens, 0, tokens, tokens * (tokens + 1) // 2, 1, prompts=((0, tokens),))
