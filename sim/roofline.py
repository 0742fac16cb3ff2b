"""RooflineLatency: what a step must cost, from the model's shape and the device's bandwidth and arithmetic alone."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mypy_extensions import mypyc_attr

from twinserve.settings.errors import InputError
from twinserve.sim.latency import StepFeatures
from twinserve.sim.shapes import SHAPES, ModelShape

GIB = 1 << 30
MEMORY_SHARE = 0.9
RESERVED_BYTES = 2 * 10**9
ALL_REDUCE_NS = 10_000


@mypyc_attr(native_class=False)  # it is pickled, which a frozen native class cannot be
@dataclass(frozen=True)
class Device:
    """What a device can do.

    Attributes:
        bandwidth: bytes read from its memory a second, at the peak.
        flops: dense bfloat16 operations a second, at the peak.
        bandwidth_share, flops_share: of the peaks, what is reached.
        memory_bytes: of its memory.
        link: bytes a second to its peers and from them, each way; all-reduce goes through it.
        host_ns, host_seq_ns: what an engine's host takes for a step, and for each of its sequences.
        multiprocessors: of them, each runs thread blocks of its own.
        basis: "measured": bandwidth and flops were measured on such a device; "datasheet": peaks of its data sheet, and
            shares as measured on the H100.
        source: where the peaks are from.
    """

    name: str
    bandwidth: float
    flops: float
    memory_bytes: int
    link: float
    multiprocessors: int
    basis: Literal["measured", "datasheet"]
    source: str
    bandwidth_share: float = 0.92
    flops_share: float = 0.73
    host_ns: int = 1_900_000
    host_seq_ns: int = 25_000


DEVICES = {
    device.name.lower().replace(" ", ""): device
    for device in (
        Device(
            "H100",
            3.35e12,
            989e12,
            80 * GIB,
            450e9,
            132,
            "measured",
            "NVIDIA H100 data sheet, SXM; 3.08 TB/s read and 650 to 800 TFLOP/s measured; host: vLLM 0.24's records",
        ),
        Device("A100", 2.039e12, 312e12, 80 * GIB, 300e9, 108, "datasheet", "NVIDIA A100 data sheet, 80 GB SXM"),
        Device("H200", 4.8e12, 989e12, 141 * 10**9, 450e9, 132, "datasheet", "NVIDIA H200 data sheet, SXM"),
        Device("L4", 0.3e12, 121e12, 24 * 10**9, 32e9, 58, "datasheet", "NVIDIA L4 data sheet; PCIe 4.0 x16"),
        Device("L40S", 0.864e12, 362e12, 48 * 10**9, 32e9, 142, "datasheet", "NVIDIA L40S data sheet; PCIe 4.0 x16"),
        Device(
            "RTX 4090",
            1.008e12,
            165.2e12,
            24 * 10**9,
            32e9,
            128,
            "datasheet",
            "NVIDIA Ada GPU architecture white paper, FP32 accumulate; PCIe 4.0 x16",
        ),
        Device(
            "MI300X",
            5.3e12,
            1307.4e12,
            192 * 10**9,
            448e9,
            304,
            "datasheet",
            "AMD Instinct MI300X data sheet; seven links of 64 GB/s each way",
        ),
    )
}


def device_of(name: str) -> Device | None:
    """The device that a driver's name stands for, such as "NVIDIA H100 80GB HBM3"; None if it is not among DEVICES."""
    return next((device for device in DEVICES.values() if device.name in name.replace("-", " ").split()), None)


