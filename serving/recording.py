"""The record of a server's traffic: how it is to be kept, and the recorders of the replicas that serve."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.traces.formats.recorded import REPLICAS
from twinserve.traces.runs.concealed import ConcealedTokens, as_they_are
from twinserve.traces.runs.record import run_of, write_run
from twinserve.traces.runs.segments import KeptTokens, SegmentedRecorder, make_folder
from twinserve.worlds.run import ReplicaSpec, fleet_facts


@dataclass(frozen=True)
class RecordOptions:
    """How traffic is recorded.

    Attributes:
        folder: the folder to write, which must not exist.
        tokens: what is kept of a request's tokens; None draws a key for `ConcealedTokens`.
        segment_bytes, segment_s: a segment is whole when it has so many bytes, or after so many seconds.
    """

    folder: Path
    tokens: KeptTokens | None = None
    segment_bytes: int = 64 << 20
    segment_s: float = 60.0

    @classmethod
    def of(
        cls, folder: Path | None, *, keeps_tokens: bool, segment_mib: float, segment_s: float
    ) -> RecordOptions | None:
        """As a command line says it; None where nothing is to be recorded."""
        if folder is None:
            return None
        return cls(folder, as_they_are if keeps_tokens else None, round(segment_mib * (1 << 20)), segment_s)

    def recorder(self, folder: Path, **facts: Any) -> SegmentedRecorder:
        """A recorder that writes `folder`; `facts` are what else it has to be told."""
        how: dict[str, Any] = {"most_bytes": self.segment_bytes, "most_s": self.segment_s}
        return SegmentedRecorder(folder, tokens=self.tokens or ConcealedTokens(), **how, **facts)


class LiveRecord:
    """The record of a server, that of one replica or a fleet's.

    Args:
        folder: of all of it.
        recorders: of the replicas, by their number.
    """

    def __init__(self, folder: Path, recorders: Seq[SegmentedRecorder]):
        self.folder, self.recorders = folder, recorders

    @classmethod
    def of_engine(cls, options: RecordOptions, settings: Settings, facts: dict[str, Any], device: str) -> LiveRecord:
        """That of a model on the engine.

        Raises:
            InputError: the folder exists, or cannot be written.
        """
        facts = facts | {"sampling": asdict(SamplingParams())}
        how: dict[str, Any] = {"settings": settings.model_dump(), "facts": facts, "device": device}
        return cls(options.folder, [options.recorder(options.folder, world="real", **how)])

    @classmethod
    def of_simulation(
        cls, options: RecordOptions, replicas: Seq[ReplicaSpec], time_scale: float, router_facts: dict[str, Any]
    ) -> LiveRecord:
        """That of simulated replicas.

        Raises:
            InputError: the folder exists, or cannot be written.
        """
        facts: dict[str, Any] = {"time_scale": time_scale, "sampling": asdict(SamplingParams())}

        def recorder(folder: Path, spec: ReplicaSpec) -> SegmentedRecorder:
            device = f"simulated: {spec.latency_facts['name']}"
            own = facts | {"latency": spec.latency_facts}
            return options.recorder(folder, world="sim", settings=spec.settings.model_dump(), facts=own, device=device)

        folder = options.folder
        if len(replicas) == 1:
            return cls(folder, [recorder(folder, replicas[0])])
        common, fleet, device = fleet_facts(replicas, router_facts)
        make_folder(folder)
        write_run(folder, run_of("sim", common, facts | {"fleet": fleet}, device, None))
        return cls(folder, [recorder(folder / REPLICAS / str(number), spec) for number, spec in enumerate(replicas)])

    def tick(self) -> None:
        """See `SegmentedRecorder.tick`."""
        for recorder in self.recorders:
            recorder.tick()

    def close(self) -> Counter[str]:
        """End the last segments; the counts of all replicas, see `SegmentedRecorder.counts`."""
        return sum((recorder.close() for recorder in self.recorders), Counter())

    def discard(self) -> None:
        """Remove a record of nothing that was not closed, see `SegmentedRecorder.discard`."""
        for recorder in self.recorders:
            recorder.discard()
        if (self.folder / REPLICAS).is_dir() and not any((self.folder / REPLICAS).iterdir()):
            shutil.rmtree(self.folder)
