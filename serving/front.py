"""Those who serve HTTP: a server that listens, is told what serves behind it, and drains."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import anyio
import uvicorn

from twinserve.serving.app import Server, make_app
from twinserve.serving.backends import Backend
from twinserve.serving.dispatch import Dispatcher
from twinserve.serving.limits import protocol_within
from twinserve.serving.links import LoopWire
from twinserve.serving.messages import Call, News
from twinserve.serving.options import ServeOptions

Open = Callable[["Front"], Awaitable[None]]
"""Lets a front and a Core's side tell each other something, on the event loop; calls `linked` first of all."""


_LAST_WORDS_S = 2.0
"""In which whoever is connected when the time of a shutdown is over may take the end of its answer."""


class _Uvicorn(uvicorn.Server):
    """A server that ends without a signal's default action.

    Its tasks are never cancelled, for which uvicorn would print where each of them stood.

    Args:
        catches_signals: SIGINT and SIGTERM end it.
        seconds: that whoever is connected has at shutdown; a second signal ends them.
        begun, over: awaited once it listens, and once nobody is connected any more.
        hurry: called when those seconds are over.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        catches_signals: bool,
        seconds: float,
        begun: Callable[[], Awaitable[None]],
        hurry: Callable[[], None],
        over: Callable[[], Awaitable[None]],
    ):
        super().__init__(config)
        is_main = threading.current_thread() is threading.main_thread()
        self._signals = (signal.SIGINT, signal.SIGTERM) if catches_signals and is_main else ()
        self._seconds, self._begun, self._hurry, self._over = seconds, begun, hurry, over
        self._told_again = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._told_again.set()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in self._signals:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        await self._begun()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_in_time())
        await super().shutdown(sockets)
        ending.cancel()
        await self._over()

    async def _end_in_time(self) -> None:
        """Have nobody be connected any more once the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                await self._told_again.wait()
        self._hurry()
        await asyncio.sleep(_LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # whoever serves it sees that the client has gone


class Front:
    """Serves HTTP on an event loop of its own, for a Core in this process or in another.

    Args:
        url: where it listens, as people are told.
        open_link: connects it with the Core's side.
        catches_signals: SIGINT and SIGTERM end it, where it runs in the main thread; else `exit` alone does.

    Attributes:
        server: what the paths share.
        is_lost: the Core's side has gone without a word.
    """

    def __init__(self, options: ServeOptions, url: str, open_link: Open, *, catches_signals: bool):
        self.server = Server(options)
        self.is_lost = False
        self._url, self._open, self._catches = url, open_link, catches_signals
        self._host: Call
        self._ended: asyncio.Event
        config = uvicorn.Config(
            make_app(self.server),
            http=protocol_within(options.client_timeout),
            log_level="warning",
            access_log=False,
        )
        seconds = options.shutdown_timeout
        self.uvicorn = _Uvicorn(config, catches_signals, seconds, self._begin, self._hurry, self._finish)

    def run(self, listener: socket.socket) -> None:
        """Serve until it is told to end, or nothing is served behind it any more."""
        self.uvicorn.run([listener])

    async def _begin(self) -> None:
        async with anyio.create_task_group():
            pass  # imports what a stream runs in, for which the first one's tokens would wait
        self._ended = asyncio.Event()
        await self._open(self)

    def _hurry(self) -> None:
        """Abort what still runs; who waits for it is told so."""
        if self.server.dispatcher is not None and (count := self.server.dispatcher.abort()):
            self._host("say", f"{count} requests have not ended within the time, and are aborted")

    async def _finish(self) -> None:
        """Have what serves behind it end too."""
        self._host("close")
        await self._ended.wait()

    # --- what the Core's side tells ---

    def linked(self, host: Call) -> None:
        """The Core's side can be told something from now on, by `host`."""
        self._host = host
        host("say", f"listening at {self._url}")

    def ready(self, backend: Backend) -> None:
        """Requests can be served."""
        self.server.dispatcher = Dispatcher(backend, self._host)
        self._host("serving")

    def hear(self, news: News) -> None:
        """Something has come of requests."""
        assert self.server.dispatcher is not None
        self.server.dispatcher.hear(news)

    def paged(self, page: bytes) -> None:
        """The metrics page that was asked for."""
        assert self.server.dispatcher is not None
        self.server.dispatcher.paged(page)

    def ended(self, error: str | None) -> None:
        """Nothing is served any more, and so nothing will be here."""
        if self.server.dispatcher is not None:
            self.server.dispatcher.ended(error)
        self._ended.set()
        self.uvicorn.should_exit = True

    def exit(self, number: int) -> None:
        """End as at a signal."""
        self.uvicorn.handle_exit(number, None)

    def lost(self) -> None:
        """The Core's side has gone; without a word, unless it has ended."""
        if not self._ended.is_set():
            self.is_lost = True
            self.ended("its process has ended")


def serve_apart(options: ServeOptions, url: str, listener: socket.socket, connection: socket.socket) -> None:
    """The life of a process that serves HTTP for a Core in the process that has started it, which tells it to end.

    Args:
        listener: listens already.
        connection: to the Core's side.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal's go to both processes, and that one tells this one

    async def open_link(front: Front) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: LoopWire(front), sock=connection)

    front = Front(options, url, open_link, catches_signals=False)
    front.run(listener)
    if front.is_lost:
        print("twinserve: the process of the engine has ended without a word", file=sys.stderr)
    sys.stderr.flush()
    os._exit(int(front.is_lost))  # whoever waits for it does not wait until an interpreter is taken down, too
