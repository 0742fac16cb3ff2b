"""A command in a process that is forked from this one, and how it ended."""

from __future__ import annotations

import io
import os
import resource
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES = 10, 1024
"""Of a processor, and of memory, that a command may take."""
MOST_S, ADDRESSES = 600.0, 64 << 30
"""Seconds on the wall after which it is killed, and bytes of addresses it may have; torch takes many that it leaves."""
SERVED_S = 4.0
"""A server that takes what it is given is told to end after so many seconds."""
Work = list[str] | Callable[[], int | None]
"""A command's arguments, or what else is to be done."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    err: str
    megabytes: int
    is_late: bool

    def fault(self) -> str | None:
        """What should not have been, in words."""
        if self.is_late:
            return f"took more than {SECONDS} s"
        if self.megabytes > MEGABYTES:
            return f"took {self.megabytes} MB"
        lines = self.err.splitlines()
        said = [line for line in lines if line.startswith("twinserve: ")]
        if "Traceback" in self.err or "Exception ignored" in self.err:
            return "a traceback"
        if self.status == 2 and (len(said) != 1 or lines[-1] != said[0]):
            return "not one line"
        return None if self.status in (0, 2, 3) or (self.status == 1 and not said) else f"status {self.status}"


def run(work: Work, folder: Path, prepare: Callable[[], object] | None = None) -> Outcome:
    """Do something in `folder`, where relative paths lie, in a process that is forked from this one.

    Args:
        prepare: what that process does first.
    """
    reads, err = os.pipe()  # no file, whose length may be limited
    os.set_blocking(reads, False)
    child = os.fork()
    if not child:
        try:
            _do(work, folder, err, prepare)
        finally:  # whatever comes on the way, what is to be cleaned up is the parent's
            os._exit(99)
    os.close(err)
    said, end = b"", time.monotonic() + MOST_S
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
        said += _written(reads)
    _, status, usage = ended
    with suppress(ProcessLookupError):  # processes that it has left
        os.killpg(child, signal.SIGKILL)
    text = (said + _written(reads)).decode("utf-8", "replace")
    os.close(reads)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, text, usage.ru_maxrss >> 10, code == -signal.SIGKILL)


def _written(reads: int) -> bytes:
    """What has been written to a pipe by now."""
    said = b""
    with suppress(BlockingIOError):
        while more := os.read(reads, 1 << 16):
            said += more
    return said


def keep(path: Path, result: dict[str, Any]) -> None:
    """Write what was found to a file of results, beside the commit, the command and the machine."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from environment import commit, machine
    from result_files import write_json

    words = ["python", f"tests/fuzz/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    write_json(path, {"machine": machine(), "commit": commit(), "command": shlex.join(words)} | result)


def _do(work: Work, folder: Path, err: int, prepare: Callable[[], object] | None) -> None:
    """In the child: do it, and end."""
    code = 99
    try:
        os.setsid()
        os.chdir(folder)
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (null, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", errors="backslashreplace",
                                      write_through=True)  # fmt: skip
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        if prepare is not None:
            prepare()
        code = _command(work) if isinstance(work, list) else work() or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _command(arguments: list[str]) -> int:
    """Run a command; its exit status."""
    from twinserve.cli import main

    sys.argv = ["twinserve", *arguments]
    if arguments[0] == "serve":
        timer = threading.Timer(SERVED_S, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
        return 0 if arguments[0] == "serve" and code == 128 + signal.SIGTERM else code
    return 0
