"""Splits: how a model is spread over devices, what each of them holds, and what goes over the links between them."""

from __future__ import annotations

from dataclasses import dataclass

from twinserve.settings.limits import plain
from twinserve.sim.devices import Device
from twinserve.sim.shapes import STORED_BITS, Experts, Layers, ModelShape

ALL_REDUCE_NS = 6_600
"""What a transfer of few bytes takes beside its hops: the base latency of a ring with the LL protocol in NCCL's own
model of its speed (src/graph/tuning.cc, baseLat)."""
_BYTES = STORED_BITS // 8
_NAMES = {"tp": "tensor", "pp": "pipeline", "dp": "data", "ep": "expert"}
"""Degrees as they stand behind a device, and as `Split` has them."""


@dataclass(frozen=True)
class Split:
    """How many devices share what, under vLLM's words.

    Attributes:
        tensor: devices that share each layer.
        pipeline: stages, each with layers of its own; as many steps are on their way.
        data: ranks that each have attention, a scheduler and a pool of KV blocks of their own.
        expert: devices among which the experts of a layer are dealt out, whole; 1: `tensor` of them share each.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1

    @classmethod
    def parse(cls, text: str) -> Split:
        """From text such as "tp=8:pp=2"; what it does not name is 1.

        Raises:
            ValueError: it has another form.
        """
        parts = [part.partition("=") for part in text.split(":")]
        degrees = {_NAMES.get(name, ""): number for name, _, number in parts}
        if "" in degrees or len(degrees) < len(parts):
            raise ValueError(f"expected each of {', '.join(_NAMES)} once at most, such as tp=8:pp=2")
        return cls(**{name: int(plain(number)) for name, number in degrees.items()})

    @property
    def num_devices(self) -> int:
        """Devices of one rank of `data`: those that one scheduler has steps run on."""
        return self.tensor * self.pipeline

    @property
    def is_whole(self) -> bool:
        """Has one device all of the model?"""
        return self == Split()

    @property
    def facts(self) -> dict[str, int]:
        """What is said of it, by name; degrees of 1 other than `tensor_parallel` are not."""
        others = {"pipeline_parallel": self.pipeline, "data_parallel": self.data, "expert_parallel": self.expert}
        return {"tensor_parallel": self.tensor} | {name: degree for name, degree in others.items() if degree > 1}

    def __str__(self) -> str:
        degrees = {name: getattr(self, field) for name, field in _NAMES.items()}
        return ", ".join(f"{name}={degree}" for name, degree in degrees.items() if degree > 1)

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """How many of the layers each stage has: as many each, and one more of those left over from the last but one
        on to the front, as vLLM has it (`get_pp_indices` in vllm/distributed/utils.py)."""
        counts = [num_layers // self.pipeline] * self.pipeline
        for place in range(num_layers % self.pipeline):
            counts[-2 - place] += 1
        return counts

    def check(self, shape: ModelShape, device: Device) -> None:
        """Raise ValueError, in one line, if so many devices cannot share the model, or no link joins them."""
        for name, degree in (
            ("tensor_parallel", self.tensor),
            ("pipeline_parallel", self.pipeline),
            ("data_parallel", self.data),
            ("expert_parallel", self.expert),
        ):
            if degree < 1:
                raise ValueError(f"{name} is {degree}, expected >= 1")
        for layers in shape.layers:
            if (reason := layers.mixer.why_not(self.tensor)) is not None:
                raise ValueError(f"tensor_parallel is {self.tensor}, {reason}")
        if self.tensor > device.linked:
            most = f"expected at most {device.linked}, as many as share a link of the {device.name}"
            raise ValueError(f"tensor_parallel is {self.tensor}, {most}")
        if self.pipeline > shape.num_layers:
            raise ValueError(f"pipeline_parallel is {self.pipeline}, expected at most the {shape.num_layers} layers")
        self._check_experts(shape)
        in_all = self.num_devices * (self.data if self.expert > 1 else 1)
        if in_all > device.linked and device.network is None:
            raise ValueError(
                f"{in_all} devices are more than the {device.linked} that share a link of the {device.name}, expected "
                "a device with network, what joins nodes"
            )

    def _check_experts(self, shape: ModelShape) -> None:
        experts = [layers.network for layers in shape.layers if isinstance(layers.network, Experts)]
        ranks = self.tensor * self.data
        if not experts and self.expert > 1:
            raise ValueError(f"expert_parallel is {self.expert}, expected 1: {shape.name} has no experts")
        if experts and self.data > 1 and self.expert == 1:
            raise ValueError(
                f"data_parallel is {self.data}, expected ep={ranks} beside it: its ranks share the experts"
            )
        if self.expert not in (1, ranks):
            raise ValueError(f"expert_parallel is {self.expert}, expected {ranks}, tp x dp, or 1")
        for network in experts:
            if network.num % self.expert:
                raise ValueError(f"expert_parallel is {self.expert}, expected a divisor of the {network.num} experts")


@dataclass(frozen=True)
class Stage:
    """What one stage of a pipeline has.

    Attributes:
        share: of the model's layers.
        is_first, is_last: it has the embedding; the output projection.
    """

    share: float
    is_first: bool
    is_last: bool

    def weight_bytes(self, shape: ModelShape, split: Split) -> float:
        """Bytes of its weights on one device."""
        embedding = shape.head.size * STORED_BITS / 8 / split.tensor
        once = self.is_first and self.is_last and shape.tied
        return self.share * shape.layer_bytes(split.tensor, split.expert) + embedding * (
            1 if once else self.is_first + self.is_last
        )


def stages_of(shape: ModelShape, split: Split) -> list[Stage]:
    """The stages of a pipeline. Of layers of several kinds, each stage is taken to have the model's mean."""
    counts = split.layers_of_stages(shape.num_layers)
    last = len(counts) - 1
    return [Stage(count / shape.num_layers, place == 0, place == last) for place, count in enumerate(counts)]


