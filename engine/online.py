"""The engine's loop around Core, and the thread that lets requests in while it runs."""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from twinserve.policies import Batch, Core, Runs, SamplingParams, Sequence
from twinserve.settings.errors import RunError
from twinserve.settings.garbage import rare_collections
from twinserve.traces.arrivals import Arrivals
from twinserve.traces.request import Request, TokenMaker

NOT_SAMPLED = -1
"""In place of a token that no distribution gives: a NaN or an infinity is the largest of its row's logits."""

NO_NUMBERS = "the model's logits for it are no finite numbers, so no token can be sampled"


class StepHandle(Protocol):
    """A launched step. `start_ns` and `end_ns` are readings of time.perf_counter_ns, valid after `result`."""

    start_ns: int
    end_ns: int

    def result(self) -> Runs | list[int]:
        """Wait for the step; a token for each of the batch's `sampled`, or a run of them."""


class TokenHandle(StepHandle, Protocol):
    """A launched step without drafts."""

    def result(self) -> list[int]:
        """Wait for the step; a token for each of the batch's `sampled`, or NOT_SAMPLED."""


class Executor(Protocol):
    """Runs batches in the order in which they are launched; `ModelRunner` is one."""

    def launch(self, batch: Batch) -> StepHandle:
        """Start a step; it may still run when this returns."""


class StepError(RunError):
    """A step failed, and with it the run; `__cause__` is what its executor raised.

    Args:
        batch: the step's decision.
        cause: what went wrong.
    """

    def __init__(self, batch: Batch, cause: Exception):
        requests = ", ".join(str(seq.seq_id) for seq in batch.seqs[:8]) + (", ..." if len(batch) > 8 else "")
        super().__init__(
            f"step {batch.decision} failed ({len(batch)} rows, {batch.num_tokens} tokens, {batch.num_prompt_tokens} of "
            f"them of prompts, {batch.num_used_blocks} blocks used; requests {requests}): "
            f"{type(cause).__name__}: {cause}"
        )


@contextmanager
def _failing_as_step(batch: Batch) -> Iterator[None]:
    """Raise what goes wrong inside as a StepError, without the tensors that the failed step still held."""
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise StepError(batch, error) from error


@dataclass(frozen=True)
class Abort:
    """Asks the engine to end a request."""

    seq_id: int


