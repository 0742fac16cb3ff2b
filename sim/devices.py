"""Devices: what they can do at the peak, and what is reached of that; from the file that ships, or one of one's own."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from twinserve.settings.config import read_toml, validated
from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST_BLOCKS, MOST_MIB, MOST_REPLICAS
from twinserve.sim.model_configs import DATA

MIB, GIB = 1 << 20, 1 << 30
DEVICES_FILE = DATA / "devices.toml"
NVLINK_HOP_NS = 600
"""What a hop of a ring takes over NVLink; over PCIe it is 1,000: hwLat, ring and LL, of NCCL's own model of its speed
(src/graph/tuning.cc)."""
NETWORK_HOP_NS = 2_700
"""The same over the network between nodes."""
_LEAST, _LARGEST, _MOST_NS = 1e6, 1e21, 10**12
"""Of what a device can do a second, and of a time that one step, layer or hop takes."""


class Shares(BaseModel):
    """What is reached of a device's peaks, and what a layer takes beside.

    Attributes:
        device: the name of the one on whose steps they were fitted.
        bandwidth: reading weights and activations, in matrix products of few rows.
        flops: in matrix products of many rows.
        attention_bandwidth, attention_flops: the same in attention.
        layer_ns: of what is neither, a layer: norms, rotations, activation functions, and the gaps between kernels.
        source: what they were fitted on.
        shapes: the models of which all steps were measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    device: str
    bandwidth: float = Field(gt=0, le=1)
    flops: float = Field(gt=0, le=1)
    attention_bandwidth: float = Field(gt=0, le=1)
    attention_flops: float = Field(gt=0, le=1)
    layer_ns: float = Field(ge=0, le=_MOST_NS)
    source: str
    shapes: tuple[str, ...] = Field(default=(), strict=False)


PEAKS = Shares(
    device="", bandwidth=1, flops=1, attention_bandwidth=1, attention_flops=1, layer_ns=0, source="all that there is"
)
"""All that a device can do is reached, and nothing lies between."""


class Collectives(BaseModel):
    """What an all-reduce takes between so many of a device: a time, and one for the bytes that go over the link.

    Attributes:
        ranks: how many were measured together.
        all_reduce_ns: of few bytes.
        link: bytes a second, each way; of `bytes`, 2 (ranks - 1) / ranks go over it.
        source: what they were fitted on, or what was assumed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ranks: int = Field(ge=2)
    all_reduce_ns: float = Field(ge=0)
    link: float = Field(gt=0)
    source: str = Field(min_length=1)


class Power(BaseModel):
    """What a device draws: the energy roofline (Choi, Bedard, Fowler and Vuduc, IPDPS 2013), a constant power and an
    energy for each byte and each operation, with another constant while nothing is computed.

    Attributes:
        idle_w: always.
        active_w: beside it, while a step is computed.
        joules_per_byte, joules_per_operation: of its memory, and of its arithmetic.
        source: what they were fitted on, or what was assumed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    idle_w: float = Field(ge=0)
    active_w: float = Field(ge=0)
    joules_per_byte: float = Field(default=0.0, ge=0)
    joules_per_operation: float = Field(default=0.0, ge=0)
    source: str = Field(min_length=1)


IDLE_SHARE = 0.1
"""Of its limit, what a device is taken to draw while it is idle, where nobody has measured it."""


