"""A server's life: it listens, gets its backend, serves, drains, and closes its record."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI

from twinserve.engine.options import EngineOptions
from twinserve.policies import CoreListener, SamplingParams
from twinserve.serving.answers import Wakes
from twinserve.serving.app import Server, make_app
from twinserve.serving.backends import Backend, EngineBackend, SimulatedBackend
from twinserve.serving.metrics import ServerMetrics
from twinserve.serving.options import ServeOptions
from twinserve.serving.simulated import LiveReplicas
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.routers import Router
from twinserve.traces.generator import LengthSpec
from twinserve.traces.runs.concealed import ConcealedTokens, as_they_are
from twinserve.traces.runs.record import RunRecorder
from twinserve.worlds.run import ReplicaSpec, load_llm


@dataclass(frozen=True)
class SimulatedModel:
    """What a simulated server stands in for.

    Attributes:
        name: of the model.
        replicas: one, or a fleet's.
        router: which of them serves a request.
        lengths: how long answers would be if nothing cut them short; None is as long as is asked for.
        time_scale: a simulated second takes so many on the wall.
    """

    name: str
    replicas: Seq[ReplicaSpec]
    router: Router
    lengths: LengthSpec | None = None
    time_scale: float = 1.0

    def backend(self, record: Path | None) -> Backend:
        """The backend, which writes the run record `record`.

        Raises:
            InputError: of a fleet nothing is recorded, or `record` cannot be written.
        """
        recorder = None
        if record is not None:
            if len(self.replicas) > 1:
                raise InputError(
                    "expected none: live traffic of a fleet is not recorded", field="record", value=str(record)
                )
            (alone,) = self.replicas
            facts = {
                "latency": alone.latency_facts,
                "time_scale": self.time_scale,
                "sampling": asdict(SamplingParams()),
            }
            device = f"simulated: {alone.latency_facts['name']}"
            how: dict[str, Any] = {"settings": alone.settings.model_dump(), "facts": facts, "device": device}
            recorder = LiveRecorder(record, world="sim", **how)
        how = {"lengths": self.lengths, "time_scale": self.time_scale, "recorder": recorder}
        return SimulatedBackend(self.name, self.replicas, self.router, **how)


@dataclass(frozen=True)
class EngineModel:
    """A model on the engine.

    Attributes:
        say: called with a line as each part of the work begins.
        records_tokens: a record holds the tokens themselves, and not only which prefixes are equal.
        takes_defaults: what a request leaves open is sampled as the model's generation config says.
    """

    options: EngineOptions
    settings: Settings
    say: Callable[[str], None]
    records_tokens: bool = False
    takes_defaults: bool = True

    def backend(self, record: Path | None) -> Backend:
        """The backend, which writes the run record `record`; the weights are loaded here."""
        llm = load_llm(self.options, self.settings, progress=self.say)
        if llm.runner.device.type == "cuda":
            llm.warm_up()
        recorder = None
        if record is not None:
            how: dict[str, Any] = {"settings": llm.settings.model_dump(), "device": llm.device_name}
            how["tokens"] = as_they_are if self.records_tokens else ConcealedTokens()
            facts = llm.facts() | {"sampling": asdict(SamplingParams())}
            recorder = LiveRecorder(record, world="real", facts=facts, **how)
        return EngineBackend(llm, recorder, takes_defaults=self.takes_defaults)


class LiveRecorder(RunRecorder):
    """Writes the run record of live traffic, whose trace is its own requests.jsonl: so a simulation of that is of the
    same trace."""

    def last_facts(self, folder: Path) -> dict[str, Any]:
        digest = hashlib.sha256((folder / "requests.jsonl").read_bytes()).hexdigest()
        trace = {"path": "requests.jsonl", "format": "twinserve-record", "sha256": digest, "notes": {}}
        return {"trace": trace | {"handled": {}, "transforms": []}}


class Model(Protocol):
    """What a service serves; `SimulatedModel` and `EngineModel` are such."""

    def backend(self, record: Path | None) -> Backend:
        """The backend, which writes the run record `record`; it may take long to make."""


class _Uvicorn(uvicorn.Server):
    """A server that ends without a signal's default action, and says where it listens."""

    def __init__(self, config: uvicorn.Config, say: Callable[[str], None]):
        super().__init__(config)
        self._say = say
        self.url: str | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        is_main = threading.current_thread() is threading.main_thread()
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM) if is_main else ()
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._say(f"listening at {self.url}")