class Inbox:
    """What comes in from other threads: sequences, aborts, and the word that nothing more will come."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Sequence | Abort, ...]] = SimpleQueue()
        self._error: Exception | None = None
        self.closed = False

    def put(self, *items: Sequence | Abort) -> None:
        """Hand in sequences or aborts, which are taken together."""
        self._queue.put(items)

    def close(self) -> None:
        """Say that nothing more will come."""
        self._queue.put(())

    def fail(self, error: Exception) -> None:
        """Have whoever takes anything get an error instead, as nothing can be served any more."""
        self._error = error
        self._queue.put(())

    def take(self, *, wait: bool, timeout_s: float | None = None) -> list[Sequence | Abort]:
        """Everything handed in so far; with `wait`, at least one item unless the inbox is closed or time runs out.

        Raises what it was made to fail with.
        """
        items: list[Sequence | Abort] = []
        while True:
            if self._error is not None:
                raise self._error
            try:
                taken = self._queue.get(wait and not items and not self.closed, timeout_s)
            except Empty:
                return items
            items += taken
            self.closed |= not taken


class Clock:
    """Nanoseconds since it was made, by time.perf_counter_ns."""

    def __init__(self) -> None:
        self.origin_ns = time.perf_counter_ns()

    def __call__(self) -> int:
        return time.perf_counter_ns() - self.origin_ns


@rare_collections
def serve(core: Core, executor: Executor, inbox: Inbox, clock: Clock, ended: Callable[[Sequence], None]) -> None:
    """Serve what comes in until the inbox is closed and everything has ended.

    A sequence of which no token could be sampled is aborted; its `refusal` says why, and its last token is none of it.

    Args:
        core: decides; this loop only says what the time is and who executes.
        ended: called with each sequence that ends, aborted and refused ones included.

    Raises:
        StepError: a step could not be launched or failed. Nothing of `core` is of use then: it still holds what it
            decided.
    """
    launched: deque[tuple[Batch, StepHandle]] = deque()
    while True:
        for item in inbox.take(wait=core.is_idle):
            if isinstance(item, Abort):
                core.abort(item.seq_id, clock())
            elif not core.ingest(item, clock()):
                ended(item)
        if core.can_decide:
            batch = core.decide(clock())
            with _failing_as_step(batch):
                launched.append((batch, executor.launch(batch)))
            batch.launched_ns = clock()
            for seq in batch.aborted:
                ended(seq)
        if core.must_commit:
            batch, step = launched.popleft()
            with _failing_as_step(batch):
                output = step.result()
            batch.start_ns = step.start_ns - clock.origin_ns
            batch.end_ns = step.end_ns - clock.origin_ns
            if NOT_SAMPLED in ((output.token_ids or ()) if isinstance(output, Runs) else output):
                output = _ending_failed(core, batch, output, clock())
            for seq in core.commit(output, clock()):
                ended(seq)
        elif core.is_idle and inbox.closed:
            return


def _ending_failed(core: Core, batch: Batch, output: Runs | list[int], now_ns: int) -> Runs | list[int]:
    """What came of a batch, with a token that ends no text for each that was not sampled; the sequences of these are
    ended at the next decision, as if somebody had asked for it, which is a fact that a record keeps."""
    runs = output if isinstance(output, Runs) else Runs(output, [1] * len(output))
    known, last = list(runs.token_ids or ()), -1
    for place, seq in enumerate(batch.sampled):
        last += runs.lengths[place]
        if known[last] == NOT_SAMPLED:  # which ends a run
            ends = {core.eos_token_id, *seq.stop_token_ids}
            known[last] = next(token_id for token_id in itertools.count() if token_id not in ends)
            if not seq.is_finished:
                seq.refusal = NO_NUMBERS
                core.abort(seq.seq_id, now_ns)
    return runs._replace(token_ids=known) if isinstance(output, Runs) else known


class TraceFeeder(threading.Thread):
    """Lets the requests of a trace in at their arrival times, from a thread of its own.

    Args:
        announce: called with each request, its prompt as it really is, just before it is handed in.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        inbox: Inbox,
        clock: Clock,
        tokens: TokenMaker,
        params: SamplingParams,
        announce: Callable[[Request], None],
    ):
        super().__init__(name="trace-feeder", daemon=True)
        self._arrivals, self._inbox, self._clock = arrivals, inbox, clock
        self._tokens, self._params, self._announce = tokens, params, announce
        self._answers: dict[int, list[int]] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None

    def ended(self, seq: Sequence) -> None:
        """Tell the feeder that a sequence has ended; requests that wait for its answer can arrive."""
        with self._changed:
            self._answers[seq.seq_id] = seq.completion_token_ids
            self._arrivals.answered(seq.seq_id, seq.num_completion_tokens, seq.finish_ns or 0)
            self._changed.notify()

    def stop(self) -> None:
        """Let nothing more in."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def check(self) -> None:
        """Raise what went wrong in the thread, if anything did."""
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        try:
            while (coming := self._next()) is not None:
                request, seq = coming
                self._announce(request)
                self._inbox.put(seq)
        except BaseException as error:
            self._error = error
        finally:
            self._inbox.close()

    def _next(self) -> tuple[Request, Sequence] | None:
        """Wait for the next arrival, its prompt made before it is due; None when there will be none."""
        made: tuple[Request, Sequence] | None = None
        while True:
            with self._changed:
                if self._stopped or self._arrivals.is_empty:
                    return None
                request = self._arrivals.peek()
                if request is None:
                    self._changed.wait()
                    continue
                if made is not None and made[0] is request:
                    wait_s = (request.arrival_ns - self._clock()) / 1e9
                    if wait_s <= 0:
                        self._arrivals.pop()
                        return made
                    self._changed.wait(wait_s)
                    continue
            token_ids = self._tokens.token_ids(request, self._answers)
            made = request, request.to_sequence(self._params, token_ids)
