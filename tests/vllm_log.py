"""Writes a step log as vLLM's recorder does, of our own Core in vLLM's loop, with step times that are known."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.sim.latency import StepCost, StepFeatures
from twinserve.traces.request import Request
from twinserve.traces.runs.vllm_records import FORMAT

US = 1_000
CAPTURED = 64

Cost = Callable[[StepFeatures], tuple[int, int, int, int]]
"""From features to nanoseconds: bookkeeping, launch, device, lead."""


def steady(features: StepFeatures) -> tuple[int, int, int, int]:
    return 100 * US, 400 * US, 500 * US, 0


def write_log(
    folder: Path,
    requests: list[Request],
    settings: dict[str, Any],
    *,
    cost: Cost = steady,
    until_ns: int | None = None,
    kind: str = "azure",
) -> Path:
    """Serve the requests as vLLM's recorder did and write the log; what is left at `until_ns` is aborted."""
    own = Settings.load(settings)
    log = _Loop(requests, own, cost)
    log.run(until_ns)
    folder.mkdir(parents=True)
    run = {
        "format": FORMAT,
        "name": folder.name,
        "kind": kind,
        "workload": "made for a test",
        "process": "1",
        "machine": "A",
        "seconds": 1.0,
        "rate_per_s": 1.0,
        "trace_rows": [0, len(requests)],
        "wall_s": (log.now if until_ns is None else until_ns) / 1e9,
        "summary": {"requests": len(log.request_rows()), "steps": len(log.steps)},
        "sha256": {"requests.jsonl.gz": "0" * 64},
        "settings": {
            **{name: getattr(own, name) for name in Settings.model_fields},
            "vllm": "0.24.0",
            "torch": "2",
            "triton": "3",
            "python": "3.12",
            "gpu": "a card, of nothing",
            "policy": "fcfs",
            "num_gpu_blocks": own.num_gpu_blocks + 1,
            "max_concurrent_batches": own.pipeline_depth + 1,
            "cudagraph_capture_sizes": [1, CAPTURED],
        },
    }
    (folder / "run.json").write_text(json.dumps(run))
    pack(folder / "requests.jsonl.gz", log.request_rows())
    pack(folder / "steps.jsonl.gz", encoded(log.steps))
    return folder


def pack(path: Path, rows: list) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


def unpack(path: Path) -> list:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def encoded(steps: list[dict[str, Any]]) -> list[list]:
    """The difference coding: who is gone, who is new at the end, and whose tokens are not 1."""
    rows, before = [], []
    for number, step in enumerate(steps):
        scheduled = step["scheduled"]
        order = [i for i, *_ in scheduled]
        kept: list[int] = []
        for i in order:
            if i not in before or order[: len(kept) + 1] != [*kept, i]:
                break
            if kept and before.index(kept[-1]) > before.index(i):
                break
            kept.append(i)
        fresh = scheduled[len(kept) :]
        rows.append(
            [
                number,
                *(step[name] / 1e9 for name in ("decided", "schedule_end", "ready", "end")),
                [i for i in before if i not in kept],
                [list(entry) for entry in fresh],
                [[i, tokens] for i, tokens, _ in scheduled[: len(kept)] if tokens != 1],
                *(step[name] for name in ("preempted", "waiting", "running", "free", "emitted")),
                step["launched"] / 1e9,
            ]
        )
        before = order
    return rows


class _Loop:
    """`engine.step()` of vLLM: decide and launch a step, then wait for the one before if there is one in flight."""

    def __init__(self, requests: list[Request], settings: Settings, cost: Cost):
        self.now = 0
        self.steps: list[dict[str, Any]] = []
        self._core, self._cost = settings.build_core(), cost
        self._num_blocks = settings.num_gpu_blocks or 0
        self._coming = sorted(requests, key=lambda request: request.arrival_ns)
        self._seqs: dict[int, Any] = {}
        self._queued: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._ends: list[int] = []
        self._device_free = self._arrived = 0

    def run(self, until_ns: int | None) -> None:
        core = self._core
        while self._coming or core.sequences:
            if until_ns is not None and self.now >= until_ns:
                for seq_id in list(core.sequences):
                    core.abort(seq_id, self.now)
                self._coming.clear()
                self._step()
                break
            while self._coming and self._coming[0].arrival_ns <= self.now:
                request = self._coming.pop(0)
                self._queued[request.id] = self.now
                self._seqs[request.id] = request.to_sequence(SamplingParams(ignore_eos=True))
                core.ingest(self._seqs[request.id], self.now)
                self._arrived += 1
            if core.sequences:
                self._step()
            else:
                self.now = self._coming[0].arrival_ns
        while core.in_flight:
            self._update()

    def _step(self) -> None:
        core = self._core
        decided = self.now
        batch = core.decide(decided)
        features = StepFeatures.of(batch, self._arrived)
        self._arrived = 0
        bookkeeping, launch, device, lead = self._cost(features) if batch else (10 * US, 10 * US, 0, 0)
        for row in batch.admitted:
            self._cached.setdefault(row.seq.seq_id, row.start)
        self.now = decided + bookkeeping
        self.steps.append(
            {
                "decided": decided,
                "schedule_end": self.now,
                "scheduled": [(row.seq.seq_id, row.num_tokens, row.start) for row in batch.rows],
                "preempted": [seq.seq_id for seq in batch.preempted],
                "waiting": batch.num_waiting,
                "running": batch.num_running,
                "free": self._num_blocks - batch.num_used_blocks,
            }
        )
        cost = StepCost(bookkeeping + launch, device, lead)
        self.now, _, self._device_free = cost.times(decided, self._device_free)
        self._ends.append(self._device_free)
        self.steps[-1]["launched"] = self.now
        if len(core.in_flight) > core.pipeline_depth:
            self._update()

    def _update(self) -> None:
        batch = self._core.in_flight[0]
        step = self.steps[batch.decision]
        step["ready"] = self.now = max(self.now, self._ends[batch.decision])
        step["emitted"] = sum(not seq.is_finished for seq in batch.sampled)
        step["end"] = self.now
        self._core.commit(None, self.now)

    def request_rows(self) -> list[dict[str, Any]]:
        rows = []
        for i, seq in sorted(self._seqs.items()):
            is_served = seq.finish_reason == "length"
            rows.append(
                {
                    "i": i,
                    "arrival": seq.arrival_ns / 1e9,
                    "added": self._queued[i] / 1e9,
                    "queued": self._queued[i] / 1e9,
                    "first_token": None if seq.first_token_ns is None else seq.first_token_ns / 1e9,
                    "finish": seq.finish_ns / 1e9 if is_served else None,
                    "prompt": seq.num_prompt_tokens,
                    "max_tokens": seq.sampling_params.max_tokens,
                    "output": seq.num_completion_tokens if is_served else None,
                    "cached": self._cached.get(i, 0) if is_served else None,
                    "preemptions": seq.num_preemptions,
                }
            )
        return rows