@mypyc_attr(allow_interpreted_subclasses=True, serializable=True)
class RooflineLatency:
    """The roofline of each operation of a step, summed (Williams, Waterman and Patterson, CACM 52(4), 2009).

    An operation takes the longer of its arithmetic, operations / flops, and its reading, bytes / bandwidth. For a step
    of T tokens on a share 1/tp of the model:

    - a projection of n inputs to m outputs: 2 T n m operations; its weights and T (n + m) activations are moved;
    - attention, a layer: 4 d operations a query head and query-key pair; the keys and values of all contexts are read;
    - the output projection: as a projection, for the sampled rows alone;
    - with tp > 1, two all-reduces a layer of T hidden states: 2 (tp - 1) / tp of their bytes over the link, and a fixed
      time each.

    The host's time is a constant and a cost a sequence. What engines lose between operations is in neither.

    Args:
        shape: the model.
        device: where it runs.
        tensor_parallel: devices that share each layer.

    Attributes:
        kv_token_ns: nanoseconds in which the keys and values of a token are read.

    Raises:
        ValueError: the query heads cannot be shared by so many devices.
    """

    def __init__(self, shape: ModelShape, device: Device, tensor_parallel: int = 1):
        if tensor_parallel < 1 or shape.num_heads % tensor_parallel:
            raise ValueError(
                f"tensor_parallel is {tensor_parallel}, expected a divisor of the {shape.num_heads} query heads"
            )
        self.shape, self.device, self.tensor_parallel = shape, device, tensor_parallel
        self._bandwidth = device.bandwidth * device.bandwidth_share / 1e9
        self._flops = device.flops * device.flops_share / 1e9
        held_heads = max(1.0, shape.num_kv_heads / tensor_parallel)
        self._kv_bytes = shape.kv_bytes_per_token * held_heads / shape.num_kv_heads
        heads = shape.num_heads * shape.head_dim / tensor_parallel
        self._pair_ns = 4.0 * shape.num_layers * heads / self._flops
        self.kv_token_ns = self._kv_bytes / self._bandwidth
        self._matrices_ns: dict[tuple[int, int], float] = {}

    @property
    def about(self) -> dict[str, Any]:
        """The model, the device with its source, and the degree of parallelism."""
        return {
            "model": self.shape.as_dict(),
            "device": asdict(self.device),
            "tensor_parallel": self.tensor_parallel,
        }

    @property
    def name(self) -> str:
        """In words."""
        devices = self.device.name if self.tensor_parallel == 1 else f"{self.tensor_parallel} x {self.device.name}"
        return f"roofline of {self.shape.name} on {devices}, {self.device.basis}"

    @property
    def identity(self) -> str:
        """16 hex digits that only these sizes and figures have."""
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]

    def num_blocks(self, block_size: int) -> int:
        """KV blocks that fit beside the weights and a reserve in a share of the memory.

        Raises:
            ValueError: not even one fits.
        """
        weights = self.shape.num_parameters * self.shape.bytes_per_value / self.tensor_parallel
        left = MEMORY_SHARE * self.device.memory_bytes - RESERVED_BYTES - weights
        count = int(left // (self._kv_bytes * block_size))
        if count < 1:
            raise ValueError(
                f"{self.shape.name} has {weights / 1e9:.1f} GB of weights a device, which leaves no room for KV in "
                f"{MEMORY_SHARE:.0%} of {self.device.memory_bytes / 1e9:.1f} GB less {RESERVED_BYTES / 1e9:.0f} GB; "
                "expected a higher tensor-parallel degree"
            )
        return count

    def step_cost(self, features: StepFeatures) -> tuple[int, int]:
        """(host_ns, device_ns) of a step with these features."""
        attention = max(features.attention_pairs * self._pair_ns, features.kv_tokens * self.kv_token_ns)
        return self._host(features), round(self._matrices(features.tokens, features.sampled) + attention)

    def repeated_costs(self, features: StepFeatures, count: int) -> tuple[int, np.ndarray]:
        """See RepeatedCosts: of steps that repeat one another, attention alone costs ever more."""
        numbers = np.arange(1.0, count + 1)
        pairs_ns = (numbers * features.num_new_pairs + features.attention_pairs) * self._pair_ns
        costs_ns = (numbers * features.tokens + features.kv_tokens) * self.kv_token_ns
        np.maximum(pairs_ns, costs_ns, out=costs_ns)
        costs_ns += self._matrices(features.tokens, features.sampled)
        return self._host(features), np.rint(costs_ns, out=costs_ns).astype(np.int64)

    def _host(self, features: StepFeatures) -> int:
        return self.device.host_ns + self.device.host_seq_ns * features.seqs

    def _matrices(self, tokens: int, sampled: int) -> float:
        """Nanoseconds of all projections of a step, and of the all-reduces between them."""
        known = self._matrices_ns.get((tokens, sampled))
        if known is None:
            shape, share = self.shape, self.tensor_parallel
            layer = sum(self._projection(tokens, n, m) for n, m in shape.layer_matrices)
            if share > 1:
                moved = 2 * (share - 1) / share * tokens * shape.hidden_size * shape.bytes_per_value
                layer += 2 * (ALL_REDUCE_NS + moved / (self.device.link / 1e9))
            known = shape.num_layers * layer + self._projection(sampled, shape.hidden_size, shape.vocab_size)
            self._matrices_ns[tokens, sampled] = known
        return known

    def _projection(self, tokens: int, inputs: int, outputs: int) -> float:
        """Nanoseconds of a matrix product."""
        if not tokens:
            return 0.0
        weights = inputs * outputs / self.tensor_parallel
        moved = (weights + tokens * (inputs + outputs / self.tensor_parallel)) * self.shape.bytes_per_value
        return max(2.0 * tokens * weights / self._flops, moved / self._bandwidth)

    @classmethod
    def parse(cls, text: str) -> RooflineLatency:
        """From "MODEL@DEVICE" or "MODEL@DEVICE:tp=N"; MODEL is a shape that ships, a config.json or its folder.

        Raises:
            InputError: the text has another form, or a part of it is not known.
        """
        model, at, rest = text.rpartition("@")
        device_name, colon, option = rest.partition(":")
        if not at or (colon and not option.startswith("tp=")):
            raise InputError(
                "expected roofline:MODEL@DEVICE or roofline:MODEL@DEVICE:tp=N", field="latency", value=text
            )
        device = DEVICES.get(device_name.lower())
        if device is None:
            raise InputError(f"expected a device: {', '.join(DEVICES)}", field="latency", value=device_name)
        shape = SHAPES.get(model.lower())
        if shape is None and not os.path.exists(model):
            raise InputError(
                f"expected a config.json, a folder with one, or a shape that ships: {', '.join(SHAPES)}",
                field="latency",
                value=model,
            )
        try:
            degree = int(option.removeprefix("tp=")) if option else 1
            return cls(shape or ModelShape.load(Path(model)), device, degree)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error), field="latency", value=text) from error
