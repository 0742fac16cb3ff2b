"""Core: the one loop that the simulator and the real engine walk."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

from mypy_extensions import mypyc_attr

from twinserve.policies.batch import Batch, Runs
from twinserve.policies.scheduler import Scheduler
from twinserve.policies.sequence import Sequence

Span = tuple[int, int, int]
"""When a decision is made, and when its step starts and ends, in nanoseconds."""
Growth = list[tuple[int, Sequence, list[int]]]
"""Of repeated decisions, the number of one from 1 on, a sequence, and the blocks that this one gave it."""


@mypyc_attr(allow_interpreted_subclasses=True)
class CoreListener:
    """Hears the facts and decisions of a run as they happen; a run record is one. This one ignores them."""

    def ingested(self, seq: Sequence, number: int) -> None:
        """`seq` came in as the `number`-th request (from 0); it may have been refused."""

    def decided(self, batch: Batch) -> None:
        """A decision was made."""

    def repeated(self, batch: Batch, spans: Seq[Span], grown: Growth, num_committed: int, latest: Batch) -> None:
        """The decision heard last was repeated up to `latest`, which took these blocks; so many of its steps ended."""

    def committed(self, batch: Batch) -> None:
        """The step of `batch` has ended and its tokens are known."""

    def finished(self, seq: Sequence) -> None:
        """`seq` has ended: served, aborted or refused."""


class Core:
    """The only place where the order of calls exists: ingest, abort, decide, commit.

    It reads no clock and never waits: `now_ns` is handed in. Decisions run ahead of results by `pipeline_depth` steps:
    0, 1, or the ranks of a pipeline (see `Scheduler`). An abort takes effect at the next decision, so that the facts
    between two decisions need no order among themselves."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        pipeline_depth: int = 0,
        eos_token_id: int | None = None,
        listener: CoreListener | None = None,
    ):
        if pipeline_depth < 0:
            raise ValueError(f"pipeline_depth is {pipeline_depth}, expected an integer >= 0")
        speculation = scheduler.speculation
        if speculation.most and speculation.is_async != (pipeline_depth > 0):
            raise ValueError(f"is_async is {speculation.is_async}, but pipeline_depth is {pipeline_depth}")
        self.scheduler, self.pipeline_depth, self.eos_token_id = scheduler, pipeline_depth, eos_token_id
        self.listener = CoreListener() if listener is None else listener
        self.in_flight: deque[Batch] = deque()
        self.sequences: dict[int, Sequence] = {}
        self.num_ingested, self.num_decisions, self.last_committed = 0, 0, -1
        self.aborts: list[tuple[Sequence, int]] = []  # for the next decision

    @property
    def can_decide(self) -> bool:
        """Is there something to decide, and room for one more batch in flight?"""
        return len(self.in_flight) <= self.pipeline_depth and not (self.scheduler.is_finished() and not self.aborts)

    @property
    def must_commit(self) -> bool:
        """Must the oldest batch in flight be committed before anything else can happen?"""
        return bool(self.in_flight) and not self.can_decide

    @property
    def is_idle(self) -> bool:
        """Is there nothing to decide and nothing in flight?"""
        return not self.in_flight and not self.sequences

    def ingest(self, seq: Sequence, now_ns: int) -> bool:
        """Take a request in; it is seen by every later decision. False if it was refused (see `seq.refusal`)."""
        if seq.seq_id in self.sequences:
            raise ValueError(f"a sequence with id {seq.seq_id} is being served already")
        seq.ingested_ns = now_ns
        accepted = self.scheduler.add(seq)
        self.listener.ingested(seq, self.num_ingested)
        self.num_ingested += 1
        self.sequences[seq.seq_id] = seq
        if not accepted:
            self._finish(seq, now_ns)
        return accepted

    def abort(self, seq_id: int, now_ns: int) -> bool:
        """End a request at the next decision, unless it ends by itself before; False if it is not being served."""
        if (seq := self.sequences.get(seq_id)) is not None:
            self.aborts.append((seq, now_ns))
        return seq is not None

    def decide(self, now_ns: int) -> Batch:
        """Decide the next step. RuntimeError if more than `pipeline_depth` are in flight, or nothing can ever run."""
        if len(self.in_flight) > self.pipeline_depth:
            raise RuntimeError(f"{len(self.in_flight)} batches are in flight, pipeline_depth is {self.pipeline_depth}")
        aborted = self._apply_aborts() if self.aborts else []
        batch = self.scheduler.schedule()
        batch.decision, batch.seen, batch.committed = self.num_decisions, self.num_ingested, self.last_committed
        batch.aborted, batch.decided_ns = aborted, now_ns
        self.num_decisions += 1
        self.in_flight.append(batch)
        if not (batch.num_used_blocks or aborted or batch.preempted) and len(self.in_flight) == 1 and self.sequences:
            raise RuntimeError(f"nothing can be scheduled: {len(self.scheduler.waiting)} waiting, none running")
        for row in batch.admitted:
            if row.seq.first_scheduled_ns is None:
                row.seq.first_scheduled_ns = now_ns
        self.listener.decided(batch)
        return batch

    def commit(self, token_ids: Runs | Seq[int] | None, now_ns: int) -> list[Sequence]:
        """Take the tokens of the oldest batch in flight, one for each of its `sampled`, or a run; those that end."""
        if not self.in_flight:
            raise RuntimeError("commit without a batch in flight")
        batch = self.in_flight[0]
        finished = self.scheduler.postprocess(batch, token_ids, self.eos_token_id) if batch else []
        self.in_flight.popleft()
        self.last_committed = batch.decision
        batch.end_ns = now_ns if batch.end_ns is None else batch.end_ns
        for seq in batch.prompts:
            if seq.first_token_ns is None and seq.num_completion_tokens:
                seq.first_token_ns = now_ns
        self.listener.committed(batch)
        for seq in finished:
            self._finish(seq, now_ns)
        return finished

    def _apply_aborts(self) -> list[Sequence]:
        aborted = []
        for seq, now_ns in self.aborts:
            if not seq.is_finished:
                self.scheduler.abort(seq)
                self._finish(seq, now_ns)
                aborted.append(seq)
        self.aborts.clear()
        return aborted

    def _finish(self, seq: Sequence, now_ns: int) -> None:
        del self.sequences[seq.seq_id]
        seq.finish_ns = now_ns
        self.listener.finished(seq)
