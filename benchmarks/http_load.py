"""Servers in processes of their own, and clients that cost little: what the benchmarks of HTTP share."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

HEAD_BYTES, TAIL_BYTES = 2048, 2048
"""Kept of an answer: of its beginning, which says why there is none, and of its end, which has its usage."""


def twinserve(*arguments: object) -> str:
    """What a command says on its standard output.

    Raises:
        RuntimeError: it fails.
    """
    line = [sys.executable, "-m", "twinserve", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(line)}: {done.stderr}")
    return done.stdout


@contextmanager
def served(arguments: Seq[str], cores: set[int] | None = None) -> Iterator[str]:
    """The URL of `twinserve serve` with these arguments, on these cores, until the block ends; then it has ended too.

    Raises:
        RuntimeError: it did not come up, or ended with another status than 0.
    """

    def on_cores() -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)

    command = [sys.executable, "-m", "twinserve", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=on_cores)
    assert process.stderr is not None
    said, url = [], None
    for line in process.stderr:
        said.append(line)
        if (found := re.search(r"listening at (\S+)", line)) is not None:
            url = found[1]
        if line.startswith("serving "):
            break
    if url is None:
        raise RuntimeError(f"{command} ended: {''.join(said)}")
    try:
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        if process.wait() != 0:
            raise RuntimeError(f"{command} ended with {process.returncode}: {rest}")


def scraped(url: str) -> dict[str, float]:
    """The values of a server's metrics page, buckets left out, added up over labels."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        page = response.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


@dataclass
class Streamed:
    """What a stream said: when, in seconds of time.perf_counter, how many events, and its first and last bytes."""

    sent_s: float
    first_s: float | None = None
    last_s: float | None = None
    events: int = 0
    is_whole: bool = False
    head: bytes = b""
    tail: bytes = b""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def output_tokens(self) -> int | None:
        """How many tokens it says that the answer has; None where it was not asked, or broke off."""
        found = re.findall(rb'"completion_tokens": ?(\d+)', self.tail)
        return int(found[-1]) if found else None

    @property
    def refusal(self) -> str:
        """Of an answer that is no whole stream, its status and its body, as far as they were kept."""
        status, _, rest = self.head.decode(errors="replace").partition("\r\n")
        return " ".join(filter(None, (status, rest.partition("\r\n\r\n")[2])))


class _Reader(asyncio.Protocol):
    """Sends a request and counts the events of its answer."""

    def __init__(self, request: bytes, streamed: Streamed):
        self._request, self._streamed = request, streamed

    def connection_made(self, transport: Any) -> None:
        self._streamed.sent_s = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        streamed, now = self._streamed, time.perf_counter()
        if b"data: " in data and streamed.first_s is None:
            streamed.first_s = now
        streamed.last_s = now
        streamed.events += data.count(b"\n\n")
        if len(streamed.head) < HEAD_BYTES:
            streamed.head += data[:HEAD_BYTES]
        streamed.tail = (streamed.tail + data)[-TAIL_BYTES:]

    def connection_lost(self, error: Exception | None) -> None:
        self._streamed.is_whole = b"data: [DONE]" in self._streamed.tail[-32:]
        self._streamed.done.set()


async def stream(
    url: str, body: dict[str, Any], path: str = "/v1/completions", headers: Mapping[str, str] | None = None
) -> Streamed:
    """Ask for an answer as a stream, and read it to its end.

    Args:
        url: of the server, http or https; what it has behind the host leads to `path`.

    Raises:
        OSError: there is no connection.
    """
    at, content = urlsplit(url), json.dumps(body | {"stream": True}).encode()
    lines = {"host": at.netloc, "connection": "close", "content-type": "application/json", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    request = f"POST {at.path.rstrip('/')}{path} HTTP/1.1\r\n{head}content-length: {len(content)}\r\n\r\n".encode()
    streamed, is_secure = Streamed(time.perf_counter()), at.scheme == "https"
    host, port = at.hostname or "", at.port or (443 if is_secure else 80)
    await asyncio.get_running_loop().create_connection(
        lambda: _Reader(request + content, streamed), host, port, ssl=is_secure
    )
    await streamed.done.wait()
    return streamed
