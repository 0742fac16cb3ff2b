"""A whole run: the requests of a trace as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from twinserve.engine.logprobs import Heard
from twinserve.engine.online import Clock, Executor, Inbox, TraceFeeder, serve
from twinserve.policies import Core, SamplingParams, Sequence
from twinserve.traces.arrivals import Arrivals
from twinserve.traces.request import Request, TokenMaker
from twinserve.traces.runs.record import RunRecorder


class Runner(Executor, Protocol):
    """What runs the steps of a model: a `ModelRunner` or a `GraphRunner`.

    Attributes:
        logprobs: what steps have given of those asked for, until whoever serves a sequence takes it out.
        prompt_asks: see `ModelRunner`.
    """

    logprobs: Heard
    prompt_asks: dict[Sequence, int]


def serve_trace(
    core: Core,
    runner: Runner,
    requests: Iterable[Request],
    *,
    token_maker: TokenMaker,
    params: SamplingParams,
    recorder: RunRecorder | None = None,
    time_scale: float = 1.0,
    progress: Callable[[Sequence], None] | None = None,
    on_start: Callable[[Inbox, Clock], None] | None = None,
) -> list[Sequence]:
    """Serve the requests of a trace as they arrive, in real time; arguments, result and errors as of `LLM.run_trace`.

    Args:
        core: decides; the recorder is its listener.
        token_maker: makes the prompts.
    """
    scaled = [request._replace(arrival_ns=round(request.arrival_ns * time_scale)) for request in requests]
    inbox, clock = Inbox(), Clock()

    def announce(request: Request) -> None:
        if recorder is not None:
            recorder.expect(request, params)

    feeder = TraceFeeder(Arrivals(scaled), inbox, clock, token_maker, params, announce)
    served: list[Sequence] = []

    def ended(seq: Sequence) -> None:
        served.append(seq)
        feeder.ended(seq)
        if progress is not None:
            progress(seq)
        runner.logprobs.pop(seq, None)

    if on_start is not None:
        on_start(inbox, clock)
    feeder.start()
    try:
        serve(core, runner, inbox, clock, ended)
        core.scheduler.check_integrity()
    finally:
        feeder.stop()
        feeder.join()
        runner.logprobs.clear()
    feeder.check()
    return served
