"""Clients that are no library: a page in a browser, slow readers, sockets that are half closed."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from live_servers import Running, simulated

from twinserve.traces.runs.record import load_record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PAGE = """<!doctype html><title>stream</title><script>
const stream = async (url, max_tokens, most_pieces) => {
  const body = JSON.stringify({prompt: "a", max_tokens, stream: true});
  const response = await fetch(url, {method: "POST", headers: {"content-type": "application/json"}, body});
  let pieces = 0, text = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  while (pieces < most_pieces) {
    const {done, value} = await reader.read();
    if (done) break;
    pieces += 1;
    text += value;
  }
  return {pieces, text};
};
</script>"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The origin of a page that streams."""
    (tmp_path / "index.html").write_text(PAGE)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="none of chromium, chromium-browser and google-chrome is on the PATH")
def test_a_page_streams_where_its_origin_is_allowed_and_nowhere_else(serving, site):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    allowed, closed = serving(simulated(50.0), allowed_origins=[site]), serving(simulated())
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(site)
        whole = page.evaluate(f"stream('{allowed.url}/v1/completions', 5, Infinity)")
        begun = page.evaluate(f"stream('{allowed.url}/v1/completions', 900, 4)")
        with pytest.raises(playwright.Error, match="Failed to fetch"):
            page.evaluate(f"stream('{closed.url}/v1/completions', 5, Infinity)")
        browser.close()
    assert whole["text"].endswith("data: [DONE]\n\n")
    assert begun["pieces"] == 4 and "[DONE]" not in begun["text"], "pieces come long before the answer's end"


def ask(running: Running, *, length: int | None = -1, body: bytes = b"", **fields: object) -> socket.socket:
    """A socket over which a completion was asked for; or something that says it has another length, or none."""
    body = body or (json.dumps({"prompt": "a", "ignore_eos": True} | fields).encode() if length == -1 else b"")
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "connection: close", "content-type: application/json"]
    lines.append("transfer-encoding: chunked" if length is None else f"content-length: {max(length, len(body))}")
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def read_all(connection: socket.socket) -> bytes:
    content = b""
    while piece := connection.recv(65536):
        content += piece
    return content


def test_the_pieces_of_an_answer_are_sent_without_waiting_for_one_another(serving):
    """Else every answer over a connection that stays open comes some 40 ms late, and so do tokens of a stream."""
    running = serving(simulated())
    with ask(running, max_tokens=900, stream=True) as connection:
        connection.recv(10)
        (served,) = running.service.front.uvicorn.server_state.connections
        assert served.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_reader_that_is_slow_gets_everything_and_keeps_nobody_waiting(serving):
    running = serving(simulated(0.01, num_gpu_blocks=4096, max_model_len=60_000))
    slow = ask(running, max_tokens=50_000, stream=True)
    slow.recv(1000)
    with ask(running, max_tokens=5) as quick:
        assert b'"completion_tokens":5' in read_all(quick)
    running.settle()
    content = read_all(slow)
    slow.close()
    assert content.count(b" ") > 50_000 and content.rstrip(b"\r\n0").endswith(b"data: [DONE]")


def test_a_reader_that_reads_nothing_is_given_up(serving):
    """What it was to get lies in the server's memory no longer."""
    running = serving(simulated(0.001, num_gpu_blocks=60_000, max_model_len=60_000), client_timeout=1)
    much = {"max_tokens": 50_000, "n": 16, "return_token_ids": True}  # more than sockets hold, however it is cut
    with ask(running, stream=True, **much) as slow:
        slow.recv(1000)
        running.settle()
        while running.service.front.server.dispatcher.streams:
            time.sleep(0.01)
        content = b""
        with contextlib.suppress(ConnectionResetError):
            content = read_all(slow)
        assert b"[DONE]" not in content
    with ask(running, max_tokens=5) as quick:
        assert b'"completion_tokens":5' in read_all(quick)


