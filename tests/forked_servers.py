"""`twinserve serve` in a process forked from one that has imported what it needs; what it starts is started as ever.

So a test of what processes do beside one another takes that, and not the seconds that the first one's imports take.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TextIO

from forked_processes import forked


class Served:
    """The process of a command, as `subprocess.Popen` has it: in a session of its own, its stderr a pipe."""

    def __init__(self, words: list[str]) -> None:
        context, _ = forked()
        reads, writes = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(words, writes))
        self._process.start()
        writes.close()
        self.stderr: TextIO = os.fdopen(os.dup(reads.fileno()), encoding="utf-8")
        reads.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        """The status with which it ends; of one that is killed, the signal's number below 0."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _serve(words: list[str], said: Connection) -> None:
    """In the new process: be the command."""
    os.setsid()
    os.dup2(said.fileno(), 2)
    said.close()
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.argv = ["twinserve", "serve", *words]
    from twinserve.cli import main

    main()


@contextmanager
def serve_command(*arguments: object) -> Iterator[tuple[Served, str]]:
    """`twinserve serve`, once it serves, and its URL; it is killed if it still runs when the block is left."""
    process = Served(["--port", "0", *map(str, arguments)])
    try:
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("serving "):
                break
        found = re.search(r"listening at (\S+)", said)
        assert found is not None and "\nserving " in said, said
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
