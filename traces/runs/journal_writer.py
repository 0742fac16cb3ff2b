"""Writing a journal: what a scheduler notes in passing becomes lines in a thread of its own.

A note is a tuple of values that nobody changes any more, so that a step pays for making it and for nothing else:

| note | of |
| --- | --- |
| `("q", name, at, prompt_tokens, max_tokens, priority, hashes)` | a request, with the hashes of its whole blocks |
| `("s", key, begun, ended, changes, preempted, counts)` | a decision |
| `("l", key, at)` | a step that has been launched, unless that was when it had been decided |
| `("u", key, begun, ended, num_outputs, left)` | an output that was taken, and who ended with it |
| `("a", at, left)` | requests that were taken out |

Times are readings of `perf_counter_ns`. `key` is a number that a step has to itself until its output has been taken.
`changes` is None where who is scheduled, in which order, with how many tokens, is as in the step before; otherwise the
tokens by name, in order, then names and computed tokens of those that have run before, in two lists, and of those that
have not, in pairs. `counts`: waiting, running, free blocks, tokens of the step. `left`: name, reason, hashes of each.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import orjson

from twinserve.settings.errors import InputError
from twinserve.traces.runs.vllm_journal import FORMAT, JOURNAL

_MOST_BLOCKS = 1_000_000
_FLUSH_S = 1.0
_PIECE, _REST_S = 32, 0.001
"""After so many notes the interpreter is left for so long to whoever waits for it."""

_Changes = tuple[dict[str, int], list[str], list[int], Iterable[tuple[str, int]]]
_Left = tuple[str, Any, list[Any]]


class JournalWriter:
    """Lines of a run in a folder, in the order of the notes; times in whole microseconds since it was opened.

    They are handed to the system once a second, so a kill costs the last one. Of a prompt it keeps the length, and with
    which earlier request it begins alike, by the hashes of whole blocks; no text and no token.

    Args:
        folder: must not exist.
        hashed_tokens: of a block that has a hash.
        most_steps: so many are written, then nothing more.

    Attributes:
        note: takes a note; for one thread.
        is_open: is what is noted written? No longer once it is full, closed, or cannot be written.

    Raises:
        InputError: the folder exists, or cannot be made.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], hashed_tokens: int, most_steps: int):
        self._path, self._hashed_tokens, self._most_steps = folder / JOURNAL, hashed_tokens, most_steps
        self._notes: deque[tuple] = deque()
        self.note = self._notes.append
        self._numbers: dict[str, int] = {}
        self._num_requests, self._num_steps = count(), count()
        self._rows: dict[str, int] = {}  # who was in the step before, and which numbers they had
        self._chunks: list[list[int]] = []  # and who had how many tokens, where it was not one
        self._in_flight: dict[int, list[int]] = {}  # steps by key: number, and when launched
        self._owners: OrderedDict[Any, int] = OrderedDict()  # of the hashes of blocks, who had one first
        self._makers: dict[str, Callable[..., list[Any] | None]] = {
            "q": self._queued,
            "s": self._decided,
            "l": self._launched,
            "u": self._known,
            "a": self._aborted,
        }
        self.is_open = True
        self._begin = perf_counter_ns()
        try:
            folder.mkdir(parents=True)
            self._file = self._path.open("wb")
            self._write([["format", FORMAT, settings, time.time()]])
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", path=folder) from error
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what has been noted, and no more."""
        self._closing.set()
        if threading.current_thread() is not self._thread:  # where a scheduler was found to be garbage
            self._thread.join()

    def _run(self) -> None:
        try:
            with self._file:
                while self.is_open and not self._closing.wait(_FLUSH_S):
                    self._drain(_REST_S)
                self._drain(0.0)
        except OSError as error:
            message = "%s: cannot be written, so nothing more is recorded: %s"
            logging.getLogger(__name__).error(message, self._path, error.strerror)
        finally:
            self.is_open = False
            self._notes.clear()

    def _drain(self, rest_s: float) -> None:
        """Write what has been noted, in pieces between which others compute, and hand it to the system."""
        left = len(self._notes)
        while left and self.is_open:
            piece = [self._notes.popleft() for _ in range(min(_PIECE, left))]
            left -= len(piece)
            self._write([line for kind, *values in piece if (line := self._makers[kind](*values)) is not None])
            time.sleep(rest_s)
        self._file.flush()

    def _write(self, lines: list[list[Any]]) -> None:
        self._file.write(b"".join([orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines]))

    def _at(self, when_ns: int) -> int:
        return (when_ns - self._begin) // 1000

    def _queued(self, name: str, at_ns: int, prompt: int, most: int, priority: int, hashes: list[Any]) -> list[Any]:
        number = self._numbers[name] = next(self._num_requests)
        like = self._alike(hashes)
        self._own(hashes, number)
        return ["q", number, self._at(at_ns), prompt, most, priority, like]

    def _decided(
        self,
        key: int,
        begun_ns: int,
        ended_ns: int,
        changes: _Changes | None,
        preempted: Iterable[str],
        counts: Iterable[int],
    ) -> list[Any] | None:
        step = next(self._num_steps)
        if step == self._most_steps:
            self.is_open = False
            return None
        self._in_flight[key] = [step, ended_ns]
        lists = self._changed(*changes) if changes else ([], [], self._chunks)
        names = [self._numbers[name] for name in preempted]
        return ["s", step, self._at(begun_ns), self._at(ended_ns), *lists, names, *counts]

    def _launched(self, key: int, at_ns: int) -> None:
        if key in self._in_flight:
            self._in_flight[key][1] = at_ns

    def _known(
        self, key: int, begun_ns: int, ended_ns: int, num_outputs: int, left: Iterable[_Left]
    ) -> list[Any] | None:
        if key not in self._in_flight:
            return None  # decided after the last step that is written
        step, launched_ns = self._in_flight.pop(key)
        ended = [[self._end(name, hashes), str(reason)] for name, reason, hashes in left]
        return ["u", step, self._at(launched_ns), self._at(begun_ns), self._at(ended_ns), num_outputs, ended]

    def _aborted(self, at_ns: int, left: Iterable[_Left]) -> list[Any]:
        return ["a", self._at(at_ns), sorted(self._end(name, hashes) for name, _, hashes in left)]

    def _end(self, name: str, hashes: list[Any]) -> int:
        """The number of a request that has ended; its name may come again."""
        number = self._numbers.pop(name)
        self._own(hashes, number)
        return number

    def _changed(
        self, scheduled: dict[str, int], names: list[str], computed: list[int], admitted: Iterable[tuple[str, int]]
    ) -> tuple[list[int], list[list[int]], list[list[int]]]:
        """Who of the step before is gone, who is appended with how many tokens from where, and who goes on otherwise
        than with one token."""
        rows, numbers, order = self._rows, self._numbers, list(scheduled)
        kept = [name for name in rows if name in scheduled]
        place = len(kept)
        if order[:place] != kept:
            place = next(at for at, name in enumerate(kept) if order[at] != name)
        goes_on = set(kept[:place])
        gone = [number for name, number in rows.items() if name not in goes_on]
        begin = dict(admitted)
        if len(begin) < len(order) - place:
            begin |= zip(names, computed, strict=True)
        new = [[numbers[name], scheduled[name], begin[name]] for name in order[place:]]
        self._rows = {name: numbers[name] for name in order}
        self._chunks = [[numbers[name], tokens] for name, tokens in scheduled.items() if tokens != 1]
        going_on = [[numbers[name], scheduled[name]] for name in order[:place] if scheduled[name] != 1]
        return gone, new, going_on

    def _alike(self, hashes: list[Any]) -> tuple[int, int] | None:
        """The earlier request with which this one begins alike, and for how many tokens."""
        found = None
        for number, block_hash in enumerate(hashes, 1):
            owner = self._owners.get(block_hash)
            if owner is None:
                break
            found = owner, number * self._hashed_tokens
        return found

    def _own(self, hashes: list[Any], number: int) -> None:
        """Remember whose the blocks of a request are, unless they had an owner."""
        owners = self._owners
        for block_hash in hashes:
            owners.setdefault(block_hash, number)
        while len(owners) > _MOST_BLOCKS:
            owners.popitem(last=False)
