"""RooflineLatency: what a step must cost, from the model's shape and the device's bandwidth and arithmetic alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mypy_extensions import mypyc_attr

from twinserve.settings.errors import InputError
from twinserve.settings.limits import plain
from twinserve.sim.devices import Device, named_device
from twinserve.sim.latency import StepFeatures
from twinserve.sim.model_configs import SHAPES, load_shape
from twinserve.sim.quantized_configs import with_float8
from twinserve.sim.shapes import STORED_BITS, Layers, Matrix, ModelShape

MEMORY_SHARE = 0.9
RESERVED_BYTES = 2 * 10**9
ALL_REDUCE_NS = 6_600
"""What an all-reduce of few bytes takes beside its hops: the base latency of a ring with the LL protocol in NCCL's own
model of its speed (src/graph/tuning.cc, baseLat)."""


@mypyc_attr(serializable=True)
class _Mixing:
    """What attention costs in layers that are alike, in nanoseconds on one device.

    Attributes:
        window: tokens that are attended to; None: all.
        pair_ns, prompt_pair_ns: of a query-key pair of a decode and of a prompt.
        expansion_ns: of a token of the context before a prompt's tokens.
        kv_token_ns: in which the keys and values of a token are read.
        state_ns, state_token_ns: in which a sequence's state is read and written, and of a token's arithmetic on it.
    """

    def __init__(
        self,
        window: int | None,
        pair_ns: float,
        prompt_pair_ns: float,
        expansion_ns: float,
        kv_token_ns: float,
        state_ns: float,
        state_token_ns: float,
    ):
        self.window, self.pair_ns, self.prompt_pair_ns = window, pair_ns, prompt_pair_ns
        self.expansion_ns, self.kv_token_ns = expansion_ns, kv_token_ns
        self.state_ns, self.state_token_ns = state_ns, state_token_ns


@mypyc_attr(allow_interpreted_subclasses=True, serializable=True)
class RooflineLatency:
    """The roofline of each operation of a step, summed (Williams, Waterman and Patterson, CACM 52(4), 2009).

    An operation takes the longer of its arithmetic, operations / flops, and its reading, bytes / bandwidth, at the
    shares of the peaks that are reached. For a step of T tokens on a share 1/tp of the model:

    - a projection of n inputs to m outputs: 2 T n m operations; its weights and T (n + m) activations are moved;
    - experts, a layer: those of top_k of them a token; read are as many as T tokens are expected to choose together;
    - attention, a layer: of all decodes together and of each prompt by itself; operations a query-key pair and the
      reading of contexts, both within the window if there is one, as `sim.shapes` has them;
    - linear attention and Mamba, a layer: the states of all rows are read and written;
    - the output projection: as a projection, for the sampled rows alone;
    - a time for what lies between them, a layer;
    - with tp > 1, two all-reduces a layer of T hidden states: 2 (tp - 1) / tp of their bytes over the link, and for
      each a fixed time and one a hop of the ring, as measured, or where nobody has, by NCCL's own model of its speed.

    The host's time is a constant and a cost a sequence.

    Args:
        shape: the model.
        device: where it runs.
        tensor_parallel: devices that share each layer.

    Attributes:
        kv_token_ns: nanoseconds in which the keys and values of a token are read, where no layer has a window.

    Raises:
        ValueError: the heads cannot be shared by so many devices, or no link joins so many.
    """

    def __init__(self, shape: ModelShape, device: Device, tensor_parallel: int = 1):
        _check_degree(shape, device, tensor_parallel)
        self.shape, self.device, self.tensor_parallel = shape, device, tensor_parallel
        shares = device.shares
        self._bandwidth = device.bandwidth * shares.bandwidth / 1e9
        self._flops = device.flops * shares.flops / 1e9
        is_float8 = shape.arithmetic == "float8" and device.float8_flops is not None
        self._quantised_flops = (device.float8_flops or 0.0) * shares.flops / 1e9 if is_float8 else self._flops
        self._mixing = [self._mixed(layers) for layers in shape.layers]
        self.kv_token_ns = sum(mixing.kv_token_ns for mixing in self._mixing if mixing.window is None)
        self._matrices_ns: dict[tuple[int, int], float] = {}

    def _mixed(self, layers: Layers) -> _Mixing:
        device, share, mixer = self.device, self.tensor_parallel, layers.mixer
        flops = device.flops * device.shares.attention_flops / 1e9 * share / layers.count
        bandwidth = device.bandwidth * device.shares.attention_bandwidth / 1e9 / layers.count
        return _Mixing(
            mixer.window,
            mixer.pair_operations / flops,
            mixer.prompt_pair_operations / flops,
            mixer.expansion_operations / flops,
            mixer.kv_values(share) * self.shape.kv_bits / 8 / bandwidth,
            2 * mixer.state_bytes / share / bandwidth,
            mixer.state_operations / flops,
        )

    @property
    def about(self) -> dict[str, Any]:
        """The model, the device with its source, and the degree of parallelism."""
        return {
            "model": self.shape.as_dict(),
            "device": self.device.model_dump(
                mode="json", exclude={"collectives"} if self.device.collectives is None else None
            ),
            "tensor_parallel": self.tensor_parallel,
            "basis": self.basis,
        }

    @property
    def basis(self) -> str:
        """What its step times stand on, in a word or two: "measured" is said of steps that were, and of no others.

        "shares measured": steps of other models, sizes or numbers of devices were measured on this device, and from
        them the shares of its peaks. "datasheet": nothing was measured on it.
        """
        if not self.device.has_own_shares:
            return "datasheet"
        shape = self.shape
        is_plain = shape.weight_bits == shape.kv_bits == STORED_BITS and self.tensor_parallel == 1
        return "measured" if is_plain and shape.name in self.device.shares.shapes else "shares measured"

    @property
    def name(self) -> str:
        """In words."""
        devices = self.device.name if self.tensor_parallel == 1 else f"{self.tensor_parallel} x {self.device.name}"
        return f"roofline of {self.shape.name} on {devices}, {self.basis}"

    @property
    def identity(self) -> str:
        """16 hex digits that only these sizes and figures have."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]

    def num_blocks(self, block_size: int, num_states: int = 0) -> int:
        """KV blocks that fit beside weights, the states of so many sequences and a reserve in a share of the memory.

        Raises:
            ValueError: not even one fits.
        """
        weights = self.shape.weight_bytes(self.tensor_parallel)
        states = num_states * self.shape.state_bytes / self.tensor_parallel
        left = MEMORY_SHARE * self.device.memory_bytes - RESERVED_BYTES - weights - states
        kv_bytes = self.shape.kv_bytes_per_token(self.tensor_parallel)
        count = int(left // (kv_bytes * block_size))
        if count < 1:
            beside = f" and {states / 1e9:.1f} GB of states" if states else ""
            held, room = self.device.memory_bytes / 1e9, RESERVED_BYTES / 1e9
            raise ValueError(
                f"{self.shape.name} has {weights / 1e9:.1f} GB of weights{beside} a device, which leaves no room for "
                f"KV in {MEMORY_SHARE:.0%} of {held:.1f} GB less {room:.0f} GB; "
                "expected a higher tensor-parallel degree"
            )
        return count

    def step_cost(self, features: StepFeatures) -> tuple[int, int]:
        """(host_ns, device_ns) of a step with these features."""
        return self._host(features), round(
            self._matrices(features.tokens, features.sampled) + self._attention(features)
        )

    def repeated_costs(self, features: StepFeatures, count: int) -> tuple[int, np.ndarray]:
        """See RepeatedCosts: of steps that repeat one another, attention alone costs ever more."""
        numbers = np.arange(1, count + 1)
        context = features.decode_kv_tokens + numbers * features.decode_tokens
        prompts = tuple([(start + numbers * length, length) for start, length in features.prompts])
        costs_ns = np.full(count, self._matrices(features.tokens, features.sampled))
        costs_ns += self._attention_of(features, context, prompts)
        return self._host(features), np.rint(costs_ns, out=costs_ns).astype(np.int64)

    def _host(self, features: StepFeatures) -> int:
        return self.device.host_ns + self.device.host_seq_ns * features.seqs

    def _attention(self, features: StepFeatures) -> Any:
        """Nanoseconds of all attention of a step; decodes are one operation, a prompt another."""
        return self._attention_of(features, features.decode_kv_tokens, features.prompts)

    def _attention_of(self, features: StepFeatures, tokens: Any, prompts: Seq[tuple[Any, int]]) -> Any:
        """That of a step like this whose decodes have so many tokens in their contexts, and with such prompts; of
        several, where these are columns, a column."""
        decodes = features.decode_tokens
        total: Any = 0.0
        for mixing in self._mixing:
            if decodes:
                seen = tokens if mixing.window is None else _least(tokens, decodes * mixing.window)
                total = total + seen * max(mixing.pair_ns, mixing.kv_token_ns)
            for start, length in prompts:
                pairs, read = _in_window(start, length, mixing.window)
                operations = pairs * mixing.prompt_pair_ns + start * mixing.expansion_ns
                total = total + _most(operations, read * mixing.kv_token_ns)
            if mixing.state_ns:
                total = total + max(features.seqs * mixing.state_ns, features.tokens * mixing.state_token_ns)
        return total

    def _matrices(self, tokens: int, sampled: int) -> float:
        """Nanoseconds of all projections of a step, of what lies between them, and of all-reduces."""
        known = self._matrices_ns.get((tokens, sampled))
        if known is None:
            known = self._projection(sampled, self.shape.head, 1.0, STORED_BITS, self._flops)
            for layers in self.shape.layers:
                known += layers.count * (self._layer(layers, tokens) + self.device.shares.layer_ns)
            known += self.shape.num_sums * self._all_reduce(tokens)
            self._matrices_ns[tokens, sampled] = known
        return known

    def _layer(self, layers: Layers, tokens: int) -> float:
        """Nanoseconds of the projections of a layer, experts included."""
        shape, network = self.shape, layers.network
        total = 0.0
        for matrix in layers.matrices(shape.hidden_size):
            flops = self._quantised_flops if matrix.is_quantised else self._flops
            total += self._projection(tokens, matrix, 1.0, shape.bits_of(matrix), flops)
        chosen, read = tokens * network.top_k, network.distinct(tokens)
        for matrix in network.of_each(shape.hidden_size):
            total += self._projection(chosen, matrix, read, shape.bits_of_experts, self._quantised_flops)
        return total

    def _all_reduce(self, tokens: int) -> float:
        """Nanoseconds of an all-reduce of the hidden states of so many tokens."""
        share = self.tensor_parallel
        if share == 1:
            return 0.0
        moved = 2 * (share - 1) / share * tokens * self.shape.hidden_size * STORED_BITS / 8
        measured = self.device.collectives
        if measured is None:
            return ALL_REDUCE_NS + 2 * (share - 1) * self.device.hop_ns + moved / (self.device.link / 1e9)
        more_hops = 2 * (share - measured.ranks)
        return max(0.0, measured.all_reduce_ns + more_hops * self.device.hop_ns) + moved / (measured.link / 1e9)

    def _projection(self, rows: int, matrix: Matrix, copies: float, bits: float, flops: float) -> float:
        """Nanoseconds of a matrix product of so many rows, of which so many different matrices are read."""
        if not rows:
            return 0.0
        share = self.tensor_parallel if matrix.is_split else 1
        activations = rows * (matrix.inputs + matrix.outputs / share) * STORED_BITS / 8
        moved = copies * matrix.size / share * bits / 8 + activations
        return max(2.0 * rows * matrix.size / share / flops, moved / self._bandwidth)

    @classmethod
    def parse(cls, text: str) -> RooflineLatency:
        """From "MODEL@DEVICE", with options behind it: ":tp=N", ":quantization=fp8", ":kv_cache_dtype=fp8".

        MODEL is a shape that ships, a config.json or its folder.

        Raises:
            InputError: the text has another form, or a part of it is not known.
        """
        model, at, rest = text.rpartition("@")
        device_name, *given = rest.split(":")
        options = dict(option.partition("=")[::2] for option in given)
        if not at or not set(options) <= {"tp", *_FLOAT8} or len(options) < len(given):
            raise InputError(
                "expected roofline:MODEL@DEVICE, and behind it :tp=N, :quantization=fp8 or :kv_cache_dtype=fp8",
                field="latency",
                value=text,
            )
        device, shape = named_device(device_name), named_shape(model)
        try:
            for name, value in options.items():
                if name in _FLOAT8:
                    if value != "fp8":
                        raise ValueError(f"{name} is {value}, expected fp8")
                    shape = _FLOAT8[name](shape)
            return cls(shape, device, int(plain(options.get("tp", "1"))))
        except ValueError as error:
            raise InputError(str(error), field="latency", value=text) from error


def named_shape(model: str) -> ModelShape:
    """The shape that ships under a name, or that of a config.json or its folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    shape = SHAPES.get(model.lower())
    if shape is not None:
        return shape
    if not os.path.exists(model):
        raise InputError(
            f"expected a config.json, a folder with one, or a shape that ships: {', '.join(SHAPES)}",
            field="latency",
            value=model,
        )
    return load_shape(Path(model))


def _with_float8_kv(shape: ModelShape) -> ModelShape:
    return replace(shape, kv_bits=8)


_FLOAT8: dict[str, Callable[[ModelShape], ModelShape]] = {
    "quantization": with_float8,
    "kv_cache_dtype": _with_float8_kv,
}
"""What options by vLLM's names make of a shape."""


def _check_degree(shape: ModelShape, device: Device, tensor_parallel: int) -> None:
    """Raise ValueError if so many devices cannot share the model."""
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel is {tensor_parallel}, expected >= 1")
    reasons = [layers.mixer.why_not(tensor_parallel) for layers in shape.layers]
    if tensor_parallel > device.linked:
        reasons.append(f"expected at most {device.linked}, as many as share a link of the {device.name}")
    for reason in reasons:
        if reason is not None:
            raise ValueError(f"tensor_parallel is {tensor_parallel}, {reason}")


def _in_window(start: Any, length: int, window: int | None) -> tuple[Any, Any]:
    """Query-key pairs of a prompt's tokens, and the tokens whose keys and values they read.

    The i-th token of the context sees the window's last ones: min(i, window).
    """
    end = start + length
    if window is None:
        return length * start + length * (length + 1) // 2, end
    seen = _triangle(_least(end, window)) - _triangle(_least(start, window))
    beyond = end - _most(start, window)
    return seen + window * _most(beyond, 0), _least(end, window + length - 1)


def _triangle(count: Any) -> Any:
    return count * (count + 1) // 2


def _most(one: Any, other: Any) -> Any:
    """max, of two numbers or of each pair in columns."""
    return np.maximum(one, other) if isinstance(one, np.ndarray) or isinstance(other, np.ndarray) else max(one, other)


def _least(one: Any, other: Any) -> Any:
    """min, of two numbers or of each pair in columns."""
    return np.minimum(one, other) if isinstance(one, np.ndarray) or isinstance(other, np.ndarray) else min(one, other)
