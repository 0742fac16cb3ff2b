"""Fleet records: a run record a replica, in one folder with a summary of all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from twinserve.policies import SamplingParams, Sequence
from twinserve.traces.metrics import summary_of
from twinserve.traces.record import SCHEMA, RunRecorder, finish_record, make_partial, versions, with_extra
from twinserve.traces.request import Request

REPLICAS = "replicas"


class FleetRecorder:
    """Writes the record of a fleet: `run.json` with the summary of all, and a run record a replica in `replicas`.

    A replica that died and came back has one record for each time that it was up: `replicas/3`, `replicas/3.1`, ...
    Each is that of a replica that ran by itself, and replays by itself; a request that was lost with its replica has no
    `finish_reason` there, and is found again in another.

    As a context manager it discards what was not closed.

    Args:
        out: the folder to write.
        facts: what says which trace, router and replicas it was.

    Raises:
        InputError: `out` exists, another run is writing it, or it cannot be written.
    """

    def __init__(self, out: Path, *, facts: dict[str, Any], device: str):
        self._out, self._facts, self._device = Path(out), facts, device
        self._partial = make_partial(self._out)
        (self._partial / REPLICAS).mkdir()
        self._lives: list[RunRecorder] = []
        self._up: dict[int, RunRecorder] = {}
        self._retries: dict[int, int] = {}

    def begin(
        self, replica: int, life: int, *, settings: dict[str, Any], facts: dict[str, Any], device: str
    ) -> RunRecorder:
        """The recorder of a replica that is up."""
        name = str(replica) if life == 0 else f"{replica}.{life}"
        out = self._partial / REPLICAS / name
        recorder = RunRecorder(out, world="sim", settings=settings, facts=facts, device=device)
        self._lives.append(recorder)
        self._up[replica] = recorder
        return recorder

    def expect(self, request: Request, sampling: SamplingParams, replica: int) -> None:
        """Say which request a replica will serve, before it is ingested."""
        self._up[replica].expect(request, sampling)

    def died(self, replica: int, lost: list[Sequence]) -> None:
        """A replica is down, with what it had not answered."""
        for seq in lost:
            self._retries[seq.seq_id] = self._retries.get(seq.seq_id, 0) + 1

    def close(self, summary_extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write what is left, give the folder its name, and return the summary; see `RunRecorder.close`."""
        for recorder in self._lives:
            recorder.close()
        summary = summary_of([recorder.metrics for recorder in self._lives], world="sim")
        lost = sum(self._retries.values())
        summary["requests"] -= lost
        summary |= {"retried": len(self._retries), "retries": lost}
        summary = with_extra(summary, summary_extra)
        run = {
            "schema": SCHEMA,
            "world": "sim",
            "settings": {},
            "facts": self._facts,
            "device": self._device,
            "versions": versions(),
            "summary": summary,
        }
        finish_record(self._partial, self._out, run)
        return summary

    def __enter__(self) -> FleetRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        for recorder in self._lives:
            recorder.discard()
        shutil.rmtree(self._partial, ignore_errors=True)
