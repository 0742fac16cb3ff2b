"""The record of live traffic: in segments, each there whole or not at all, so that a kill costs what came last."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from twinserve.policies import Batch, Sequence
from twinserve.settings.errors import InputError
from twinserve.settings.files import refuse_existing, writing
from twinserve.traces.formats.recorded import SEGMENTS, segment_name
from twinserve.traces.runs.record import (
    RUNNING,
    Decided,
    RowMaker,
    Served,
    line_of,
    request_row,
    run_of,
    step_line,
    write_run,
)


class KeptTokens(Protocol):
    """What a record holds in place of a request's tokens, such as `ConcealedTokens`."""

    def __call__(self, token_ids: Seq[int], *, ends_by_token: bool) -> list[int]:
        """Numbers in place of a prompt and its answer; see `ConcealedTokens`."""


class SegmentedRecorder(RowMaker):
    """Listens to a Core that lives on and writes its run record: a folder that is there from the start, and grows.

    Rows go to a segment, a folder `segments/000000.partial`, which loses its suffix once it is whole: when it is large
    or old enough, and when the record is closed. It then holds the requests that have ended, their tokens, the steps,
    and what ran just then. So the segments that are whole are a record at any time, whatever becomes of the process.
    Nothing is held in memory but what is being served.

    Args:
        out: the folder to write.
        world: "sim" or "real"; a real run's record holds tokens too.
        settings, facts, device: as of a `RunRecorder`.
        tokens: what is kept of a request's tokens, prompt and answer.
        most_bytes: a segment is whole when it has so many.
        most_s: and so many seconds after its first row.
        clock: seconds.

    Attributes:
        counts: of the requests that have come in, and of those that have ended, by reason.

    Raises:
        InputError: `out` exists, or cannot be written.
    """

    def __init__(
        self,
        out: Path,
        *,
        world: Literal["sim", "real"],
        settings: dict[str, Any],
        facts: dict[str, Any],
        device: str | None,
        tokens: KeptTokens,
        most_bytes: int,
        most_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._out, self._world = out, world
        self._settings, self._facts, self._device, self._tokens = settings, facts, device, tokens
        self._most_bytes, self._most_s, self._clock = most_bytes, most_s, clock
        self._lock = threading.RLock()
        self._names = ("requests.jsonl", "outputs.jsonl") if world == "real" else ("requests.jsonl",)
        self._number, self._num_bytes, self._is_closed = 0, 0, False
        self._begun_s: float | None = None
        make_folder(out)
        self._write_run()
        self._begin()

    # --- what a CoreListener hears ---

    def built(self, rules: dict[str, str | None]) -> None:
        super().built(rules)
        self._write_run()

    def ingested(self, seq: Sequence, number: int) -> None:
        with self._lock:
            super().ingested(seq, number)

    def decided(self, batch: Batch) -> None:
        with self._lock:
            if self._is_due:  # all that has ended has been told, and written
                self._end()
                self._begin()
            super().decided(batch)

    def committed(self, batch: Batch) -> None:
        with self._lock:
            super().committed(batch)

    def finished(self, seq: Sequence) -> None:
        with self._lock:
            super().finished(seq)

    # --- the life of a segment ---

    def tick(self) -> None:
        """End a segment that is old enough, though nothing is served that would: from any thread, now and then."""
        with self._lock:
            if self._is_due and not self._served and not self._decided and not self._is_closed:
                self._end()
                self._begin()

    def close(self) -> Counter[str]:
        """End the last segment; the counts. What is still being served is written as far as it is known."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                if self._begun_s is not None or self._served or self._number == 0:
                    try:
                        self._end()
                    except InputError:
                        self._abandon()
                        raise
                else:
                    self._abandon()
        return self.counts

    def discard(self) -> None:
        """Remove a record that was not closed and has no segment yet; any other stays as it is."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._abandon()
            if self._number == 0:
                shutil.rmtree(self._out)

    @property
    def _is_due(self) -> bool:
        if self._begun_s is None:
            return False
        return self._num_bytes >= self._most_bytes or self._clock() - self._begun_s >= self._most_s

    def _begin(self) -> None:
        """Open the next segment."""
        self._folder = self._out / SEGMENTS / f"{segment_name(self._number)}.partial"
        with writing(self._out):
            self._folder.mkdir(parents=True)
            self._files = {name: self._open(name) for name in ("steps.jsonl", *self._names)}
        self._num_bytes, self._begun_s = 0, None

    def _open(self, name: str) -> IO[bytes]:
        return (self._folder / name).open("wb", buffering=1 << 16)

    def _end(self) -> None:
        """Make the segment whole."""
        with writing(self._out):
            self._files |= {RUNNING + name: self._open(RUNNING + name) for name in self._names}
            for served in self._served.values():
                self._write_request(served, RUNNING)
            for file in self._files.values():
                file.close()
            self._folder.rename(self._out / SEGMENTS / segment_name(self._number))
        self._number += 1

    def _abandon(self) -> None:
        """Remove the segment."""
        for file in self._files.values():
            # What is still in its buffer has no room on the disk, say; it is not needed.
            with suppress(OSError):
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- rows ---

    def _come(self, number: int, served: Served | None) -> None:
        self.counts["requests"] += served is not None

    def _stepped(self, decided: Decided) -> None:
        self._write("steps.jsonl", step_line(decided, decided.repeats))

    def _ended(self, served: Served) -> None:
        self.counts[str(served.seq.finish_reason)] += 1
        self._write_request(served)

    def _write_request(self, served: Served, prefix: str = "") -> None:
        seq = served.seq
        self._write(f"{prefix}requests.jsonl", line_of(request_row(served)))
        if self._world == "real":
            kept = self._tokens(seq.token_ids, ends_by_token=seq.finish_reason == "stop")
            prompt, tokens = kept[: seq.num_prompt_tokens], kept[seq.num_prompt_tokens :]
            outputs = {"id": seq.seq_id, "prompt": prompt, "tokens": tokens}
            self._write(f"{prefix}outputs.jsonl", line_of(outputs))

    def _write(self, name: str, line: bytes) -> None:
        if self._begun_s is None:
            self._begun_s = self._clock()
        self._num_bytes += len(line)
        try:
            self._files[name].write(line)
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", path=self._out) from error

    def _write_run(self) -> None:
        write_run(self._out, run_of(self._world, self._settings | self.rules, self._facts, self._device, None))


def make_folder(out: Path) -> None:
    """Create the folder of a record that grows in its place.

    Raises:
        InputError: it exists, or cannot be created.
    """
    refuse_existing(out)
    with writing(out):
        out.mkdir(parents=True)
