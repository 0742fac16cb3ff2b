"""A Core that lives on, as those ask it who serve HTTP: its life, its metrics, its record, and what it tells."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from twinserve.engine.live import BuildCore, Following, Live
from twinserve.policies import Batch, CoreListener, Sequence
from twinserve.serving.backends import Backend
from twinserve.serving.messages import Ask, Call, News, Submission
from twinserve.serving.metrics import ServerMetrics
from twinserve.serving.options import ServeOptions
from twinserve.serving.recording import LiveRecord, RecordOptions
from twinserve.serving.simulated import LiveReplicas, stand_in
from twinserve.settings.errors import RunError
from twinserve.sim.routers import Router
from twinserve.sim.speculation import acceptance_of
from twinserve.traces.request import Request
from twinserve.worlds.run import ReplicaSpec, with_drafting

if TYPE_CHECKING:
    from twinserve.engine.llm import LLM
    from twinserve.engine.token_logprobs import TokenLogprobs

_TICK_S = 1.0


class Host(ABC):
    """One Core that lives on, or those of replicas.

    Args:
        backend: what those who ask know of it.
        record: hears of each request before it comes in, and of what Core says.

    Attributes:
        live: the Core, once `start` has been called.
    """

    live: Live

    def __init__(self, backend: Backend, record: LiveRecord | None):
        self.backend, self.record = backend, record

    @abstractmethod
    def start(self, listeners: Seq[CoreListener]) -> None:
        """Begin to serve, heard by `listeners`; the record hears first."""

    def watched_by(self, metrics: ServerMetrics) -> None:
        """Have a metrics page say how full queues and pools are."""
        metrics.watch(self.live.cores, self.backend.settings)

    @abstractmethod
    def sequence(self, request: Request, ask: Ask) -> Sequence:
        """The sequence of a request, which the record has been told of by the time it comes in."""

    @abstractmethod
    def tokens(self, seq: Sequence, start: int) -> list[int]:
        """The tokens of an answer that are known, from its `start`-th on."""

    def take_logprobs(self, seqs: Seq[Sequence]) -> list[tuple[int, dict[int, TokenLogprobs]]]:
        """The log-probabilities that are new since the last call, by the places of the tokens; whose, by number."""
        return []

    @abstractmethod
    def forget(self, seq: Sequence) -> None:
        """Keep nothing more of a sequence that has ended."""

    @abstractmethod
    def close(self) -> None:
        """End what serves, once nothing is served any more."""


class EngineHost(Host):
    """A model on the engine.

    Args:
        is_lent: others serve the model again, and it is not closed.
    """

    def __init__(self, backend: Backend, llm: LLM, record: LiveRecord | None = None, *, is_lent: bool = False):
        super().__init__(backend, record)
        self._llm, self._is_lent = llm, is_lent

    def start(self, listeners: Seq[CoreListener]) -> None:
        self.live = self._llm.live([*(self.record.recorders if self.record else ()), *listeners])

    def sequence(self, request: Request, ask: Ask) -> Sequence:
        seq = request.to_sequence(ask.params, ask.prompt)
        if ask.prompt_logprobs is not None:
            self._llm.runner.prompt_asks[seq] = ask.prompt_logprobs
        if self.record is not None:
            self.record.recorders[0].expect(request, seq.sampling_params)
        return seq

    def tokens(self, seq: Sequence, start: int) -> list[int]:
        return seq.token_ids[seq.num_prompt_tokens + start :]

    def take_logprobs(self, seqs: Seq[Sequence]) -> list[tuple[int, dict[int, TokenLogprobs]]]:
        heard, prompt_asks = self._llm.runner.logprobs, self._llm.runner.prompt_asks
        found = []
        for seq in seqs if heard else ():
            if seq in heard:
                prompt_asks.pop(seq, None)  # all of its prompt's are there with its first token
                found.append((seq.seq_id, heard.pop(seq)))
        return found

    def forget(self, seq: Sequence) -> None:
        self._llm.runner.logprobs.pop(seq, None)
        self._llm.runner.prompt_asks.pop(seq, None)

    def close(self) -> None:
        if not self._is_lent:
            self._llm.close()


class SimulatedHost(Host):
    """Simulated replicas.

    Args:
        router: which replica serves a request.
        time_scale: a simulated second takes so many on the wall.
    """

    live: LiveReplicas

    def __init__(
        self,
        backend: Backend,
        replicas: Seq[ReplicaSpec],
        router: Router,
        *,
        time_scale: float,
        record: LiveRecord | None,
    ):
        super().__init__(backend, record)
        self._replicas, self._router, self._time_scale = replicas, router, time_scale

    def start(self, listeners: Seq[CoreListener]) -> None:
        recorders = self.record.recorders if self.record else []

        def build(number: int, spec: ReplicaSpec) -> BuildCore:
            own = recorders[number : number + 1]
            return lambda listener: spec.settings.build_core(listener=Following([*own, listener]))

        def routed(seq: Sequence, request: Request, number: int) -> None:
            if recorders:
                recorders[number].expect(request, seq.sampling_params)

        self.live = LiveReplicas(
            [build(number, spec) for number, spec in enumerate(self._replicas)],
            [with_drafting(spec.latency, spec.settings) for spec in self._replicas],
            self._router,
            listeners,
            acceptances=[acceptance_of(spec.settings.speculative_config) for spec in self._replicas],
            time_scale=self._time_scale,
            routed=routed,
        )
        self.live.start()

    def watched_by(self, metrics: ServerMetrics) -> None:
        super().watched_by(metrics)
        metrics.own_gauge("simulation_lag_seconds", "How late steps are simulated.", lambda: self.live.lag_s)

    def sequence(self, request: Request, ask: Ask) -> Sequence:
        seq = request.to_sequence(ask.params)
        self.live.requests[seq] = request
        return seq

    def tokens(self, seq: Sequence, start: int) -> list[int]:
        return stand_in(seq.seq_id, range(start, seq.num_completion_tokens))

    def forget(self, seq: Sequence) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is left."""


