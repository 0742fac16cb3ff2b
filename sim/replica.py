"""A simulated replica: one simpy process around Core, and the arrivals that feed it.

What happens at one instant has an order of its own: requests arrive; steps end, by the replica's number; the next turns
of what was answered arrive; replicas decide, by number.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable

import simpy
from simpy.events import URGENT

from twinserve.orders.loading import Loading
from twinserve.policies import Batch, Core, Runs, SamplingParams, Sequence
from twinserve.sim.clients import NOBODY, Clients, Door
from twinserve.sim.clock import alarm, now_ns, skip_to
from twinserve.sim.horizon import advance, horizon
from twinserve.sim.latency import LatencyModel, StepFeatures, cost_of
from twinserve.sim.leap import Leap
from twinserve.sim.speculation import Acceptance, output_of
from twinserve.sim.stages import Stages
from twinserve.traces.arrivals import Arrivals
from twinserve.traces.request import Request

_ARRIVES = URGENT
_ENDS, _ANSWERED, _DECIDES = 1_000_000, 2_000_000, 3_000_000


class Replica:
    """One engine in simulated time: the real engine's loop, with a latency model in place of the device.

    A step of cost (host, device) that is decided at t is launched at t + host, starts then or when the device is free,
    and ends after device; one that the device can begin while it is being launched starts up to lead earlier. The next
    decision is made when the step is launched, or, where the pipeline is full, when the oldest step in flight has
    ended, whichever is later. Of a pipeline, each stage computes one step at a time, see `Stages`. Decisions that
    repeat one another are planned (see `Leap`), and made together when the last of them is due or a request comes in.

    Args:
        ended: called with each sequence that ends.
        index: the number of the replica among those that share `env`.
        step_by_step: make every decision by itself; the results are the same.
        acceptance: says what comes of drafts, where `core` schedules any.
        loads: called with each sequence whose KV begins to be loaded, its tokens in the pool, and its tokens with those
            that are loaded; where `core` loads any.

    Attributes:
        outstanding_requests: requests sent here that have not ended.
        kept: requests that have ended, and whose KV is kept.
    """

    def __init__(
        self,
        env: simpy.Environment,
        core: Core,
        latency: LatencyModel,
        ended: Callable[[Sequence], None],
        *,
        index: int = 0,
        step_by_step: bool = False,
        acceptance: Acceptance | None = None,
        loads: Callable[[Sequence, int, int], None] | None = None,
    ):
        if core.scheduler.speculation.most and acceptance is None:
            raise ValueError("acceptance is None, expected one where drafts are scheduled")
        self._acceptance, self._loads = acceptance, loads
        waiting = core.scheduler.waiting
        self._loading = waiting if isinstance(waiting, Loading) else None
        self._keeping: set[int] = set()
        self.kept: set[int] = set()
        self._news: defaultdict[str, list[Sequence]] = defaultdict(list)
        self._released: list[int] = []
        self.index, self.core = index, core
        self.outstanding_requests = 0
        self._sent: dict[int, Sequence] = {}
        self._unanswered: dict[int, Sequence] = {}
        self._env, self._latency, self._on_end = env, latency, ended
        self._most_steps = 1 if step_by_step else 4096
        self._watch: Callable[..., None] | None = getattr(latency, "watch", None)
        self._inbox: deque[Sequence] = deque()
        self._aborts: list[int] = []
        self._is_idle = False
        self._device_free = 0
        ranks = core.scheduler.pipeline_parallel_size
        self._stages = Stages(ranks) if ranks > 1 else None
        self._leap: Leap | None = None
        self._event = env.event()
        self._process = env.process(self._run())

    @property
    def outstanding_tokens(self) -> int:
        """What a router knows to be left to do, in tokens: the prompts of which no token has come back, and one more
        token of every request that has not ended."""
        if self._unanswered:
            self._cut_leap()
            for number in [number for number, seq in self._unanswered.items() if seq.num_completion_tokens]:
                del self._unanswered[number]
        return sum(seq.num_prompt_tokens for seq in self._unanswered.values()) + self.outstanding_requests

    @property
    def kv_use(self) -> float:
        """The share of its KV blocks that are in use; of a pool without end, their number."""
        self._cut_leap()
        manager = self.core.scheduler.block_manager
        return manager.num_used_blocks / (manager.num_blocks or 1)

    @property
    def num_waiting(self) -> int:
        """Requests that do not run yet, or that were preempted."""
        self._cut_leap()
        return self.outstanding_requests - len(self.core.scheduler.running)

    @property
    def cached_prefixes(self) -> frozenset[int]:
        """The hashes of the full blocks that its prefix cache has: what an engine tells by events."""
        self._cut_leap()
        cache = self.core.scheduler.block_manager.prefix_cache
        return frozenset() if cache is None else frozenset(cache.hash_to_block_id)

    def num_hit_tokens(self, request: Request, held: frozenset[int]) -> int:
        """Tokens of a request's prompt that would be hit if its cache had the blocks with these hashes."""
        manager = self.core.scheduler.block_manager
        if manager.prefix_cache is None or not held:
            return 0
        seq, size = request.to_sequence(SamplingParams()), manager.block_size
        count = 0
        for key in manager.prefix_keys(seq, range(size, seq.num_prompt_tokens, size)):
            if key not in held:
                break
            count += size
        return count

    @property
    def remaining_tokens(self) -> int:
        """What is left to do, in tokens, were the lengths of all answers known, as they are to no router."""
        self._cut_leap()
        return sum(seq.final_length - seq.num_computed_tokens for seq in self._sent.values())

    def submit(self, seq: Sequence, *, keeps_kv: bool = False) -> None:
        """Let a sequence in; the next decision sees it. With `keeps_kv` its prompt's KV is kept when it has ended."""
        self.outstanding_requests += 1
        self._sent[seq.seq_id] = seq
        if not seq.num_completion_tokens:
            self._unanswered[seq.seq_id] = seq
        if keeps_kv:
            self._keeping.add(seq.seq_id)
        self._inbox.append(seq)
        self._wake()

    def tell(self, news: str, seq: Sequence) -> None:
        """What has become of the KV that a sequence loads, see `Loading.news`; the next decision sees it. What is lost
        before it was seen to be found again is not told of at all."""
        if news == "lost" and seq in self._news["found"]:
            self._news["found"].remove(seq)
        else:
            self._news[news].append(seq)
        self._wake()

    def release(self, seq_id: int) -> None:
        """The KV that was kept of a sequence that has ended is no longer needed."""
        self.kept.discard(seq_id)
        self._released.append(seq_id)
        self._wake()

    def _wake(self) -> None:
        """Something is to be decided on."""
        if self._is_idle:
            self._is_idle = False
            self._resume_at(now_ns(self._env), _DECIDES)
        else:
            self._cut_leap()

    def abort(self, seq_id: int) -> None:
        """End a request at the next decision, unless it has ended by then."""
        self._aborts.append(seq_id)
        self._wake()

    def catch_up(self) -> None:
        """Make the decisions that are planned before now, so that what comes of them can be seen."""
        self._cut_leap()

    def _cut_leap(self) -> None:
        """Make the decisions that were planned up to now; what came in is seen by the next."""
        if self._leap is not None:
            made = self._leap.num_before(now_ns(self._env))
            until = self._leap.decided_ns(made)
            self._make(made)
            self._resume_at(until, _ENDS)

    def stop(self) -> list[Sequence]:
        """Die now, with all that is in flight; the sequences that had not ended, in the order in which they came.

        What is submitted from then on waits for ever.
        """
        if self._leap is not None:
            self._make(self._leap.num_before(now_ns(self._env)))
        for event in (self._event, self._process.target):  # the second is what it waits for before it has begun
            if event.callbacks:
                event.callbacks.clear()
        return self.unanswered

    @property
    def unanswered(self) -> list[Sequence]:
        """The sequences that have not ended, in the order in which they came."""
        return [*self.core.sequences.values(), *self._inbox]

    def _run(self) -> Generator[simpy.Event, None, None]:
        core = self.core
        arrived = 0
        yield self._wait(now_ns(self._env), _DECIDES)
        while True:
            now = now_ns(self._env)
            arrived += len(self._inbox)
            while self._inbox:
                seq = self._inbox.popleft()
                if not core.ingest(seq, now):
                    self._ended(seq)
                    if not self._skip_to(now, _DECIDES):
                        yield self._wait(now, _DECIDES)
            for seq_id in self._aborts:
                core.abort(seq_id, now)
            self._aborts.clear()
            if self._loading is not None:
                self._move(self._loading)
            launched, is_stuck = now, False
            if core.can_decide:
                batch = core.decide(now)
                if self._loading is not None:
                    self._begin_loads(self._loading, batch)
                    is_stuck = not (batch.preempted or any(core.in_flight))
                for seq in batch.aborted:
                    self._ended(seq)
                if batch:
                    features = StepFeatures.of(batch, arrived)
                    cost = cost_of(self._latency, features)
                    if self._watch is not None:
                        self._watch(features)
                    if self._stages is None:
                        launched, batch.start_ns, self._device_free = cost.times(now, self._device_free)
                    else:
                        samples = batch.num_sampled > 0
                        launched, batch.start_ns, self._device_free = self._stages.times(cost, now, samples)
                    arrived = 0
                else:
                    if self._stages is not None:
                        self._stages.pass_by()
                    batch.start_ns = self._device_free = max(now, self._device_free)
                batch.end_ns = self._device_free
                if (steps := horizon(core, batch, self._most_steps)) > 1:
                    self._leap = Leap(core, self._latency, features, steps - 1, launched)
            if core.must_commit:
                until = max(launched, core.in_flight[0].end_ns or 0)
                if self._leap is None and not self._skip_to(until, _ENDS):
                    yield self._wait(until, _ENDS)
                while (leap := self._leap) is not None:
                    if not self._skip_to(leap.until_ns, _ENDS):
                        yield self._wait(leap.until_ns, _ENDS)
                    if self._leap is leap and not leap.extend():
                        self._make(leap.num_planned)
                now = now_ns(self._env)
                for seq in self._commit(core.in_flight[0], now):
                    self._ended(seq)
                if not self._skip_to(now, _DECIDES):
                    yield self._wait(now, _DECIDES)
                has_news = bool(self._inbox or self._aborts or self._news or self._released)
                is_stuck = is_stuck and not (has_news or core.must_commit)
            elif not core.can_decide:
                is_stuck = True
            elif not self._skip_to(launched, _DECIDES):
                yield self._wait(launched, _DECIDES)
            if is_stuck:
                self._is_idle = True
                self._event = self._env.event()
                yield self._event

    def _output(self, batch: Batch) -> Runs | None:
        """What comes of a step: nothing but of drafts."""
        speculation = self.core.scheduler.speculation
        if not speculation.most or self._acceptance is None:
            return None
        return output_of(batch, self._acceptance, is_async=speculation.is_async)

    def _skip_to(self, at_ns: int, priority: int) -> bool:
        """Go on to a time, where nothing else happens before; False if it has to be waited for."""
        return skip_to(self._env, at_ns, priority + self.index)

    def _move(self, loading: Loading) -> None:
        """Take in what was released, and what has become of KV that is loaded."""
        for seq_id in self._released:
            loading.release(seq_id)
            self.core.scheduler.refusal = None
        self._released.clear()
        for name, hear in loading.news if self._news else ():
            for seq in self._news.pop(name, ()):
                hear(seq)
                self.core.scheduler.refusal = None

    def _begin_loads(self, loading: Loading, batch: Batch) -> None:
        """Have the KV loaded of those that a decision gave blocks for it."""
        moves = batch.kv_moves = loading.take_moves()
        for seq_id, num_tokens, found in moves.get("loads", ()):
            if self._loads is not None:
                self._loads(self.core.sequences[seq_id], num_tokens, found)

    def _commit(self, batch: Batch, now_ns: int) -> list[Sequence]:
        """End a step; the KV of prompts that end with it may be kept."""
        keeping = self._keeping
        kept = [seq for seq in batch.sampled if seq.seq_id in keeping and not seq.is_finished] if keeping else []
        if not kept:
            return self.core.commit(self._output(batch), now_ns)
        assert self._loading is not None, "KV is kept by replicas that load"
        for seq in kept:
            self._keeping.remove(seq.seq_id)
            self.kept.add(seq.seq_id)
        with self._loading.keeping(kept):
            return self.core.commit(self._output(batch), now_ns)

    def _wait(self, until_ns: int, priority: int) -> simpy.Event:
        self._event = alarm(self._env, until_ns, priority + self.index)
        return self._event

    def _resume_at(self, at_ns: int, priority: int) -> None:
        """Go on at another time than at that of the event waited for."""
        waiting, self._event.callbacks = self._event.callbacks or (), []
        self._event = alarm(self._env, at_ns, priority + self.index, *waiting)

    def _ended(self, seq: Sequence) -> None:
        self.outstanding_requests -= 1
        del self._sent[seq.seq_id]
        self._unanswered.pop(seq.seq_id, None)
        self._on_end(seq)

    def _make(self, steps: int) -> None:
        """Make so many of the planned decisions, and drop the others."""
        leap, self._leap = self._leap, None
        if leap is not None and steps:
            spans = leap.spans(steps)
            if self._watch is not None:
                self._watch(leap.features.repeated(1, 0), steps)
            advance(self.core, spans)
            self._device_free = self.core.in_flight[-1].end_ns or 0


