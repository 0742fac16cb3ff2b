"""Recorded runs of the real engine, and what happened in them as the engine's own thread saw it."""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from twinserve.engine.llm import LLM
from twinserve.engine.online import Abort, Clock, Inbox
from twinserve.policies import Batch, SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.traces.request import Request
from twinserve.traces.runs.record import RunRecord, RunRecorder, load_record


class CountingRecorder(RunRecorder):
    """A RunRecorder that also counts what a run is made for, by looking at the sequences and blocks of that moment.

    Attributes:
        counts: how often each thing happened.
        came_in: the ids of the requests that came in.
        running: the block table of each running sequence, as of the latest decision.
    """

    def __init__(self, out: Path, **facts: Any):
        super().__init__(out, **facts)
        self.counts: Counter[str] = Counter()
        self.came_in: set[int] = set()
        self.running: dict[int, list[int]] = {}
        self._lost: dict[int, list[int]] = {}
        self._in_flight: deque[Batch] = deque()
        self._late: set[int] = set()
        self._seen = 0

    def ingested(self, seq: Sequence, number: int) -> None:
        super().ingested(seq, number)
        self.came_in.add(seq.seq_id)

    def decided(self, batch: Batch) -> None:
        super().decided(batch)
        self.counts["decisions"] += 1
        self.counts["bursts"] += batch.seen - self._seen >= 2
        self._seen = batch.seen
        self._in_flight.append(batch)
        for seq in batch.left:
            del self.running[seq.seq_id]
        for seq, block_ids in batch.grown:
            self.running[seq.seq_id] += block_ids
        for seq in batch.preempted:
            self.counts["preemptions"] += 1
            self._lost[seq.seq_id] = self.running.pop(seq.seq_id)
        for row in batch.admitted:
            self._admitted(row.seq, row.start // row.seq.block_size)

    def _admitted(self, seq: Sequence, num_hits: int) -> None:
        """Count whose blocks the first `num_hits` of an admitted sequence are."""
        hits = seq.block_table[:num_hits]
        held = {block_id for table in self.running.values() for block_id in table}
        lost = self._lost.pop(seq.seq_id, [])
        self.counts["hits_on_running"] += not held.isdisjoint(hits)
        self.counts["resumed_with_own"] += bool(hits) and hits == lost[:num_hits]
        self.running[seq.seq_id] = list(seq.block_table)

    def committed(self, batch: Batch) -> None:
        super().committed(batch)
        self._in_flight.popleft()

    def finished(self, seq: Sequence) -> None:
        super().finished(seq)
        if seq.finish_reason == "stop":
            self.counts["stops"] += 1
            self._late |= {batch.decision for batch in self._in_flight if seq in batch.seqs}
            self.counts["late_decisions"] = len(self._late)
        elif seq.finish_reason == "abort":
            self.counts["aborted_running" if seq.seq_id in self.running else "aborted_waiting"] += 1
            self.counts["aborted_in_flight"] += seq.num_in_flight > 0


class Aborter(threading.Thread):
    """Aborts requests in random order at random moments, from when all of them are in and `num_running` requests run.

    Attributes:
        over: to be set when the run has ended.
    """

    def __init__(self, ids: Seq[int], num_running: int, recorder: CountingRecorder, inbox: Inbox):
        super().__init__(name="aborter", daemon=True)
        self.over = threading.Event()
        self._ids, self._num_running, self._recorder, self._inbox = ids, num_running, recorder, inbox

    def run(self) -> None:
        rng = random.Random(0)
        ids = set(self._ids)
        while not (ids <= self._recorder.came_in and len(self._recorder.running) >= self._num_running):
            if self.over.wait(0.001):
                return
        for seq_id in rng.sample(self._ids, len(self._ids)):
            self._inbox.put(Abort(seq_id))
            self.over.wait(rng.uniform(0.0, 0.02))


@dataclass(frozen=True)
class RealRun:
    """A run of the engine: its record as read back from the disk, and what was counted while it ran."""

    record: RunRecord
    counts: Counter[str]

    @property
    def summary(self) -> dict[str, Any]:
        return self.record.run["summary"]

    @property
    def ends(self) -> Counter[str]:
        """How many requests ended by each reason."""
        return Counter(row["finish_reason"] for row in self.record.requests)


def run_engine(
    model: nn.Module,
    out: Path,
    requests: list[Request],
    *,
    ignore_eos: bool = True,
    abort: Seq[int] = (),
    abort_from: int = 1,
    **settings: Any,
) -> RealRun:
    """Serve `requests` in real time, every token drawn at random; the record is written to `out` and read again.

    Args:
        abort: ids of requests that another thread aborts at random moments.
        abort_from: so many requests must run before it begins.
    """
    params = SamplingParams(temperature=1.0, ignore_eos=ignore_eos)
    aborters: list[Aborter] = []
    with closing(LLM(model, settings=Settings.load({"max_num_batched_tokens": 64} | settings), threads=1)) as llm:
        facts = llm.facts() | {"sampling": asdict(params)}
        with CountingRecorder(out, world="real", settings=llm.settings.model_dump(), facts=facts) as recorder:

            def on_start(inbox: Inbox, clock: Clock) -> None:
                if abort:
                    aborters.append(Aborter(abort, abort_from, recorder, inbox))
                    aborters[0].start()

            served = llm.run_trace(requests, params=params, recorder=recorder, on_start=on_start)
            recorder.close()
    for aborter in aborters:
        aborter.over.set()
        aborter.join()
    record = load_record(out)
    assert len(served) == len(record.requests) == len(requests)
    assert len(record.steps) == recorder.counts["decisions"] > 0
    return RealRun(record, recorder.counts)