class Model(Protocol):
    """What is to be served.

    Attributes:
        is_apart: HTTP is served by a process of its own.
    """

    is_apart: bool

    def host(self, record: RecordOptions | None) -> Host:
        """Its host, whose traffic is recorded as `record` says; it may take long to make.

        Raises:
            InputError: it cannot be made of what was given.
        """


class Teller(CoreListener):
    """Tells once a step what has come of all sequences, in the loop's thread.

    It hears Core after all others, so that what it tells is in the metrics and in the record. An end is told with the
    last token.

    Args:
        host: knows the tokens.
        front: is told by a `Call`.

    Attributes:
        seqs: those that have not ended, by their numbers.
    """

    def __init__(self, host: Host, front: Call):
        self.seqs: dict[int, Sequence] = {}
        self._host, self._front = host, front
        self._told: dict[int, int] = {}
        """How many of their tokens."""

    def add(self, seqs: Seq[Sequence]) -> None:
        """Take note of sequences that are about to come in; from any thread."""
        self._told |= {seq.seq_id: 0 for seq in seqs}
        self.seqs |= {seq.seq_id: seq for seq in seqs}

    def decided(self, batch: Batch) -> None:
        admitted = [(row.seq.seq_id, row.start) for row in batch.admitted if not row.seq.num_preemptions]
        if admitted:
            self._front("hear", News(time.perf_counter(), admitted=admitted))

    def committed(self, batch: Batch) -> None:
        self._tell([seq for seq in batch.sampled if seq.finish_reason is None])

    def finished(self, seq: Sequence) -> None:
        self._tell([seq])
        del self._told[seq.seq_id], self.seqs[seq.seq_id]
        self._host.forget(seq)

    def _tell(self, seqs: list[Sequence]) -> None:
        told, tokens_of = self._told, self._host.tokens
        numbers: list[int] = []
        token_ids: list[int] = []
        ended: list[tuple[int, str | None, str | None]] = []
        for seq in seqs:
            number, refusal = seq.seq_id, seq.refusal
            if refusal is None:
                new = tokens_of(seq, told[number])
                told[number] += len(new)
                token_ids += new
                numbers += [number] * len(new)
            if refusal is not None or seq.finish_reason is not None:
                ended.append((number, seq.finish_reason, refusal))
        if numbers or ended:
            logprobs = self._host.take_logprobs(seqs)
            self._front("hear", News(time.perf_counter(), [], numbers, token_ids, ended, logprobs))


