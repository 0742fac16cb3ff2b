"""A small world around Core, made for recording: steps of random length, stops and aborts on demand."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from busy_traces import dense_conversations

from twinserve.policies import Batch, CoreListener, SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.arrivals import Arrivals
from twinserve.traces.readers import Trace, read_trace
from twinserve.traces.request import Request, TokenMaker
from twinserve.traces.runs.concealed import as_they_are
from twinserve.traces.runs.record import RowMaker, RunRecorder
from twinserve.traces.runs.segments import SegmentedRecorder

EOS = 0


class Witness(CoreListener):
    """Passes on what a recorder hears, and writes down when each token came by looking at the sequences themselves."""

    def __init__(self, recorder: RowMaker):
        self.recorder = recorder
        self.token_ends: dict[int, list[int]] = defaultdict(list)

    def built(self, rules: dict[str, str | None]) -> None:
        self.recorder.built(rules)

    def ingested(self, seq: Sequence, number: int) -> None:
        self.recorder.ingested(seq, number)

    def decided(self, batch: Batch) -> None:
        self.recorder.decided(batch)

    def committed(self, batch: Batch) -> None:
        assert batch.end_ns is not None
        for seq in batch.sampled:
            if seq.num_completion_tokens > len(self.token_ends[seq.seq_id]):
                self.token_ends[seq.seq_id].append(batch.end_ns)
        self.recorder.committed(batch)

    def finished(self, seq: Sequence) -> None:
        self.recorder.finished(seq)


@dataclass
class Run:
    """A recorded run: its folder, its summary, and the end of the step of each token that came out, by request."""

    path: Path
    summary: dict[str, Any]
    token_ends: dict[int, list[int]]


class World:
    """Serves requests through Core; in a real world, tokens are random and some of them stop their request."""

    def __init__(self, settings: Settings, recorder: RowMaker, *, seed: int, real: bool, abort_share: float):
        self.recorder, self.witness = recorder, Witness(recorder)
        self.core = settings.build_core(eos_token_id=EOS, listener=self.witness)
        self.rng = random.Random(seed)
        self.real, self.abort_share = real, abort_share
        self.maker = TokenMaker(vocab_size=1000, first_id=1)
        self.answers: dict[int, list[int]] = {}
        self.now_ns = self.last_end_ns = 0

    def serve(self, requests: list[Request]) -> None:
        self.arrivals = Arrivals(requests)
        while not (self.core.is_idle and self.arrivals.is_empty):
            self._let_in()
            if self.core.sequences and self.rng.random() < self.abort_share:
                self.core.abort(self.rng.choice(list(self.core.sequences)), self.now_ns)
            if self.core.can_decide:
                batch = self.core.decide(self.now_ns)
                batch.start_ns = max(self.last_end_ns, self.now_ns)
                batch.end_ns = self.last_end_ns = batch.start_ns + self.rng.randrange(1_000_000, 9_000_000)
                for seq in batch.aborted:
                    self._ended(seq)
            if self.core.must_commit:
                self._commit()

    def _let_in(self) -> None:
        while (due_ns := self.arrivals.next_ns) is not None and (due_ns <= self.now_ns or self.core.is_idle):
            self.now_ns = max(self.now_ns, due_ns)
            request = self.arrivals.pop()
            params = SamplingParams(ignore_eos=not self.real)
            self.recorder.expect(request, params)
            seq = request.to_sequence(params, self.maker.token_ids(request, self.answers) if self.real else None)
            if not self.core.ingest(seq, self.now_ns):
                self._ended(seq)

    def _commit(self) -> None:
        batch = self.core.in_flight[0]
        assert batch.end_ns is not None
        self.now_ns = max(self.now_ns, batch.end_ns)
        token_ids = [self.rng.randrange(80) for _ in batch.sampled] if self.real else None
        for seq in self.core.commit(token_ids, self.now_ns):
            self._ended(seq)

    def _ended(self, seq: Sequence) -> None:
        self.answers[seq.seq_id] = seq.completion_token_ids
        self.arrivals.answered(seq.seq_id, seq.num_completion_tokens, self.now_ns)


@pytest.fixture
def some_requests() -> list[Request]:
    """Conversations of two turns with shared system prompts, enough to fill a small pool."""
    return dense_conversations(60, rate=60)


@pytest.fixture
def record_run(tmp_path: Path, some_requests: list[Request]) -> Callable[..., Run]:
    """Record a run into tmp_path: `record_run(name, seed=..., real=..., abort_share=..., **settings)`."""

    def record(
        name: str = "run",
        *,
        requests: list[Request] | None = None,
        seed: int = 0,
        real: bool = False,
        abort_share: float = 0.0,
        **values: Any,
    ) -> Run:
        settings = Settings.load({"max_num_seqs": 16, "max_num_batched_tokens": 128, "num_gpu_blocks": 60} | values)
        path = tmp_path / name
        world = "real" if real else "sim"
        with RunRecorder(path, world=world, settings=settings.model_dump(), facts={"seed": seed}) as recorder:
            served = World(settings, recorder, seed=seed, real=real, abort_share=abort_share)
            served.serve(some_requests if requests is None else requests)
            summary = recorder.close()
        return Run(path, summary, dict(served.witness.token_ends))

    return record


@pytest.fixture
def record_live(tmp_path: Path, some_requests: list[Request]) -> Callable[..., SegmentedRecorder]:
    """Record a run in segments of so many bytes; by default its decisions are those of `record_run`."""

    def record(
        name: str = "live", most_bytes: int = 9_000, *, real: bool = False, seed: int = 0, tokens=as_they_are, **values
    ) -> SegmentedRecorder:
        abort_share = values.pop("abort_share", 0.0)
        settings = Settings.load({"max_num_seqs": 16, "max_num_batched_tokens": 128, "num_gpu_blocks": 60} | values)
        recorder = SegmentedRecorder(
            tmp_path / name,
            world="real" if real else "sim",
            settings=settings.model_dump(),
            facts={"tokens": {"vocab_size": 1000, "first_id": 1}, "eos_token_id": EOS},
            device=None,
            tokens=tokens,
            most_bytes=most_bytes,
            most_s=1e9,
        )
        World(settings, recorder, seed=seed, real=real, abort_share=abort_share).serve(some_requests)
        recorder.close()
        return recorder

    return record


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Trace]:
    """Reads a file with this content, as `read_trace` does."""

    def read(content: str | bytes, **wanted: Any) -> Trace:
        path = tmp_path / "trace"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_trace(path, **wanted)

    return read


@pytest.fixture
def refused(read: Callable[..., Trace]) -> Callable[[str | bytes, str], None]:
    """Asserts that a file with this content is refused with a message of one line that goes on like `message`."""

    def refused(content: str | bytes, message: str) -> None:
        with pytest.raises(InputError) as error:
            read(content)
        said = str(error.value)
        assert re.search(rf"/trace{re.escape(message)}", said), said
        assert "\n" not in said

    return refused
