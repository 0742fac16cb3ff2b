"""What scripts say to `--help`, each in a process forked from one that has imported torch and the like.

A script so takes what it does, and not the seconds that those imports take; what is ours each imports itself.
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


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


@cache
def help_of(script: Path) -> subprocess.CompletedProcess[str]:
    """How `python SCRIPT --help` ends, and what it says."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{script}\n")
    server.stdin.flush()
    return subprocess.CompletedProcess([script, "--help"], *json.loads(server.stdout.readline()))


def _run(script: str) -> tuple[int, str, str]:
    """The status, stdout and stderr of a script."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            status = 1
            try:
                for file, number in ((out, 1), (err, 2)):
                    os.dup2(file.fileno(), number)
                sys.argv, sys.path[0] = [script, "--help"], str(Path(script).parent)
                runpy.run_path(script, run_name="__main__")
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
    for name in ("plotly.graph_objects", "pydantic", "scipy.optimize", "torch", "transformers"):
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_run(line.rstrip("\n"))), flush=True)


if __name__ == "__main__":
    _serve()
