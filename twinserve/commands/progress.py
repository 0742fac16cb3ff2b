"""Progress of long work, on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from twinserve.policies import Batch, CoreListener, Sequence
from twinserve.settings.errors import printable

SECONDS_BETWEEN_STATES = 0.5


def say(text: str) -> None:
    """Say on stderr what is going on, or what should be known beside a result."""
    # Without a stderr, print() would say it among the results.
    if sys.stderr is not None:
        print(printable(text), file=sys.stderr, flush=True)


class Bar:
    """A progress bar on stderr, counting requests that have ended; where stderr is no terminal, a line now and then.

    Args:
        label: what is going on.
        total: units of work; None where nobody knows.
        seconds_between_lines: how often a line comes where there is no terminal.
        num_blocks: of the pool of a run whose steps are shown too, see `stepped`.
    """

    def __init__(
        self, label: str, total: int | None, *, seconds_between_lines: float = 10.0, num_blocks: int | None = None
    ):
        self._label, self._total, self._done = label, total, 0
        self._between, self._last = seconds_between_lines, time.monotonic()
        self._num_blocks, self._tokens, self._shown = num_blocks, 0, self._last
        self._bar = None
        if sys.stderr is not None and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            text, bar = progress.TextColumn, progress.BarColumn()
            known: tuple[progress.ProgressColumn, ...] = progress.MofNCompleteColumn(), progress.TimeRemainingColumn()
            if total is None:
                known = text("{task.completed:,} done"), progress.TimeElapsedColumn()
            columns = text("{task.description}"), bar, *known, text("{task.fields[state]}")
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
            self._task = self._bar.add_task(label, total=total, state="")

    def ended(self, _: Sequence) -> None:
        """A sequence has ended."""
        self.advance()

    def advance(self, units: int = 1) -> None:
        """So many units of work are done."""
        self._done += units
        if self._bar is not None:
            self._bar.advance(self._task, units)
        elif (now := time.monotonic()) - self._last >= self._between:
            self._last = now
            of_all = "" if self._total is None else f" of {self._total}"
            say(f"{self._label}: {self._done}{of_all}")

    def stepped(self, batch: Batch) -> None:
        """A step has ended: on a terminal, show now and then what runs and waits, KV use, and tokens a second."""
        if self._bar is None:
            return
        self._tokens += batch.num_sampled
        seconds = (now := time.monotonic()) - self._shown
        if seconds < SECONDS_BETWEEN_STATES:
            return
        kv = "" if self._num_blocks is None else f"KV {batch.num_used_blocks / self._num_blocks:.0%}, "
        rate = self._tokens / seconds
        state = f"{batch.num_running} running, {batch.num_waiting} waiting, {kv}{rate:,.0f} tokens/s"
        self._bar.update(self._task, state=state)
        self._tokens, self._shown = 0, now

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class Decisions(CoreListener):
    """Moves a bar on as a run is decided again."""

    _TOGETHER = 100

    def __init__(self, bar: Bar):
        self._bar, self._left = bar, self._TOGETHER

    def decided(self, batch: Batch) -> None:
        self._left -= 1
        if not self._left:
            self._bar.advance(self._TOGETHER)
            self._left = self._TOGETHER
