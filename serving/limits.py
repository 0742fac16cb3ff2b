"""What a client may ask of a server before anything is served: so large a body, so long a time to send a request."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def protocol_within(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP, which ends connections whose requests' heads are not there as a whole within `seconds`.

    However the bytes come, one by one among them; so nobody holds connections open by sending heads that never end.
    """

    class HeadsInTime(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._set_limit()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._set_limit()

        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            self._unset_limit()

        def _set_limit(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._unset_limit()
            elif self._limit is None:
                self._limit = self.loop.call_later(seconds, self._give_up)

        def _unset_limit(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

        def _give_up(self) -> None:
            self.transport.write(_TOO_SLOW)
            self.transport.close()

    return HeadsInTime


class BodyLimits:
    """Refuses bodies that are too large (413) or do not come (408), as soon as that is known.

    Args:
        most_bytes: of a body.
        seconds: within which all of a body has to come.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float):
        self._app, self._most_bytes, self._seconds = app, most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "")
        claimed = int(said) if said.isdecimal() else 0
        num_bytes, is_whole = 0, False
        end_s = asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()
            if claimed > self._most_bytes:
                raise self._too_large()
            try:
                async with asyncio.timeout_at(end_s):
                    message = await receive()
            except TimeoutError as error:
                problem = f"the body did not come as a whole within {self._seconds:g} s"
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, problem, {"connection": "close"}) from error
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > self._most_bytes:
                raise self._too_large()
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> HTTPException:
        problem = f"the body is too large, expected at most {self._most_bytes} bytes"
        return HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem, {"connection": "close"})


def give_up_after(listener: socket.socket, seconds: float) -> None:
    """Have the kernel close connections of `listener` whose clients are gone, or read nothing for so long."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_USER_TIMEOUT", max(1, round(seconds * 1000))),
        ("TCP_KEEPIDLE", max(1, round(seconds / 2))),
        ("TCP_KEEPINTVL", max(1, round(seconds / 8))),
        ("TCP_KEEPCNT", 4),
    ):
        if hasattr(socket, name):  # not every system has each
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
