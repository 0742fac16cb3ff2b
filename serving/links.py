"""How those who serve HTTP and a Core's side tell each other something: in one process, or between two."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
from collections.abc import Callable
from queue import SimpleQueue
from struct import Struct
from typing import Any, cast

_LENGTH = Struct("<Q")


def message(name: str, *args: Any) -> bytes:
    """A call as bytes, behind their number."""
    content = pickle.dumps((name, args), pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(content)) + content


class Wire:
    """The end of a socket in the process of the Core, which never waits for the other end.

    What it is told goes into a queue, and from there out in a thread of its own. The queue has no bound: it cannot hold
    more than the tokens of the requests that are let in, which end whether somebody reads them or not.

    Args:
        connection: closed with the wire.
    """

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._out: SimpleQueue[bytes | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="wire-out", daemon=True)

    def tell(self, name: str, *args: Any) -> None:
        """A `Call`; what cannot be sent raises here."""
        self._out.put(message(name, *args))

    def begin(self, side: Any, lost: Callable[[], None]) -> None:
        """Send what is told, and call the methods of `side` that the other end tells, in a thread of its own.

        Args:
            side: its `fail` is called with what its methods raise.
            lost: called when the other end has gone.
        """
        threading.Thread(target=self._read, args=(side, lost), name="wire-in", daemon=True).start()
        self._sender.start()

    def close(self) -> None:
        """Send what is left, and end."""
        self._out.put(None)
        self._sender.join()
        self._connection.close()

    def _send(self) -> None:
        is_open = True
        while (content := self._out.get()) is not None:
            if is_open:
                try:
                    self._connection.sendall(content)
                except OSError:
                    is_open = False  # that the other end has gone, the reader sees

    def _read(self, side: Any, lost: Callable[[], None]) -> None:
        try:
            with self._connection.makefile("rb") as file:
                while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
                    (length,) = _LENGTH.unpack(head)
                    if len(content := file.read(length)) < length:
                        break  # the other end went while it told something
                    name, args = pickle.loads(content)
                    getattr(side, name)(*args)
        except OSError:
            pass  # as an end
        except BaseException as error:
            side.fail(error)
        lost()


class LoopWire(asyncio.Protocol):
    """The end of a socket on an event loop.

    Args:
        side: its methods are called; `lost` too, when the other end has gone.
    """

    _transport: asyncio.WriteTransport

    def __init__(self, side: Any):
        self._side, self._buffer = side, bytearray()

    def tell(self, name: str, *args: Any) -> None:
        """A `Call`, on the loop; nothing once the other end has gone."""
        if not self._transport.is_closing():
            self._transport.write(message(name, *args))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is one by its methods alone

    def data_received(self, data: bytes) -> None:
        buffer, begin, size = self._buffer, 0, _LENGTH.size
        buffer += data
        while len(buffer) >= begin + size:
            (length,) = _LENGTH.unpack_from(buffer, begin)
            if len(buffer) < begin + size + length:
                break
            name, args = pickle.loads(memoryview(buffer)[begin + size : begin + size + length])
            begin += size + length
            getattr(self._side, name)(*args)
        del buffer[:begin]

    def connection_lost(self, error: Exception | None) -> None:
        self._side.lost()
