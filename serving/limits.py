"""What a client may ask of a server before anything is served: so large a body, and so long a time to send it."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimits:
    """Refuses bodies that are too large (413) or do not come (408), as soon as that is known.

    Args:
        most_bytes: of a body.
        stall_s: seconds within which the next piece of a body has to come.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, stall_s: float):
        self._app, self._most_bytes, self._stall_s = app, most_bytes, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "")
        claimed = int(said) if said.isdecimal() else 0
        num_bytes, is_whole = 0, False

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()
            if claimed > self._most_bytes:
                raise self._too_large()
            try:
                async with asyncio.timeout(self._stall_s):
                    message = await receive()
            except TimeoutError as error:
                problem = f"the body did not come: nothing of it within {self._stall_s:g} s"
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
