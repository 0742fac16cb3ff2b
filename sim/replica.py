"""A simulated replica: one simpy process around Core, and the arrivals that feed it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator

import simpy
from simpy.events import URGENT

from twinserve.policies import Batch, Core, SamplingParams, Sequence
from twinserve.sim.latency import LatencyModel, StepCost, StepFeatures
from twinserve.traces.arrivals import Arrivals
from twinserve.traces.request import Request


def now_ns(env: simpy.Environment) -> int:
    """The simulated time in nanoseconds; all delays are integers, so it is one."""
    return int(env.now)


class Replica:
    """One engine in simulated time: the real engine's loop, with a latency model in place of the device.

    A step of cost (host, device) that is decided at t is launched at t + host, starts then or when the device is free,
    and ends after device; one that the device can begin while it is being launched starts up to lead earlier. The next
    decision is made when the step is launched, or, where the pipeline is full, when the oldest step in flight has
    ended, whichever is later. Decisions that repeat one another until the next event of the simulation are made at
    once.

    Args:
        ended: called with each sequence that ends.
        step_by_step: make every decision by itself; the results are the same.
    """

    def __init__(
        self,
        env: simpy.Environment,
        core: Core,
        latency: LatencyModel,
        ended: Callable[[Sequence], None],
        *,
        step_by_step: bool = False,
    ):
        self._env, self._core, self._latency, self._ended = env, core, latency, ended
        self._most_steps = 1 if step_by_step else 4096
        self._inbox: deque[Sequence] = deque()
        self._awake = env.event()
        self.process = env.process(self._run())

    def submit(self, seq: Sequence) -> None:
        """Let a sequence in; the next decision sees it."""
        self._inbox.append(seq)
        if not self._awake.triggered:
            self._awake.succeed()

    def _run(self) -> Generator[simpy.Event, None, None]:
        env, core = self._env, self._core
        device_free = arrived = 0
        while True:
            now = now_ns(env)
            arrived += len(self._inbox)
            while self._inbox:
                seq = self._inbox.popleft()
                if not core.ingest(seq, now):
                    self._ended(seq)
            launched = now
            if core.can_decide:
                batch = core.decide(now)
                if batch:
                    cost = StepCost(*self._latency.step_cost(StepFeatures.of(batch, arrived)))
                    launched, batch.start_ns, device_free = cost.times(now, device_free)
                    arrived = 0
                else:
                    batch.start_ns = device_free = max(now, device_free)
                batch.end_ns = device_free
                if (steps := core.horizon(batch, self._most_steps)) > 1:
                    launched, device_free = self._repeat(batch, steps, launched)
            if core.must_commit:
                yield env.timeout(max(launched, core.in_flight[0].end_ns or 0) - now)
                for seq in core.commit(None, now_ns(env)):
                    self._ended(seq)
            elif core.is_idle:
                self._awake = env.event()
                yield self._awake
            else:
                yield env.timeout(launched - now)

    def _repeat(self, batch: Batch, steps: int, launched: int) -> tuple[int, int]:
        """Make up to `steps` equal decisions, `batch` among them, at once: those before the next event.

        What happens at the instant of a decision comes first, so that decision is left to be made.

        Returns:
            When the last step is launched, and when it ends.
        """
        core, features, next_event = self._core, StepFeatures.of(batch), self._env.peek()
        ends = [before.end_ns or 0 for before in core.in_flight]
        spans: list[tuple[int, int, int]] = []
        for number in range(1, steps):
            decided = max(launched, ends[-1 - core.pipeline_depth])
            if decided >= next_event:
                break
            cost = StepCost(*self._latency.step_cost(features.repeated(number, batch.num_new_pairs, decided)))
            launched, start, end = cost.times(decided, ends[-1])
            ends.append(end)
            spans.append((decided, start, end))
        if spans:
            core.advance(spans)
        return launched, ends[-1]


class _Alarm(simpy.Event):
    """An event at a given time that comes before everything else at that time."""

    def __init__(self, env: simpy.Environment, delay: int, callback: Callable[[simpy.Event], None]):
        super().__init__(env)
        self._ok = True
        self._value = None
        self.callbacks = [callback]
        env.schedule(self, priority=URGENT, delay=delay)


class Feeder:
    """Hands the requests of a trace to `submit` at the times they arrive; equal instants go by trace row."""

    def __init__(self, env: simpy.Environment, arrivals: Arrivals, submit: Callable[[Request], None]):
        self._env, self._arrivals, self._submit = env, arrivals, submit
        self._alarm_ns: int | None = None
        self._release()

    def answered(self, seq: Sequence) -> None:
        """A sequence has ended: requests that wait for its answer can arrive."""
        self._arrivals.answered(seq.seq_id, seq.num_completion_tokens, now_ns(self._env))
        self._release()

    def _release(self, _: simpy.Event | None = None) -> None:
        """Submit what is due and set an alarm for what comes next."""
        now = now_ns(self._env)
        while (due := self._arrivals.next_ns) is not None and due <= now:
            self._submit(self._arrivals.pop())
        if due is not None and (self._alarm_ns is None or due < self._alarm_ns or self._alarm_ns <= now):
            self._alarm_ns = due
            _Alarm(self._env, due - now, self._release)


def simulate(
    requests: list[Request],
    core: Core,
    latency: LatencyModel,
    *,
    params: SamplingParams | None = None,
    announce: Callable[[Request], None] | None = None,
    progress: Callable[[Sequence], None] | None = None,
    step_by_step: bool = False,
) -> int:
    """Replay a trace on one simulated replica until every request has ended; the simulated time, in nanoseconds.

    Args:
        core: fresh; its listener, if any, hears the run.
        latency: what a step costs.
        announce: called with each request as it arrives, its prompt as it really is.
        progress: called with each sequence that ends.
        step_by_step: make every decision by itself, which takes longer; the results are the same.
    """
    env = simpy.Environment()
    params = params or SamplingParams(ignore_eos=True)

    def ended(seq: Sequence) -> None:
        if progress is not None:
            progress(seq)
        feeder.answered(seq)

    def submit(request: Request) -> None:
        if announce is not None:
            announce(request)
        replica.submit(request.to_sequence(params))

    arrivals = Arrivals(requests)
    replica = Replica(env, core, latency, ended, step_by_step=step_by_step)
    feeder = Feeder(env, arrivals, submit)
    env.run()
    core.scheduler.check_integrity()
    if not (arrivals.is_empty and core.is_idle):
        raise RuntimeError(f"the simulation stopped with {len(core.sequences)} requests unfinished")
    return now_ns(env)
