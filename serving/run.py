"""A server's life: it listens, gets its backend, serves, drains, and closes its record."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI

from twinserve.engine.options import EngineOptions
from twinserve.serving.answers import Wakes
from twinserve.serving.app import Server, make_app
from twinserve.serving.backends import Backend, EngineBackend, SimulatedBackend
from twinserve.serving.limits import give_up_after, protocol_within
from twinserve.serving.metrics import ServerMetrics
from twinserve.serving.options import ServeOptions
from twinserve.serving.recording import LiveRecord, RecordOptions
from twinserve.serving.simulated import LiveReplicas
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.routers import Router
from twinserve.traces.generator import LengthSpec
from twinserve.worlds.run import ReplicaSpec, load_llm

_TICK_S = 1.0


@dataclass(frozen=True)
class SimulatedModel:
    """What a simulated server stands in for.

    Attributes:
        name: of the model.
        replicas: one, or a fleet's.
        router: which of them serves a request.
        lengths: how long answers would be if nothing cut them short; None is as long as is asked for.
        time_scale: a simulated second takes so many on the wall.
        router_facts: says in a fleet's record which router it is.
    """

    name: str
    replicas: Seq[ReplicaSpec]
    router: Router
    lengths: LengthSpec | None = None
    time_scale: float = 1.0
    router_facts: dict[str, Any] = field(default_factory=dict)

    def backend(self, record: RecordOptions | None) -> Backend:
        """The backend, whose traffic is recorded as `record` says.

        Raises:
            InputError: the record cannot be written.
        """
        kept = None
        if record is not None:
            kept = LiveRecord.of_simulation(record, self.replicas, self.time_scale, self.router_facts)
        how: dict[str, Any] = {"lengths": self.lengths, "time_scale": self.time_scale, "record": kept}
        return SimulatedBackend(self.name, self.replicas, self.router, **how)


@dataclass(frozen=True)
class EngineModel:
    """A model on the engine.

    Attributes:
        say: called with a line as each part of the work begins.
        takes_defaults: what a request leaves open is sampled as the model's generation config says.
    """

    options: EngineOptions
    settings: Settings
    say: Callable[[str], None]
    takes_defaults: bool = True

    def backend(self, record: RecordOptions | None) -> Backend:
        """The backend, whose traffic is recorded as `record` says; the weights are loaded here."""
        llm = load_llm(self.options, self.settings, progress=self.say)
        if llm.runner.device.type == "cuda":
            llm.warm_up()
        kept = None if record is None else LiveRecord.of_engine(record, llm.settings, llm.facts(), llm.device_name)
        return EngineBackend(llm, kept, takes_defaults=self.takes_defaults)


class Model(Protocol):
    """What a service serves; `SimulatedModel` and `EngineModel` are such."""

    def backend(self, record: RecordOptions | None) -> Backend:
        """The backend, whose traffic is recorded as `record` says; it may take long to make."""


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


TURN_S = 1e-4
"""The loop of Core needs the interpreter a few times a step, and waits for as long each time while streams are written:
with Python's 5 ms a step would take several times as long as the device does."""


@contextmanager
def _threads_in_turns() -> Iterator[None]:
    """Within the block, a thread of Python gives way to another after TURN_S."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Service:
    """A server and its life: it listens, gets its backend, serves, drains, and closes its record.

    Args:
        record: how the traffic is recorded; None records nothing.
        say: called with a line for the person who serves.

    Attributes:
        url: where it listens, once it does.
    """

    def __init__(
        self,
        options: ServeOptions,
        model: Model,
        *,
        record: RecordOptions | None = None,
        say: Callable[[str], None],
    ):
        self._server = Server(options)
        self._model, self._record, self._say = model, record, say
        self._error: BaseException | None = None
        self._counts: Counter[str] | None = None
        self._is_over = False
        config = uvicorn.Config(
            make_app(self._server, self._lifespan),
            host=options.host,
            port=options.port,
            http=protocol_within(options.client_timeout),
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

    def run(self) -> Counter[str] | None:
        """Serve until SIGINT, SIGTERM or `stop`; what runs then may end within `shutdown_timeout`.

        Returns:
            How many requests were recorded, and how they ended; None if nothing is recorded.

        Raises:
            InputError: the model, or something else that was given, cannot be used.
            RunError: the engine has failed.
        """
        with _listening(self._server.options) as listener, _threads_in_turns():
            give_up_after(listener, self._server.options.client_timeout)
            self._uvicorn.run([listener])
        if self._error is not None:
            raise self._error
        return self._counts

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
            await self._ended(backend)
            self._error = backend.live.error
            if backend.record is not None:
                self._counts = backend.record.close()
        except BaseException as error:
            self._error = error
        finally:
            if backend is not None and backend.record is not None:
                backend.record.discard()
            self._uvicorn.should_exit = True

    async def _ended(self, backend: Backend) -> None:
        """Wait until nothing is served any more, and have segments end that are old enough meanwhile."""
        ended = asyncio.ensure_future(asyncio.to_thread(backend.live.join))
        while not ended.done():
            await asyncio.wait([ended], timeout=_TICK_S)
            if backend.record is not None:
                await asyncio.to_thread(backend.record.tick)
        await ended

    def _start(self, backend: Backend) -> None:
        metrics = ServerMetrics(
            self._server.options.served_model_name[0] if self._server.options.served_model_name else backend.name
        )
        backend.start([metrics])
        live = backend.live
        metrics.watch(live.cores, backend.settings)
        if isinstance(live, LiveReplicas):
            metrics.own_gauge("simulation_lag_seconds", "How late steps are simulated.", lambda: live.lag_s)
        wakes = self._server.wakes = Wakes(asyncio.get_running_loop())
        metrics.own_gauge("stream_lag_seconds", "How late streams hear of what is there for them.", lambda: wakes.lag_s)
        self._server.metrics, self._server.backend = metrics, backend
        self._say(f"serving {backend.name}")
