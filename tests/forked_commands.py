"""Commands in processes of their own that are forked from one which has imported what they need.

A command so takes what it does, and not the second that its imports take. The process that is forked from has one
thread and works off what is asked of it one by one; it ends with the tests.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from garbage import leave_imports_alone


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def run_forked(words: list[str], folder: Path, limit: int | None) -> subprocess.CompletedProcess[str]:
    """Run a command with temporary files and caches in `folder`, and no file longer than `limit` bytes."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps({"words": words, "folder": str(folder), "limit": limit}) + "\n")
    server.stdin.flush()
    ended: dict[str, Any] = json.loads(server.stdout.readline())
    return subprocess.CompletedProcess(words, ended["status"], "", ended["err"])


def _serve() -> None:
    """Work off what comes, a line each, until there is no more."""
    sys.path[:0] = [str(Path(__file__).parent / "fuzz")]
    from outcome import run

    import twinserve.commands.app
    import twinserve.planning.deployments
    import twinserve.planning.tune
    import twinserve.planning.upgrade
    import twinserve.reports.page
    import twinserve.sim.replica  # noqa: F401

    leave_imports_alone()
    for line in sys.stdin:
        asked = json.loads(line)
        folder = Path(asked["folder"])

        def prepare(asked: dict[str, Any] = asked, folder: Path = folder) -> None:
            os.environ.update(TMPDIR=str(folder / "tmp"), XDG_CACHE_HOME=str(folder / "cache"))
            tempfile.tempdir = None
            if asked["limit"] is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (asked["limit"], asked["limit"]))

        outcome = run(asked["words"], folder, prepare)
        print(json.dumps({"status": outcome.status, "err": outcome.err}), flush=True)


if __name__ == "__main__":
    _serve()