class Feeder:
    """Hands the requests of a trace to `submit` at the times they arrive; equal instants go by trace row."""

    def __init__(self, env: simpy.Environment, arrivals: Arrivals, submit: Callable[[Request], None]):
        self._env, self._arrivals, self._submit = env, arrivals, submit
        self._alarm_ns: int | None = None
        self._set_alarm()

    def answered(self, seq: Sequence) -> None:
        """A sequence has ended: requests that wait for its answer can arrive."""
        self._arrivals.answered(seq.seq_id, seq.num_completion_tokens, now_ns(self._env))
        self._set_alarm()

    def _release(self, _: simpy.Event) -> None:
        """Submit what is due."""
        now = now_ns(self._env)
        while (due := self._arrivals.next_ns) is not None and due <= now:
            self._submit(self._arrivals.pop())
        if self._alarm_ns is not None and self._alarm_ns <= now:
            self._alarm_ns = None
        self._set_alarm()

    def _set_alarm(self) -> None:
        """Be there when the next request arrives."""
        due = self._arrivals.next_ns
        if due is not None and (self._alarm_ns is None or due < self._alarm_ns):
            self._alarm_ns = due
            alarm(self._env, due, _ANSWERED if due == self._env.now else _ARRIVES, self._release)


def simulate(
    requests: Iterable[Request],
    core: Core,
    latency: LatencyModel,
    *,
    params: SamplingParams | None = None,
    announce: Callable[[Request], None] | None = None,
    progress: Callable[[Sequence], None] | None = None,
    step_by_step: bool = False,
    acceptance: Acceptance | None = None,
    clients: Clients = NOBODY,
) -> tuple[int, int]:
    """Replay a trace on one simulated replica until every request has ended.

    Args:
        core: fresh; its listener, if any, hears the run.
        latency: what a step costs.
        announce: called with each request as it arrives, its prompt as it really is.
        progress: called with each sequence that ends.
        step_by_step: make every decision by itself, which takes longer; the results are the same.
        acceptance: what comes of drafts; has to be given where the settings schedule any.
        clients: who is turned away, and who gives up; `progress` is told of both.

    Returns:
        How many were turned away, and how many gave up.
    """
    env = simpy.Environment()
    params = params or SamplingParams(ignore_eos=True)

    def ended(seq: Sequence) -> None:
        door.ended(seq)
        if progress is not None:
            progress(seq)
        feeder.answered(seq)

    def submit(request: Request) -> None:
        if not door.opens(request, replica):
            return
        if announce is not None:
            announce(request)
        replica.submit(request.to_sequence(params))
        door.submitted(request, replica)

    arrivals, door = Arrivals(requests), Door(env, clients, params, ended)
    replica = Replica(env, core, latency, ended, step_by_step=step_by_step, acceptance=acceptance)
    feeder = Feeder(env, arrivals, submit)
    env.run()
    core.scheduler.check_integrity()
    if not (arrivals.is_empty and core.is_idle):
        raise RuntimeError(f"the simulation stopped with {len(core.sequences)} requests unfinished")
    return door.num_rejected, door.num_timed_out
