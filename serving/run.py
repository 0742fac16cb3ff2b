"""A server's life: it listens, gets its backend, serves, drains, and closes its record."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

from twinserve.engine.options import EngineOptions
from twinserve.serving.backends import EngineBackend, SimulatedBackend
from twinserve.serving.front import Front, serve_apart
from twinserve.serving.hosts import EngineHost, Host, Hosting, Model, SimulatedHost
from twinserve.serving.limits import give_up_after
from twinserve.serving.links import Wire
from twinserve.serving.options import ServeOptions
from twinserve.serving.recording import LiveRecord, RecordOptions
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError, RunError
from twinserve.sim.routers import Router
from twinserve.traces.generator import LengthSpec
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
        router_facts: says in a fleet's record which router it is.
    """

    name: str
    replicas: Seq[ReplicaSpec]
    router: Router
    lengths: LengthSpec | None = None
    time_scale: float = 1.0
    router_facts: dict[str, Any] = field(default_factory=dict)

    is_apart = False

    def host(self, record: RecordOptions | None) -> Host:
        """See `Model.host`."""
        kept = None
        if record is not None:
            kept = LiveRecord.of_simulation(record, self.replicas, self.time_scale, self.router_facts)
        backend = SimulatedBackend(self.name, self.replicas[0].settings, lengths=self.lengths)
        return SimulatedHost(backend, self.replicas, self.router, time_scale=self.time_scale, record=kept)


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

    is_apart = True

    def host(self, record: RecordOptions | None) -> Host:
        """See `Model.host`; the weights are loaded here."""
        llm = load_llm(self.options, self.settings, progress=self.say)
        if llm.runner.device.type == "cuda":
            llm.warm_up()
        kept = None if record is None else LiveRecord.of_engine(record, llm.settings, llm.facts(), llm.device_name)
        return EngineHost(EngineBackend(llm, takes_defaults=self.takes_defaults), llm, kept)


def _listening(options: ServeOptions) -> socket.socket:
    """A socket that is bound where the server is to listen, whose connections send what they are given at once.

    asyncio sees to the latter only of sockets that say their protocol. Else the second piece of an answer, its body or
    a token of a stream, waits until the client has acknowledged the first, which Linux delays by 40 ms.

    Raises:
        InputError: it cannot be.
    """
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((options.host, options.port), family=family)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        problem = f"cannot be listened at: {error.strerror or error}"
        raise InputError(problem, field="host and port", value=f"{options.host}:{options.port}") from error


@contextmanager
def _signals(number_to: Callable[[int], None] | None) -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM call `number_to`, or are ignored where that is None; in a main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler: Any = signal.SIG_IGN if number_to is None else lambda number, frame: number_to(number)
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


class Service:
    """A server and its life: it listens, what it serves is made, it serves, drains, and closes its record.

    A model that is apart is served in the thread that calls `run`, and HTTP by a process of its own, for a loop that
    keeps a device busy cannot wait for the interpreter. Simulated replicas have no device to keep busy, and HTTP is
    served beside them in this process, so that one core is enough for both.

    Args:
        record: how the traffic is recorded; None records nothing.
        say: called with a line for the person who serves.

    Attributes:
        url: where it listens, once it does.
        front: serves HTTP, where that is done in this process.
    """

    def __init__(
        self,
        options: ServeOptions,
        model: Model,
        *,
        record: RecordOptions | None = None,
        say: Callable[[str], None],
    ):
        self.url: str | None = None
        self.front: Front | None = None
        self._options, self._model, self._record, self._say = options, model, record, say
        self._hosting: Hosting | None = None
        self._exit: Callable[[int], None] | None = None

    @property
    def host(self) -> Host | None:
        """What serves; None before it does."""
        return None if self._hosting is None else self._hosting.host

    def run(self) -> Counter[str] | None:
        """Serve until SIGINT, SIGTERM or `stop`; what runs then may end within `shutdown_timeout`.

        Returns:
            How many requests were recorded, and how they ended; None if nothing is recorded.

        Raises:
            InputError: the model, or something else that was given, cannot be used.
            RunError: the engine has failed, or the process that serves HTTP has ended.
        """
        with _listening(self._options) as listener:
            give_up_after(listener, self._options.client_timeout)
            host, port, *_ = listener.getsockname()
            self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            return (self._run_apart if self._model.is_apart else self._run_beside)(listener, self.url)

    def stop(self) -> None:
        """End as at a signal, unless `run` has not begun; from any thread."""
        if self._exit is not None:
            self._exit(signal.SIGTERM)

    def _run_beside(self, listener: socket.socket, url: str) -> Counter[str] | None:
        with ThreadPoolExecutor(1, "hosting") as pool:
            hosted: list[Future[Counter[str] | None]] = []

            async def open_link(front: Front) -> None:
                loop = asyncio.get_running_loop()

                def tell(name: str, *args: Any) -> None:
                    loop.call_soon_threadsafe(getattr(front, name), *args)

                hosting = self._hosting = Hosting(self._model, self._options, self._record, tell, self._say)
                front.linked(lambda name, *args: getattr(hosting, name)(*args))
                hosted.append(pool.submit(hosting.run))

            front = self.front = Front(self._options, url, open_link, catches_signals=True)
            self._exit = front.exit
            front.run(listener)
            return hosted[0].result()

    def _run_apart(self, listener: socket.socket, url: str) -> Counter[str] | None:
        own, other = socket.socketpair()
        wire = Wire(own)
        self._exit = partial(wire.tell, "exit")
        hosting = self._hosting = Hosting(self._model, self._options, self._record, wire.tell, self._say)
        arguments = self._options, url, listener, other
        process = get_context("spawn").Process(target=serve_apart, args=arguments, name="http", daemon=True)
        with _signals(None):  # a process begins with those ignored that were when it was made
            process.start()
        for its in (listener, other):
            its.close()
        with _signals(self._exit):
            wire.begin(hosting, hosting.close)
            try:
                counts = hosting.run()
            finally:
                process.join()
                wire.close()
        if process.exitcode:
            how = f"killed by signal {-process.exitcode}" if process.exitcode < 0 else f"status {process.exitcode}"
            raise RunError(f"the process that serves HTTP has ended: {how}")
        return counts
