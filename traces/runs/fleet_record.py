"""Fleet records: a run record a replica, in one folder with a summary of all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from twinserve.policies import SamplingParams, Sequence
from twinserve.settings.build_core import BY_HAND
from twinserve.settings.errors import InputError
from twinserve.settings.files import WholeFolder
from twinserve.traces.formats.recorded import REPLICAS, replica_place, replicas_of
from twinserve.traces.request import Request
from twinserve.traces.runs.metrics import DECODE, PREFILL, is_handed_over, metrics_of, summary_of
from twinserve.traces.runs.record import (
    RunRecord,
    RunRecorder,
    checked_run,
    finish_record,
    load_record,
    own_trace,
    run_of,
)


def is_fleet(path: Path) -> bool:
    """Is there a fleet's record in the folder?"""
    return os.path.isdir(Path(path) / REPLICAS)


def load_replicas(path: Path) -> list[RunRecord]:
    """The records of a fleet's replicas, by number and life.

    Raises:
        InputError: one of them cannot be read, or they are not all of the fleet's.
    """
    path = Path(path)
    summary = checked_run(path / "run.json")["summary"]
    records = [load_record(folder) for folder in replicas_of(path)]
    if summary is None:
        return records
    expected = {name: summary[name] for name in ("requests", "finished", "refused", "aborted", "steps")}
    handed_over = summary.get("handed_over", 0)
    expected["requests"] += summary.get("retries", 0) + handed_over
    expected["finished"] += handed_over
    for name, number in expected.items():
        found = sum(record.run["summary"][name] for record in records)
        if found != number:
            raise InputError(
                f"the record is not whole: the {len(records)} folders have {found} {name}, expected {number}, as "
                "run.json has it",
                path=path / REPLICAS,
            )
    return records


def load_fleet(path: Path) -> RunRecord:
    """A fleet's record as that of one run: every request once, in the order in which they came in.

    A request's row is that of the replica which served it; beside what other rows have, it has `replica`. There are no
    steps, as those of different replicas go on side by side: see `load_replicas`.

    Raises:
        InputError: a file is missing or broken.
    """
    path = Path(path)
    run = checked_run(path / "run.json")
    records, rows = load_replicas(path), []
    for record in records:
        (replica, _) = replica_place(record.path) or (0, 0)
        for row in record.requests:
            if row["finish_reason"] is not None and not is_handed_over(row):
                rows.append(row | {"replica": replica})
    rows.sort(key=lambda row: (row["ingested_ns"], row["replica"], row["ingest"]))
    if run["summary"] is None:
        run["facts"]["trace"] = own_trace(path)
        run["summary"] = summary_of([metrics_of(one.requests, one.steps) for one in records], world=run["world"])
    return RunRecord(path, run, [row | {"ingest": number} for number, row in enumerate(rows)], [], {})


class FleetRecorder:
    """Writes the record of a fleet: `run.json` with the summary of all, and a run record a replica in `replicas`.

    A replica that died and came back has one record for each time that it was up: `replicas/3`, `replicas/3.1`, ...
    Each is that of a replica that ran by itself, and replays by itself; a request that was lost with its replica has no
    `finish_reason` there, and is found again in another.

    As a context manager it discards what was not closed.

    Args:
        out: the folder to write; None writes nothing, and leaves the metrics.
        settings: those that all replicas have in common; where a replica has rules that were handed in, it says that.
        facts: what says which trace, router and replicas it was.

    Raises:
        InputError: `out` exists, another run is writing it, or it cannot be written.
    """

    def __init__(self, out: Path | None, *, settings: dict[str, Any], facts: dict[str, Any], device: str):
        self._settings, self._facts, self._device = settings, facts, device
        self._folder = None if out is None else WholeFolder(Path(out))
        self._lives: list[RunRecorder] = []
        self._up: dict[int, RunRecorder] = {}
        self._retries: dict[int, int] = {}

    def begin(
        self, replica: int, life: int, *, settings: dict[str, Any], facts: dict[str, Any], device: str
    ) -> RunRecorder:
        """The recorder of a replica that is up."""
        name = str(replica) if life == 0 else f"{replica}.{life}"
        out = None if self._folder is None else self._folder.partial / REPLICAS / name
        recorder = RunRecorder(out, world="sim", settings=settings, facts=facts, device=device)
        self._lives.append(recorder)
        self._up[replica] = recorder
        return recorder

    def expect(self, request: Request, sampling: SamplingParams, replica: int) -> None:
        """Say which request a replica will serve, before it is ingested."""
        self._up[replica].expect(request, sampling)

    def expect_prompt(self, request: Request, sampling: SamplingParams, replica: int) -> None:
        """Say whose prompt a replica will compute, for another to go on with."""
        self._up[replica].expect(request._replace(max_tokens=1), sampling, stage=PREFILL)

    def expect_rest(self, request: Request, sampling: SamplingParams, source: int | None, target: int) -> None:
        """Say with which request a replica will go on, and which one has computed its prompt."""
        cached_tokens = None if source is None else self._up[source].cached_tokens[request.id]
        self._up[target].expect(request, sampling, stage=DECODE, cached_tokens=cached_tokens)

    @property
    def last_finish_ns(self) -> int:
        """When the latest request ended that was served; 0 before there is one."""
        for recorder in self._lives:
            recorder.flush()
        return max((recorder.metrics.last_finish_ns or 0 for recorder in self._lives), default=0)

    def died(self, replica: int, lost: list[Sequence]) -> None:
        """A replica is down, with what it had not answered; what it had not taken in yet is no part of its record."""
        for seq in lost:
            if seq.ingested_ns is None:
                continue
            self._retries[seq.seq_id] = self._retries.get(seq.seq_id, 0) + 1

    def close(
        self,
        summary_extra: dict[str, Any] | None = None,
        derived: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Write what is left, give the folder its name, and return the summary; see `RunRecorder.close`."""
        for recorder in self._lives:
            recorder.close()
        summary = summary_of([recorder.metrics for recorder in self._lives], world="sim")
        lost = sum(self._retries.values())
        summary["requests"] -= lost
        summary |= {"retried": len(self._retries), "retries": lost}
        handed_over = [recorder.metrics.handed_over for recorder in self._lives]
        if any(handed_over):
            summary["handed_over"] = sum(one.requests for one in handed_over if one is not None)
        summary |= summary_extra or {}
        if derived is not None:
            summary |= derived(summary)
        rules = [rule for recorder in self._lives for rule in recorder.rules.items()]
        by_hand = {name: rule for name, rule in rules if str(rule).startswith(BY_HAND)}
        if self._folder is not None:
            finish_record(self._folder, run_of("sim", self._settings | by_hand, self._facts, self._device, summary))
        return summary

    def __enter__(self) -> FleetRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for recorder in self._lives:
            recorder.discard()
        if self._folder is not None:
            self._folder.discard()
            if isinstance(error, OSError):
                raise InputError(f"cannot be written: {error.strerror or error}", path=self._folder.out) from error