class Device(BaseModel):
    """What a device can do.

    Attributes:
        bandwidth: bytes read from its memory a second, at the peak.
        flops: dense bfloat16 operations a second, at the peak.
        float8_flops: of float8; None where it has none.
        memory_mib: MiB of its memory.
        link: bytes a second to its peers and from them, each way; all-reduce goes through it.
        linked: so many share the link.
        hop_ns: what a hop over it takes.
        nvlink: the generation of NVLink that the link is; None: it is another.
        network: bytes a second to a device of another node and from it, each way; None: no network joins nodes.
        network_hop_ns: what a hop over that takes.
        multiprocessors: of them, each runs thread blocks of its own; None: not known.
        host_ns, host_seq_ns: what an engine's host takes for a step, and for each of its sequences: vLLM 0.24's step
            logs on an H100.
        limit_w: the power that it may draw by its `source`; None: not known.
        source: where these are from.
        shares: what is reached of the peaks.
        collectives: what an all-reduce was measured to take; None: nobody has measured it, see `all_reduces`.
        measured_power: fitted on measured windows; None: nobody has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1)
    bandwidth: float = Field(ge=_LEAST, le=_LARGEST)
    flops: float = Field(ge=_LEAST, le=_LARGEST)
    float8_flops: float | None = Field(default=None, ge=_LEAST, le=_LARGEST)
    memory_mib: int = Field(gt=0, le=MOST_MIB)
    link: float = Field(ge=_LEAST, le=_LARGEST)
    linked: int = Field(default=8, ge=1, le=MOST_REPLICAS)
    hop_ns: int = Field(default=NVLINK_HOP_NS, ge=0, le=_MOST_NS)
    nvlink: int | None = Field(default=None, ge=1, le=MOST_REPLICAS)
    network: float | None = Field(default=None, ge=_LEAST, le=_LARGEST)
    network_hop_ns: int = Field(default=NETWORK_HOP_NS, ge=0, le=_MOST_NS)
    multiprocessors: int | None = Field(default=None, gt=0, le=MOST_BLOCKS)
    host_ns: int = Field(default=1_900_000, ge=0, le=_MOST_NS)
    host_seq_ns: int = Field(default=25_000, ge=0, le=_MOST_NS)
    limit_w: float | None = Field(default=None, gt=0, le=1e6)
    source: str = Field(min_length=1)
    shares: Shares
    collectives: Collectives | None = None
    measured_power: Power | None = None

    @property
    def memory_bytes(self) -> int:
        """Bytes of its memory."""
        return self.memory_mib * MIB

    @property
    def has_own_shares(self) -> bool:
        """Were its shares fitted on steps of such a device, and not on another's?"""
        return self.shares.device == self.name

    @property
    def all_reduces(self) -> Collectives | None:
        """What an all-reduce takes: as was measured, or, of another device with NVLink, with as large a share of its
        link and as long for few bytes as on the one that was; None: what NCCL's own model of its speed says."""
        if self.collectives is not None or self.nvlink is None:
            return self.collectives
        measured, link = OTHERS_COLLECTIVES
        return Collectives(
            ranks=measured.ranks,
            all_reduce_ns=measured.all_reduce_ns,
            link=measured.link / link * self.link,
            source=f"assumed to reach the H200's share of its link, {measured.link / link:.0%}, and its latency",
        )

    @property
    def power(self) -> Power | None:
        """What it draws: as was measured, or, as a bound from above, its limit while it computes; None: not known."""
        if self.measured_power is not None or self.limit_w is None:
            return self.measured_power
        idle_w = IDLE_SHARE * self.limit_w
        words = (
            f"assumed: its limit of {self.limit_w:g} W ({self.source}) while a step is computed, and {IDLE_SHARE:.0%} "
            "of it otherwise"
        )
        return Power(idle_w=idle_w, active_w=self.limit_w - idle_w, source=words)

    @property
    def at_peak(self) -> Device:
        """The same, if all that it can do were reached and there were nothing beside."""
        collectives = Collectives(ranks=2, all_reduce_ns=0, link=self.link, source=PEAKS.source)
        return self.model_copy(update={"shares": PEAKS, "hop_ns": 0, "collectives": collectives})


def _shipped() -> tuple[dict[str, Device], Shares, tuple[Collectives, float]]:
    """The devices of the file that ships, the shares of those of which no step was timed, and the all-reduces that the
    others with NVLink are held to, with the link over which they were measured."""
    tables = tomllib.loads(DEVICES_FILE.read_text(encoding="utf-8"))
    shares = {name: Shares(**table) for name, table in tables["shares"].items()}
    others = shares["h200"]
    collectives, powers = tables.get("collectives", {}), tables.get("power", {})
    devices = {
        name: Device(
            **table,
            shares=shares.get(name, others),
            collectives=collectives.get(name),
            measured_power=powers.get(name),
        )
        for name, table in tables["device"].items()
    }
    measured = devices["h200"]
    assert measured.collectives is not None, f"{DEVICES_FILE} has no collectives of the H200"
    return devices, others, (measured.collectives, measured.link)


DEVICES, OTHERS_SHARES, OTHERS_COLLECTIVES = _shipped()


def named_device(text: str) -> Device:
    """The device that ships under a name, or that of a TOML file, which has the fields of `Device`.

    A file with `base`, the name of one that ships, says what differs from it; where it has another `link`, that is no
    NVLink unless it says so, and measured all-reduces are no longer its own. Else, without a table `shares` it takes
    those that were fitted on the H200.

    Raises:
        InputError: there is none, or the file cannot be read or has a field that cannot be used.
    """
    device = DEVICES.get(text.lower())
    if device is not None:
        return device
    if not text.endswith(".toml"):
        raise InputError(f"expected a TOML file or a device: {', '.join(DEVICES)}", field="device", value=text)
    path = Path(text)
    table: dict[str, Any] = {"shares": OTHERS_SHARES} | read_toml(path)
    base = table.pop("base", None)
    if base is None:
        return validated(Device, table, {}, path)
    if not isinstance(base, str) or base.lower() not in DEVICES:
        raise InputError(f"expected a device: {', '.join(DEVICES)}", path=path, field="base", value=base)
    known = dict(DEVICES[base.lower()])
    if "link" in table:
        known["collectives"] = known["nvlink"] = None
    if table["shares"] is OTHERS_SHARES:
        del table["shares"]
    return validated(Device, known | table, {}, path)


def device_of(name: str) -> Device | None:
    """The device that a driver's name stands for, such as "NVIDIA H100 80GB HBM3"; None if it is not among DEVICES."""
    words = name.replace("-", " ").split()
    return next((device for device in DEVICES.values() if device.name in words), None)
