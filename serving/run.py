"""A server's life: it listens, gets its backend, serves, drains, and closes its record."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from twinserve.engine.options import EngineOptions
from twinserve.policies import CoreListener, SamplingParams
from twinserve.serving.app import Server, make_app
from twinserve.serving.backends import Backend, EngineBackend, SimulatedBackend
from twinserve.serving.metrics import ServerMetrics
from twinserve.serving.options import ServeOptions
from twinserve.serving.simulated import LiveReplica
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.latency import LatencyModel
from twinserve.traces.generator import LengthSpec
from twinserve.traces.runs.record import RunRecorder
from twinserve.worlds.run import load_llm


@dataclass(frozen=True)
class SimulatedModel:
    """What a simulated server stands in for.

    Attributes:
        name: of the model.
        latency, latency_facts: what a step costs, and what says in a record which model that is.
        lengths: how long answers would be if nothing cut them short; None is as long as is asked for.
        time_scale: a simulated second takes so many on the wall.
    """

    name: str
    settings: Settings
    latency: LatencyModel
    latency_facts: dict[str, Any]
    lengths: LengthSpec | None = None
    time_scale: float = 1.0

    def backend(self, record: Path | None) -> Backend:
        """The backend, which writes the run record `record`."""
        recorder = None
        if record is not None:
            facts = _facts() | {"latency": self.latency_facts, "time_scale": self.time_scale}
            device = f"simulated: {self.latency_facts['name']}"
            how: dict[str, Any] = {"settings": self.settings.model_dump(), "facts": facts, "device": device}
            recorder = RunRecorder(record, world="sim", **how)
        how = {"lengths": self.lengths, "time_scale": self.time_scale, "recorder": recorder}
        return SimulatedBackend(self.name, self.settings, self.latency, **how)


@dataclass(frozen=True)
class EngineModel:
    """A model on the engine.

    Attributes:
        say: called with a line as each part of the work begins.
    """

    options: EngineOptions
    settings: Settings
    say: Callable[[str], None]

    def backend(self, record: Path | None) -> Backend:
        """The backend, which writes the run record `record`; the weights are loaded here."""
        llm = load_llm(self.options, self.settings, progress=self.say)
        llm.warm_up()
        recorder = None
        if record is not None:
            how: dict[str, Any] = {"settings": llm.settings.model_dump(), "device": llm.device_name}
            recorder = RunRecorder(record, world="real", facts=_facts() | llm.facts(), **how)
        return EngineBackend(llm, recorder)


def _facts() -> dict[str, Any]:
    """What the record of live traffic says of where its requests came from."""
    trace = {"path": "live", "format": "live", "sha256": "", "notes": [], "handled": {}, "transforms": []}
    return {"trace": trace, "sampling": asdict(SamplingParams())}


class _Uvicorn(uvicorn.Server):
    """A server that ends without a signal's default action, and says where it listens."""

    def __init__(self, config: uvicorn.Config, say: Callable[[str], None]):
        super().__init__(config)
        self._say = say

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for listening in self.servers:
            for socket in listening.sockets:
                host, port, *_ = socket.getsockname()
                self._say(f"listening at http://{host}:{port}")


def serve(
    options: ServeOptions,
    model: SimulatedModel | EngineModel,
    *,
    record: Path | None = None,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Serve until SIGINT or SIGTERM; then what runs may end within `shutdown_timeout`, and the record is closed.

    Args:
        record: the folder of the run record to write; None writes none.
        say: called with a line for the person who serves.

    Returns:
        The record's summary, if one is written.

    Raises:
        InputError: the model, or something else that was given, cannot be used.
        RunError: the engine has failed.
    """
    server = Server(options)
    life = _Life(server, model, record, say)
    config = uvicorn.Config(
        make_app(server, life.lifespan),
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=options.shutdown_timeout,
    )
    life.uvicorn = _Uvicorn(config, say)
    try:
        life.uvicorn.run()
    except SystemExit as error:  # uvicorn's, where it cannot listen
        raise InputError("cannot be listened at", field="port", value=options.port) from error
    if life.error is not None:
        raise life.error
    return life.summary


class _Life:
    """What begins and ends with the server."""

    uvicorn: uvicorn.Server

    def __init__(
        self, server: Server, model: SimulatedModel | EngineModel, record: Path | None, say: Callable[[str], None]
    ):
        self.error: BaseException | None = None
        self.summary: dict[str, Any] | None = None
        self._server, self._model, self._record, self._say = server, model, record, say

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Make the backend while the server listens already, and end it with the server."""
        serving = asyncio.create_task(self._serve())
        yield
        if (backend := self._server.backend) is not None:
            backend.live.abort_all()
            await asyncio.to_thread(backend.live.close)
        await serving

    async def _serve(self) -> None:
        """Serve until the Core is closed, or something fails, which ends the server."""
        backend = None
        try:
            backend = await asyncio.to_thread(self._model.backend, self._record)
            self._start(backend)
            await asyncio.to_thread(backend.live.join)
            self.error = backend.live.error
            if backend.recorder is not None and self.error is None:
                self.summary = backend.recorder.close()
        except BaseException as error:
            self.error = error
        finally:
            if backend is not None and backend.recorder is not None:
                backend.recorder.discard()
            self.uvicorn.should_exit = True

    def _start(self, backend: Backend) -> None:
        metrics = ServerMetrics(
            self._server.options.served_model_name[0] if self._server.options.served_model_name else backend.name
        )
        listeners: list[CoreListener] = [metrics]
        if backend.recorder is not None:
            listeners.append(backend.recorder)
        backend.start(listeners)
        live = backend.live
        metrics.watch(live.core, backend.settings.num_gpu_blocks, backend.settings.block_size)
        if isinstance(live, LiveReplica):
            metrics.gauge("simulation_lag_seconds", "How late steps are simulated.", lambda: live.lag_s)
        self._server.metrics, self._server.backend = metrics, backend
        self._say(f"serving {backend.name}")
