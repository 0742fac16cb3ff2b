"""A Core that lives on: requests and aborts come in from any thread, and who follows a request hears of its tokens."""

from __future__ import annotations

import atexit
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from functools import partial

from twinserve.engine.online import Abort, Clock, Executor, Inbox, StepHandle, serve
from twinserve.policies import Batch, Core, CoreListener, Sequence
from twinserve.policies.core import Growth, Span
from twinserve.settings.build_core import HearsRules
from twinserve.settings.errors import RunError

BuildCore = Callable[[CoreListener], Core]

EXIT_LIMIT_S = 5.0
"""How long the interpreter waits at its end for a loop that nobody has closed."""

Follower = Callable[[list[Sequence]], None]
"""Called in the loop's thread with sequences that may have got a token, or have ended; it reads which from them."""


class Following(CoreListener):
    """Tells those who follow sequences, and passes on to other listeners what Core says.

    A follower is told after every listener, so that what it reads is in the metrics and in the record.
    """

    def __init__(self, listeners: Seq[CoreListener] = ()):
        self.followers: dict[Sequence, Follower] = {}
        self._listeners = listeners

    def built(self, rules: dict[str, str | None]) -> None:
        for listener in self._listeners:
            if isinstance(listener, HearsRules):
                listener.built(rules)

    def ingested(self, seq: Sequence, number: int) -> None:
        for listener in self._listeners:
            listener.ingested(seq, number)

    def decided(self, batch: Batch) -> None:
        for listener in self._listeners:
            listener.decided(batch)

    def repeated(self, batch: Batch, spans: Seq[Span], grown: Growth, num_committed: int, latest: Batch) -> None:
        for listener in self._listeners:
            listener.repeated(batch, spans, grown, num_committed, latest)

    def committed(self, batch: Batch) -> None:
        for listener in self._listeners:
            listener.committed(batch)
        self.tell(batch.sampled)

    def finished(self, seq: Sequence) -> None:
        for listener in self._listeners:
            listener.finished(seq)
        self.tell([seq])
        self.followers.pop(seq, None)

    def tell(self, seqs: Iterable[Sequence]) -> None:
        """Tell each follower of these sequences, once."""
        told: dict[Follower, list[Sequence]] = {}
        for seq in seqs:
            if (follower := self.followers.get(seq)) is not None:
                told.setdefault(follower, []).append(seq)
        for follower, own in told.items():
            follower(own)


class Live(ABC):
    """One Core, or those of several replicas, and the one thread that walks them for as long as it is open.

    Args:
        build_cores: each called with the listener.
        listeners: hear what Core says, in the loop's thread; a metrics page, a run record.

    Attributes:
        cores: written by the loop's thread alone; others may read their counts.
        error: what ended the loop before it was closed; then nothing is served any more.
    """

    clock: Callable[[], int]

    def __init__(self, build_cores: Seq[BuildCore], listeners: Seq[CoreListener] = ()):
        self._following = Following(listeners)
        self.cores = [build_core(self._following) for build_core in build_cores]
        self.inbox = Inbox()
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="core", daemon=True)

    @property
    def is_idle(self) -> bool:
        """Is nothing being served?"""
        return all(core.is_idle for core in self.cores)

    def start(self) -> None:
        """Start the loop, behind which the interpreter ends: a thread that is ended in torch's code would abort it."""
        self._thread.start()
        self._at_exit = partial(_end, weakref.ref(self))
        atexit.register(self._at_exit)

    @abstractmethod
    def walk(self) -> None:
        """Serve what comes in until the inbox is closed and everything has ended."""

    def submit(self, make: Callable[[int], Seq[Sequence]], follower: Follower | None = None) -> None:
        """Let sequences in, all of them before the next decision.

        Args:
            make: makes them, told when they arrive; whatever is made by a later call arrives no earlier.
            follower: told of them; None where a listener hears all that is needed.

        Raises:
            RunError: it is closed, or has failed.
        """
        with self._lock:
            if self._is_closed:
                raise RunError(f"nothing more is served: {self.error or 'the engine is closed'}") from self.error
            seqs = make(self.clock())
            if follower is not None:
                self._following.followers.update(dict.fromkeys(seqs, follower))
            self.inbox.put(*seqs)

    def abort(self, seqs: Iterable[Sequence]) -> None:
        """End sequences at the next decision, their blocks free; those that have ended by then are left alone."""
        if aborts := [Abort(seq.seq_id) for seq in seqs if not seq.is_finished]:
            self.inbox.put(*aborts)

    def begin(self, seqs: Seq[Sequence], follower: Follower | None = None) -> Callable[[], None]:
        """Let sequences in; what it gives waits until each has ended, and aborts them if that is interrupted.

        Args:
            follower: told of them as they go.

        Raises:
            RunError: it is closed; or, while one waits, what ended the loop.
        """
        ended, left = threading.Event(), set(seqs)

        def make(now_ns: int) -> Seq[Sequence]:
            for seq in seqs:
                seq.arrival_ns = now_ns
            return seqs

        def told(some: list[Sequence]) -> None:
            left.difference_update([seq for seq in some if seq.is_finished])
            if follower is not None:
                follower(some)
            if not left or self.error is not None:
                ended.set()

        def wait() -> None:
            try:
                ended.wait()
            except BaseException:
                self.abort(seqs)
                raise
            if left and self.error is not None:
                raise self.error

        if seqs:
            self.submit(make, told)
        else:
            ended.set()
        return wait

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until it has been closed, or has failed, for so long at most; has it?"""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Let nothing more in, and wait until everything has ended.

        Raises:
            AssertionError: an invariant of the policies does not hold at the end.
        """
        self.no_more()
        self._thread.join()
        atexit.unregister(self._at_exit)
        if isinstance(self.error, AssertionError):
            raise self.error

    def no_more(self) -> None:
        """Let nothing more in."""
        with self._lock:
            self._is_closed = True
            self.inbox.close()

    def _run(self) -> None:
        try:
            self.walk()
            for core in self.cores:
                core.scheduler.check_integrity()
        except BaseException as error:
            with self._lock:
                self.error, self._is_closed = error, True
            self._following.tell(list(self._following.followers))
            self._following.followers.clear()


def _end(ref: weakref.ref[Live]) -> None:
    """End a loop that nobody has closed, and wait for what runs in it, for so long at most."""
    if (live := ref()) is not None:
        live.no_more()
        live.join(EXIT_LIMIT_S)


class AsyncLLM(Live):
    """The Core of a model that serves for as long as it is open: one pool, one prefix cache, one record.

    Args:
        runner: runs the steps; nobody else may launch any while this is open.

    Attributes:
        core: the one of `cores`.
        num_launched: steps launched.
    """

    clock: Clock

    def __init__(self, build_core: BuildCore, runner: Executor, listeners: Seq[CoreListener] = ()):
        super().__init__([build_core], listeners)
        (self.core,) = self.cores
        self.clock = Clock()
        self.num_launched = 0
        self._runner = runner

    def walk(self) -> None:
        serve(self.core, self, self.inbox, self.clock, lambda seq: None)

    def launch(self, batch: Batch) -> StepHandle:
        """Start a step, and count it."""
        self.num_launched += 1
        return self._runner.launch(batch)
