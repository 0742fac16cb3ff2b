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
from twinserve.sim.devices import Device, named_device
from twinserve.sim.latency import StepCost, StepFeatures
from twinserve.sim.model_configs import SHAPES, load_shape
from twinserve.sim.quantized_configs import with_float8
from twinserve.sim.shapes import STORED_BITS, Experts, Layers, Matrix, ModelShape
from twinserve.sim.splits import Links, Split, Stage, stages_of

MEMORY_SHARE = 0.9
RESERVED_BYTES = 2 * 10**9
_NUMBERS = (int, float)
_NOT_COUNTED = {"limit_w", "measured_power", "nvlink", "collectives"}
"""Of a device, what no step's time depends on, or what is told apart."""


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
    shares of the peaks that are reached. For a step of T tokens on a share 1/tp of each layer:

    - a projection of n inputs to m outputs: 2 T n m operations; its weights and T (n + m) activations are moved;
    - experts, a layer: those of top_k of them a token; read are as many as T tokens are expected to choose together;
    - attention, a layer: of all decodes together and of each prompt by itself; operations a query-key pair and the
      reading of contexts, both within the window if there is one, as `sim.shapes` has them;
    - linear attention and Mamba, a layer: the states of all rows are read and written;
    - the output projection: as a projection, for the sampled rows alone;
    - a time for what lies between them, a layer;
    - with tp > 1, two all-reduces a layer of T hidden states: 2 (tp - 1) / tp of their bytes over the link, and for
      each a fixed time and one a hop of the ring, as measured, or where nobody has, as `Device.all_reduces` says;
    - with ep > 1, experts are whole, and a device has 1 / ep of them: it computes T top_k / tp rows, and reads its
      share of those that the tokens of all dp ranks choose together;
    - with dp > 1, a layer of experts has an all-to-all before and behind them, see `Links.exchange_ns`, and its two
      sums are a reduce-scatter and an all-gather, which take one all-reduce together;
    - with pp > 1, a stage takes its share of the layers' time, the last one the output projection, and all but the
      first what the one before sends, see `Links.send_ns`.

    A rank of dp is priced as if all had steps like its own, and waited for none; each expert is chosen alike often.
    The host's time is a constant and a cost a sequence.

    Args:
        shape: the model.
        device: where it runs.
        tensor_parallel: devices that share each layer.
        split: how many devices share what, in place of `tensor_parallel`.

    Attributes:
        kv_token_ns: nanoseconds in which the keys and values of a token are read, where no layer has a window.

    Raises:
        ValueError: the model cannot be shared so, or no link joins so many.
    """

    def __init__(self, shape: ModelShape, device: Device, tensor_parallel: int = 1, split: Split | None = None):
        self.split = Split(tensor_parallel) if split is None else split
        self.split.check(shape, device)
        self.shape, self.device, self.tensor_parallel = shape, device, self.split.tensor
        self.stages = stages_of(shape, self.split)
        self._links = Links(shape, device, self.split)
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
        device = self.device.model_dump(mode="json", exclude=_NOT_COUNTED)
        sums = self.device.collectives if self.tensor_parallel == 1 else self.device.all_reduces
        return {
            "model": self.shape.as_dict(),
            "device": device if sums is None else device | {"collectives": sums.model_dump(mode="json")},
            **self.split.facts,
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
        is_plain = shape.weight_bits == shape.kv_bits == STORED_BITS and self.split.is_whole
        return "measured" if is_plain and shape.name in self.device.shares.shapes else "shares measured"

    @property
    def name(self) -> str:
        """In words, those among them that say what is assumed of links."""
        count, split = self.split.num_devices * self.split.data, self.split
        devices = self.device.name if count == 1 else f"{count} x {self.device.name}"
        shared = "" if count == split.tensor and split.expert == 1 else f" ({split})"
        return f"roofline of {self.shape.name} on {devices}{shared}, {self.basis}{self._assumed}"

    @property
    def _assumed(self) -> str:
        """What is said of all-reduces that nobody has measured."""
        if self.tensor_parallel == 1 or self.device.collectives is not None:
            return ""
        sums = self.device.all_reduces
        return ", all-reduces " + ("by NCCL's own model" if sums is None else sums.source)

    @property
    def identity(self) -> str:
        """16 hex digits that only these sizes and figures have."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]

    def num_blocks(self, block_size: int, num_states: int = 0) -> int:
        """KV blocks that fit beside weights, the states of so many sequences and a reserve in a share of the memory: of
        the stage that has room for the fewest.

        Raises:
            ValueError: not even one fits.
        """
        counts = [self._blocks_of(stage, block_size, num_states) for stage in self.stages]
        count, weights, states = min(counts)
        if count < 1:
            beside = f" and {states / 1e9:.1f} GB of states" if states else ""
            held, room = self.device.memory_bytes / 1e9, RESERVED_BYTES / 1e9
            raise ValueError(
                f"{self.shape.name} has {weights / 1e9:.1f} GB of weights{beside} a device, which leaves no room for "
                f"KV in {MEMORY_SHARE:.0%} of {held:.1f} GB less {room:.0f} GB; "
                "expected a higher tensor-parallel degree"
            )
        return count

    def _blocks_of(self, stage: Stage, block_size: int, num_states: int) -> tuple[int, float, float]:
        """The KV blocks of a device of a stage; bytes of its weights, and of its states."""
        weights = stage.weight_bytes(self.shape, self.split)
        states = stage.share * num_states * self.shape.state_bytes / self.tensor_parallel
        left = MEMORY_SHARE * self.device.memory_bytes - RESERVED_BYTES - weights - states
        kv_bytes = stage.share * self.shape.kv_bytes_per_token(self.tensor_parallel)
        return int(left // (kv_bytes * block_size)), weights, states

    def step_cost(self, features: StepFeatures) -> tuple[int, int] | StepCost:
        """(host_ns, device_ns) of a step with these features; of a pipeline, with what each of its stages takes."""
        layers_ns = self._matrices(features.tokens, features.sampled) + self._attention(features)
        if len(self.stages) == 1:
            return self._host(features), round(layers_ns)
        stages = self._stages_ns(features, layers_ns)
        return StepCost(self._host(features), sum(stages), stages=stages)

    def _stages_ns(self, features: StepFeatures, total_ns: float) -> tuple[int, ...]:
        """What each stage takes of a step that takes so long without sends, in nanoseconds."""
        head_ns = self._head(features.sampled)
        stages = []
        for place, stage in enumerate(self.stages):
            own_ns = stage.share * (total_ns - head_ns) + (head_ns if stage.is_last else 0.0)
            stages.append(round(own_ns + (self._links.send_ns(place - 1, features.tokens) if place else 0.0)))
        return tuple(stages)

    def repeated_costs(self, features: StepFeatures, count: int) -> tuple[int, np.ndarray] | None:
        """See RepeatedCosts: of steps that repeat one another, attention alone costs ever more."""
        if len(self.stages) > 1:
            return None
        context = _grown(features.decode_kv_tokens, features.decode_tokens, count)
        prompts = tuple([(_grown(start, length, count), length) for start, length in features.prompts])
        costs_ns = self._attention_of(features, context, prompts) + self._matrices(features.tokens, features.sampled)
        if not isinstance(costs_ns, np.ndarray):
            costs_ns = np.full(count, costs_ns)
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
            known = self._head(sampled)
            num_sums = self.shape.num_sums
            for layers in self.shape.layers:
                known += layers.count * (self._layer(layers, tokens) + self.device.shares.layer_ns)
                if self.split.data > 1 and isinstance(layers.network, Experts):
                    known += layers.count * 2 * self._links.exchange_ns(layers, tokens)
                    num_sums -= layers.count
            known += num_sums * self._links.all_reduce_ns(tokens)
            self._matrices_ns[tokens, sampled] = known
        return known

    def _head(self, sampled: int) -> float:
        """Nanoseconds of the output projection of so many rows."""
        return self._projection(sampled, self.shape.head, 1.0, STORED_BITS, self._flops)

    def _layer(self, layers: Layers, tokens: int) -> float:
        """Nanoseconds of the projections of a layer, experts included."""
        shape, network, split = self.shape, layers.network, self.split
        total = 0.0
        for matrix in layers.matrices(shape.hidden_size):
            flops = self._quantised_flops if matrix.is_quantised else self._flops
            total += self._projection(tokens, matrix, 1.0, shape.bits_of(matrix), flops)
        chosen, read, is_whole = float(tokens * network.top_k), network.distinct(tokens), split.expert > 1
        if is_whole:
            chosen, read = chosen / split.tensor, network.distinct(tokens * split.data) / split.expert
        for matrix in network.of_each(shape.hidden_size):
            total += self._projection(chosen, matrix, read, shape.bits_of_experts, self._quantised_flops, is_whole)
        return total

    def _projection(
        self, rows: float, matrix: Matrix, copies: float, bits: float, flops: float, is_whole: bool = False
    ) -> float:
        """Nanoseconds of a matrix product of so many rows, of which so many different matrices are read; `is_whole`:
        however it may be split, a device has all of it."""
        if not rows:
            return 0.0
        share = self.split.tensor if matrix.is_split and not is_whole else 1
        activations = rows * (matrix.inputs + matrix.outputs / share) * STORED_BITS / 8
        moved = copies * matrix.size / share * bits / 8 + activations
        return max(2.0 * rows * matrix.size / share / flops, moved / self._bandwidth)

    @classmethod
    def parse(cls, text: str) -> RooflineLatency:
        """From "MODEL@DEVICE", with options behind it: ":tp=N", ":pp=N", ":dp=N", ":ep=N", ":quantization=fp8",
        ":kv_cache_dtype=fp8".

        MODEL is a shape that ships, a config.json or its folder.

        Raises:
            InputError: the text has another form, or a part of it is not known.
        """
        model, at, rest = text.rpartition("@")
        device_name, *given = rest.split(":")
        options = dict(option.partition("=")[::2] for option in given)
        if not at or not set(options) <= {"tp", "pp", "dp", "ep", *_FLOAT8} or len(options) < len(given):
            raise InputError(
                "expected roofline:MODEL@DEVICE, and behind it :tp=N, :pp=N, :dp=N, :ep=N, :quantization=fp8 or "
                ":kv_cache_dtype=fp8",
                field="latency",
                value=text,
            )
        device, shape = named_device(device_name), named_shape(model)
        try:
            for name in filter(options.__contains__, _FLOAT8):
                if options[name] != "fp8":
                    raise ValueError(f"{name} is {options[name]}, expected fp8")
                shape = _FLOAT8[name](shape)
            degrees = [option for option in given if option.partition("=")[0] not in _FLOAT8]
            return cls(shape, device, split=Split.parse(":".join(degrees)) if degrees else None)
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


def _grown(tokens: int, more: int, count: int) -> Any:
    """A number of tokens that becomes so many more in each of `count` steps, from the first on."""
    return np.arange(tokens + more, tokens + count * more + 1, more) if more else tokens


def _triangle(count: Any) -> Any:
    return count * (count + 1) // 2


def _most(one: Any, other: Any) -> Any:
    """max, of two numbers or of each pair in columns."""
    return max(one, other) if isinstance(one, _NUMBERS) and isinstance(other, _NUMBERS) else np.maximum(one, other)


def _least(one: Any, other: Any) -> Any:
    """min, of two numbers or of each pair in columns."""
    return min(one, other) if isinstance(one, _NUMBERS) and isinstance(other, _NUMBERS) else np.minimum(one, other)
