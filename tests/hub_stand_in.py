"""A stand-in for the model hub: as much of its HTTP interface as a download needs, on the loopback alone."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

REVISION = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """Serves folders as models until the `with` block ends.

    Attributes:
        models: the folder of each model id.
        gated: ids whose files are refused, as a hub does to who has not accepted the terms.
        broken: answer everything with status 500.
        asked: the method and path of every request.
    """

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.broken = False
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def brought(self) -> set[str]:
        """Names of the files whose content was asked for."""
        paths = (line.removeprefix("GET ") for line in self.asked if line.startswith("GET ") and "/resolve/" in line)
        return {path.split(f"/resolve/{REVISION}/")[1] for path in paths}

    def __enter__(self) -> HubStandIn:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def closed_port() -> int:
    """A port of the loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Handler(BaseHTTPRequestHandler):
    """Answers for a HubStandIn."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: HubStandIn = self.server.hub  # type: ignore[attr-defined]
        path = self.path.split("?")[0]
        hub.asked.append(f"{self.command} {path}")
        owner, name, kind, *rest = path.removeprefix("/").removeprefix("api/models/").split("/")
        repo_id = f"{owner}/{name}"
        if hub.broken:
            self._answer(500, b"out of order")
        elif repo_id not in hub.models:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif kind == "revision":
            self._answer(200, json.dumps(self._info(repo_id, hub.models[repo_id])).encode())
        elif kind == "tree":
            self._answer(200, json.dumps(_files(hub.models[repo_id])).encode())
        elif repo_id in hub.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            content = hub.models[repo_id].joinpath(*rest[1:]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION})

    def _info(self, repo_id: str, folder: Path) -> dict[str, object]:
        siblings = [{"rfilename": file["path"]} for file in _files(folder)]
        return {"id": repo_id, "modelId": repo_id, "sha": REVISION, "siblings": siblings}

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _files(folder: Path) -> list[dict[str, object]]:
    """The files of a model as the hub lists them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in paths
    ]