def test_bodies_that_are_too_large_or_do_not_come_are_refused(serving):
    running = serving(simulated(), max_body_mib=0.001, client_timeout=1.5)
    for length, body, status in (
        (2000, b"", b"413"),
        (2000, b'{"prompt": "' + b"a" * 1990, b"413"),
        (500, b'{"prompt": "', b"408"),
    ):
        with ask(running, length=length, body=body) as connection:
            content = read_all(connection)
            assert content.startswith(b"HTTP/1.1 " + status), content
            assert b'{"error":{"message":"the body ' in content and b'"code":' + status in content
    chunked = b"7d0\r\n" + b"a" * 2000 + b"\r\n"
    with ask(running, length=None, body=chunked) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 413")
    with ask(running, max_tokens=5) as connection:
        assert b'"completion_tokens":5' in read_all(connection)


def drip(running: Running, begun: bytes, piece: bytes) -> bytes:
    """What comes of a request that begins so and goes on by `piece` after `piece`, without an end."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        if begun.startswith(WHOLE):
            connection.sendall(WHOLE)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(begun.removeprefix(WHOLE))
        connection.settimeout(0.05)
        while True:
            with contextlib.suppress(TimeoutError):
                return connection.recv(65536)
            connection.sendall(piece)


WHOLE = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    ("begun", "piece"),
    [
        (b"", b""),
        (HEAD, b"x-a: b\r\n"),
        (WHOLE + HEAD, b"x-a: b\r\n"),
        (HEAD + b"content-length: 99999\r\n\r\n", b" "),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
)
def test_requests_that_never_end_are_ended_and_leave_nothing(serving, begun, piece):
    """However steadily their bytes come; who does send a request is served meanwhile."""
    running = serving(simulated(), client_timeout=1.5)
    with ThreadPoolExecutor(10) as pool:
        waits = [pool.submit(drip, running, begun, piece) for _ in range(10)]
        with ask(running, max_tokens=5) as other:
            assert b'"completion_tokens":5' in read_all(other)
    for wait in waits:
        with contextlib.suppress(ConnectionError):  # closed just as a piece was sent
            assert wait.result().startswith(b"HTTP/1.1 408")
    while running.service.front.uvicorn.server_state.connections:
        time.sleep(0.01)
    assert not running.core.sequences and not running.service.front.server.dispatcher.streams


def test_a_socket_that_is_closed_for_writing_is_a_client_that_has_gone(serving):
    running = serving(simulated())
    with ask(running, max_tokens=900) as connection:
        while not running.core.sequences:
            pass
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b""
    running.settle()


def test_sockets_that_are_half_closed_or_break_off_lose_no_block_and_no_request(serving, tmp_path):
    running = serving(simulated(), record=tmp_path / "run")
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as cut:
        cut.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    gone = [ask(running, max_tokens=900, stream=place % 2 == 0) for place in range(6)]
    while len(running.core.sequences) < 6:
        pass
    for connection in gone:
        connection.shutdown(socket.SHUT_WR)
        connection.close()
    assert running.client().completions.create(model="round", prompt="b", max_tokens=3).usage.completion_tokens == 3
    running.settle()
    running.stop()
    reasons = [row["finish_reason"] for row in load_record(tmp_path / "run").requests]
    assert reasons.count("abort") == 6 and reasons.count("length") == 1


def test_a_client_that_leaves_before_its_turn_is_not_served(serving, tmp_path):
    running = serving(simulated(max_num_seqs=1), record=tmp_path / "run")
    first = ask(running, max_tokens=400, stream=True)
    first.recv(10)
    ask(running, max_tokens=900, stream=True).close()
    read_all(first)
    first.close()
    running.settle()
    running.stop()
    rows = load_record(tmp_path / "run").requests
    assert [(row["finish_reason"], row["output_tokens"]) for row in rows] == [("length", 400), ("abort", 0)]