class Links:
    """What it takes to move what devices have to tell each other, in nanoseconds."""

    def __init__(self, shape: ModelShape, device: Device, split: Split):
        self._hidden, self._device, self._split = shape.hidden_size, device, split

    def all_reduce_ns(self, tokens: int) -> float:
        """Of the hidden states of so many tokens, among the devices that share a layer."""
        share, device = self._split.tensor, self._device
        if share == 1:
            return 0.0
        moved = 2 * (share - 1) / share * tokens * self._hidden * _BYTES
        measured = device.all_reduces
        if measured is None:
            return ALL_REDUCE_NS + 2 * (share - 1) * device.hop_ns + moved / (device.link / 1e9)
        more_hops = 2 * (share - measured.ranks)
        return max(0.0, measured.all_reduce_ns + more_hops * device.hop_ns) + moved / (measured.link / 1e9)

    def send_ns(self, stage: int, tokens: int) -> float:
        """From a stage to the next: hidden states and residual of so many tokens. Each device sends its share to its
        like, and those of the next stage gather the shares, for half of what an all-reduce of as much takes."""
        split, device = self._split, self._device
        is_near = stage * split.tensor // device.linked == (stage + 1) * split.tensor // device.linked
        link, hop_ns = (device.link, device.hop_ns) if is_near else (device.network or 0.0, device.network_hop_ns)
        moved = 2 * tokens * self._hidden * _BYTES / split.tensor
        return ALL_REDUCE_NS + hop_ns + moved / (link / 1e9) + self.all_reduce_ns(2 * tokens) / 2

    def exchange_ns(self, layers: Layers, tokens: int) -> float:
        """Of an all-to-all that brings tokens to their experts, or back; so many tokens a rank of `data`.

        The devices of a rank share its tokens. A token is sent once to each other device that has any of the experts
        that it chose, evenly: with probability 1 - (1 - 1 / ep) ** top_k. To those of its own node it goes over the
        link, to the others over the network, both at once.
        """
        split, device, network = self._split, self._device, layers.network
        chance = 1.0 - (1.0 - 1.0 / split.expert) ** network.top_k
        each = tokens / split.tensor * chance * self._hidden * _BYTES
        near = split.tensor * max(1, min(split.data, device.linked // split.num_devices))
        link_ns, hop_ns = (near - 1) * each / (device.link / 1e9), device.hop_ns
        if (far := split.expert - near) > 0:
            network_ns = far * each / ((device.network or 0.0) / 1e9)
            link_ns, hop_ns = max(link_ns, network_ns), device.network_hop_ns
        return ALL_REDUCE_NS + hop_ns + link_ns