class Hosting:
    """The life of a host: it is made, serves those who ask, and its record is closed.

    Args:
        front: tells those who serve HTTP.
        say: called with a line for the person who serves.

    Attributes:
        host: what serves; None before it does, and the front knows.
    """

    def __init__(
        self,
        model: Model,
        options: ServeOptions,
        record: RecordOptions | None,
        front: Call,
        say: Callable[[str], None],
    ):
        self.host: Host | None = None
        self.say = say
        self._model, self._options, self._record, self._front = model, options, record, front
        self._lock = threading.Lock()
        self._is_closed = False
        self._failure: BaseException | None = None
        self._made: Host
        self._teller: Teller | None = None
        self._metrics: ServerMetrics

    def run(self) -> Counter[str] | None:
        """Make the host, and serve until `close`.

        Returns:
            How many requests were recorded, and how they ended; None if nothing is recorded.

        Raises:
            InputError: the model, or something else that was given, cannot be used.
            RunError: the engine has failed.
        """
        host: Host | None = None
        record: LiveRecord | None = None
        said: str | None = None
        try:
            host = self._made = self._model.host(self._record)
            record = host.record
            if not self._start():
                return None
            live = host.live
            while not live.join(_TICK_S):
                if record is not None:  # segments end that are old enough
                    record.tick()
            counts = None if record is None else record.close()
            if (error := live.error or self._failure) is not None:
                raise error
            return counts
        except BaseException as error:
            said = str(error) or type(error).__name__
            self.close()
            raise
        finally:
            if record is not None:
                record.discard()
            self._front("ended", said)
            if host is not None:
                host.close()

    def _start(self) -> bool:
        """Begin to serve, unless it is closed already."""
        host = self._made
        names = self._options.served_model_name
        with self._lock:
            if self._is_closed:
                return False
            self._metrics = ServerMetrics(names[0] if names else host.backend.name)
            teller = Teller(host, self._front)
            host.start([self._metrics, teller])
            self._teller = teller
            host.watched_by(self._metrics)
            self._front("ready", host.backend)
        return True

    # --- what those tell who serve HTTP ---

    def serving(self) -> None:
        """Requests are served from now on."""
        self.host = self._made
        self.say(f"serving {self._made.backend.name}")

    def submit(self, submissions: Seq[Submission]) -> None:
        """Let requests in, all of them before the next decision."""
        host, teller = self._made, self._teller
        assert teller is not None

        def make(now_ns: int) -> list[Sequence]:
            seqs = []
            for number, ask, length, parts in submissions:
                labels = {"session": ask.session, "priority": ask.priority, "salt": ask.salt}
                request = Request(number, now_ns, parts, length, **labels)  # type: ignore[arg-type]
                seqs.append(host.sequence(request, ask))
            teller.add(seqs)
            return seqs

        with suppress(RunError):  # it has failed, which who asks is told just now
            host.live.submit(make)

    def abort(self, numbers: Seq[int]) -> None:
        """End requests at the next decision; those that have ended by then are left alone."""
        assert self._teller is not None
        seqs = [self._teller.seqs.get(number) for number in numbers]
        self._made.live.abort([seq for seq in seqs if seq is not None])

    def page(self) -> None:
        """Give the metrics page."""
        self._front("paged", self._metrics.page())

    def close(self) -> None:
        """Abort whatever is being served, and end."""
        with self._lock:
            self._is_closed = True
            if self._teller is not None:
                self._made.live.abort(list(self._teller.seqs.values()))
                self._made.live.no_more()

    def fail(self, error: BaseException) -> None:
        """End, and have `run` raise what went wrong."""
        self._failure = error
        self.close()