def _listening(options: ServeOptions) -> socket.socket:
    """A socket that is bound where the server is to listen.

    Raises:
        InputError: it cannot be.
    """
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        problem = f"cannot be listened at: {error.strerror or error}"
        raise InputError(problem, field="host and port", value=f"{options.host}:{options.port}") from error


class Service:
    """A server and its life: it listens, gets its backend, serves, drains, and closes its record.

    Args:
        record: the folder of the run record to write; None writes none.
        say: called with a line for the person who serves.

    Attributes:
        url: where it listens, once it does.
    """

    def __init__(
        self,
        options: ServeOptions,
        model: Model,
        *,
        record: Path | None = None,
        say: Callable[[str], None],
    ):
        self._server = Server(options)
        self._model, self._record, self._say = model, record, say
        self._error: BaseException | None = None
        self._summary: dict[str, Any] | None = None
        self._is_over = False
        config = uvicorn.Config(
            make_app(self._server, self._lifespan),
            host=options.host,
            port=options.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=options.shutdown_timeout,
        )
        self._uvicorn = _Uvicorn(config, say)

    @property
    def url(self) -> str | None:
        return self._uvicorn.url

    @property
    def backend(self) -> Backend | None:
        """What serves; None before it is there."""
        return self._server.backend

    def run(self) -> dict[str, Any] | None:
        """Serve until SIGINT, SIGTERM or `stop`; what runs then may end within `shutdown_timeout`.

        Returns:
            The record's summary, if one is written.

        Raises:
            InputError: the model, or something else that was given, cannot be used.
            RunError: the engine has failed.
        """
        with _listening(self._server.options) as listener:
            self._uvicorn.run([listener])
        if self._error is not None:
            raise self._error
        return self._summary

    def stop(self) -> None:
        """End as at a signal; from any thread."""
        self._uvicorn.should_exit = True

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Make the backend while the server listens already, and end it with the server."""
        serving = asyncio.create_task(self._serve())
        yield
        self._is_over = True
        if (backend := self._server.backend) is not None:
            backend.live.abort_all()
            backend.live.no_more()
        await serving

    async def _serve(self) -> None:
        """Serve until the Core is closed, or something fails, which ends the server."""
        backend = None
        try:
            backend = await asyncio.to_thread(self._model.backend, self._record)
            if self._is_over:
                return
            self._start(backend)
            await asyncio.to_thread(backend.live.join)
            self._error = backend.live.error
            if backend.recorder is not None and self._error is None:
                self._summary = backend.recorder.close()
        except BaseException as error:
            self._error = error
        finally:
            if backend is not None and backend.recorder is not None:
                backend.recorder.discard()
            self._uvicorn.should_exit = True

    def _start(self, backend: Backend) -> None:
        metrics = ServerMetrics(
            self._server.options.served_model_name[0] if self._server.options.served_model_name else backend.name
        )
        listeners: list[CoreListener] = [metrics]
        if backend.recorder is not None:
            listeners.append(backend.recorder)
        backend.start(listeners)
        live = backend.live
        metrics.watch(live.cores, backend.settings)
        if isinstance(live, LiveReplicas):
            metrics.own_gauge("simulation_lag_seconds", "How late steps are simulated.", lambda: live.lag_s)
        self._server.wakes = Wakes(asyncio.get_running_loop())
        self._server.metrics, self._server.backend = metrics, backend
        self._say(f"serving {backend.name}")
