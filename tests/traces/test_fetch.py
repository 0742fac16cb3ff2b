"""A public trace is in the cache whole and checked, or it is not there; tried on a server of this machine."""

from __future__ import annotations

import hashlib
import socket
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from twinserve.settings.errors import InputError
from twinserve.traces import fetch as module
from twinserve.traces.fetch import PUBLIC_TRACES, PublicTrace, fetch

CONTENT = b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n" + b"2023-11-16 18:15:46.6805900,374,44\r\n" * 50


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path / "cache" / "twinserve" / "traces"


@pytest.fixture
def serve():
    """Start a server; its URL comes back, and with it the list of the paths that were asked for."""
    servers = []

    def serve(handler) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(handler.func if isinstance(handler, partial) else handler):
            def do_GET(self):
                asked.append(self.path)
                super().do_GET()

            def log_message(self, *_):
                pass

        made = partial(Handler, **handler.keywords) if isinstance(handler, partial) else Handler
        server = ThreadingHTTPServer(("127.0.0.1", 0), made)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def mirror(serve, tmp_path):
    """A folder with the file, served, and a known trace of that content."""
    (tmp_path / "mirror" / "traces").mkdir(parents=True)
    (tmp_path / "mirror" / "traces" / "conv.csv").write_bytes(CONTENT)
    return serve(partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "mirror")))


@pytest.fixture(autouse=True)
def known(monkeypatch):
    trace = PublicTrace("http://127.0.0.1:9/published", "conv.csv", hashlib.sha256(CONTENT).hexdigest(), "its makers")
    monkeypatch.setitem(module.PUBLIC_TRACES, "conv", trace)


def test_a_trace_is_fetched_once(mirror, cache):
    url, asked = mirror
    assert fetch("conv", f"{url}/traces") == cache / "conv.csv"
    assert fetch("conv", f"{url}/traces/").read_bytes() == CONTENT
    assert asked == ["/traces/conv.csv"]
    assert [path.name for path in cache.iterdir()] == ["conv.csv"]


def test_it_comes_from_where_it_was_published_unless_a_mirror_is_named(mirror, monkeypatch):
    url, asked = mirror
    published = PublicTrace(f"{url}/traces", "conv.csv", hashlib.sha256(CONTENT).hexdigest(), "its makers")
    monkeypatch.setitem(module.PUBLIC_TRACES, "conv", published)
    assert fetch("conv").read_bytes() == CONTENT
    assert asked == ["/traces/conv.csv"]


def test_a_damaged_file_in_the_cache_is_fetched_again(mirror, cache):
    cache.mkdir(parents=True)
    (cache / "conv.csv").write_bytes(CONTENT[:-1])
    assert fetch("conv", f"{mirror[0]}/traces").read_bytes() == CONTENT


def test_another_content_is_refused_and_what_was_there_stays(mirror, cache, tmp_path):
    cache.mkdir(parents=True)
    (cache / "conv.csv").write_bytes(b"mine")
    (tmp_path / "mirror" / "traces" / "conv.csv").write_bytes(CONTENT + b"more")
    with pytest.raises(
        InputError, match=r"/traces/conv.csv: expected sha256 [0-9a-f]{64}, the 1845 bytes have [0-9a-f]{64}"
    ):
        fetch("conv", f"{mirror[0]}/traces")
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == {"conv.csv": b"mine"}


def test_a_server_without_the_file_is_named(mirror, cache):
    with pytest.raises(InputError, match="url is '.*/elsewhere/conv.csv', the server answers 404 File not found"):
        fetch("conv", f"{mirror[0]}/elsewhere")
    assert not cache.exists()


class Cut(BaseHTTPRequestHandler):
    """Promises more than it sends."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:100])


def test_a_connection_that_breaks_leaves_nothing(serve, cache):
    url, _ = serve(Cut)
    with pytest.raises(InputError, match="cannot be reached, is there a network"):
        fetch("conv", url)
    assert not cache.exists()


def test_no_network_is_said_in_one_line(cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(InputError) as error:
            fetch("conv", url)
    assert f"{url}/conv.csv: cannot be reached, is there a network?" in str(error.value)
    assert "\n" not in str(error.value)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_named(mirror, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(InputError, match="conv.csv: cannot be written"):
        fetch("conv", f"{mirror[0]}/traces")


@pytest.mark.parametrize(
    ("name", "mirror", "message"),
    [
        ("burstgpt", None, "name is 'burstgpt', expected one of mooncake-conversation, azure-2023-conv"),
        ("conv", "file:///etc", "mirror is 'file:///etc', expected a URL that begins with http:// or https://"),
    ],
)
def test_what_cannot_be_fetched_is_refused(name, mirror, message):
    with pytest.raises(InputError, match=message):
        fetch(name, mirror)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("azure-2023-conv", "azure/AzureLLMInferenceTrace_conv.csv"),
        ("mooncake-conversation", "mooncake/conversation_trace.jsonl.gz"),
    ],
)
def test_the_sha256_of_the_known_traces_is_theirs(public_traces, name, path):
    from twinserve.traces.readers import read_trace

    assert read_trace(public_traces / path).sha256 == PUBLIC_TRACES[name].sha256
