"""Scripts, each in a process forked from one that has imported torch, the like of it, and most of what is ours.

A script so takes what it does, and not the seconds that those imports take.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

from garbage import leave_imports_alone

IMPORTED = (
    *("httpx", "plotly.graph_objects", "scipy.optimize", "torch", "transformers.models.llama"),
    *(f"twinserve.{name}" for name in ("commands.app", "engine.llm", "engine.profile", "reports.page", "serving.run")),
    *(f"twinserve.planning.{name}" for name in ("deployments", "tune", "upgrade")),
)


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


@cache
def help_of(script: Path) -> subprocess.CompletedProcess[str]:
    """How `python SCRIPT --help` ends, and what it says."""
    return run_script(script, "--help")


def run_script(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """How `python SCRIPT ARGUMENTS` ends, and what it says."""
    server, words = _server(), [str(script), *arguments]
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(words) + "\n")
    server.stdin.flush()
    return subprocess.CompletedProcess(words, *json.loads(server.stdout.readline()))


def _run(words: list[str]) -> tuple[int, str, str]:
    """The status, stdout and stderr of a script."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            status = 1
            try:
                for file, number in ((out, 1), (err, 2)):
                    os.dup2(file.fileno(), number)
                sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
                runpy.run_path(words[0], run_name="__main__")
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err):
            file.seek(0)
        return status, out.read(), err.read()


def _serve() -> None:
    """Work off what comes, a line each, until there is no more."""
    for name in IMPORTED:
        importlib.import_module(name)
    leave_imports_alone()
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
