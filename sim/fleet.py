"""A simulated fleet: replicas behind a router, some of which die and come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import simpy

from twinserve.policies import Core, SamplingParams, Sequence
from twinserve.settings.errors import InputError
from twinserve.sim.latency import LatencyModel
from twinserve.sim.replica import Feeder, Replica, alarm, now_ns, simulate
from twinserve.sim.routers import Router
from twinserve.sim.speculation import Acceptance
from twinserve.traces.arrivals import Arrivals
from twinserve.traces.request import Request

_DIES = -1


@dataclass(frozen=True, slots=True)
class Outage:
    """A replica dies at `from_ns` and comes back, with nothing in it, at `to_ns`; None is never."""

    replica: int
    from_ns: int
    to_ns: int | None = None

    def __str__(self) -> str:
        return f"{self.replica}:{self.from_ns / 1e9:g}:{'' if self.to_ns is None else f'{self.to_ns / 1e9:g}'}"


class FleetListener:
    """Builds the replicas' policies, and hears where requests go. This one wants to know nothing.

    A replica that comes back has another `life`, from 0.
    """

    def __init__(self, build_cores: Seq[Callable[[], Core]]):
        self._build_cores = build_cores

    def begun(self, replica: int, life: int) -> Core:
        """A replica is up; its fresh Core."""
        return self._build_cores[replica]()

    def acceptance(self, replica: int) -> Acceptance | None:
        """What comes of a replica's drafts; None if it has none."""
        return None

    def sent(self, request: Request, replica: int) -> None:
        """The router sends a request, its prompt as it really is, to a replica."""

    def died(self, replica: int, lost: list[Sequence]) -> None:
        """A replica is down; what it had not answered will be sent to another."""


def check_outages(outages: Iterable[Outage], num_replicas: int) -> None:
    """Raise ValueError if a replica is not there, is down twice at once, or if none would ever be up again."""
    per_replica: dict[int, list[Outage]] = {}
    for outage in outages:
        if not 0 <= outage.replica < num_replicas:
            raise ValueError(f"outage {outage}, expected a replica from 0 to {num_replicas - 1}")
        if outage.from_ns < 0 or (outage.to_ns is not None and outage.to_ns <= outage.from_ns):
            raise ValueError(f"outage {outage}, expected 0 <= from < to")
        per_replica.setdefault(outage.replica, []).append(outage)
    for own in per_replica.values():
        own.sort(key=lambda outage: outage.from_ns)
        for one, following in zip(own, own[1:], strict=False):
            if one.to_ns is None or one.to_ns >= following.from_ns:
                raise ValueError(f"outage {following}, expected one that begins after {one} has ended")
    if len(per_replica) == num_replicas and all(own[-1].to_ns is None for own in per_replica.values()):
        raise ValueError("every replica dies and none comes back, expected one that does")


class Fleet:
    """Replicas behind a router, in simulated time.

    What a replica has not answered when it dies is sent anew, to those that are up; its tokens are lost. While none is
    up, requests wait before the router.

    Args:
        latencies: one a replica.
        ended: called with each sequence that ends.
        is_done: has every request ended? Then nobody dies or comes back any more.
    """

    def __init__(
        self,
        env: simpy.Environment,
        latencies: Seq[LatencyModel],
        router: Router,
        listener: FleetListener,
        ended: Callable[[Sequence], None],
        *,
        params: SamplingParams,
        outages: Iterable[Outage] = (),
        is_done: Callable[[], bool],
        step_by_step: bool = False,
    ):
        self._env, self._latencies, self._router, self._listener = env, latencies, router, listener
        self._on_end, self._params, self._is_done, self._step_by_step = ended, params, is_done, step_by_step
        self._lives = [0] * len(latencies)
        self._up: dict[int, Replica] = {}
        self._outstanding: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        for index in range(len(latencies)):
            self._begin(index)
        outages = list(outages)
        check_outages(outages, len(latencies))
        changes = [(outage.from_ns, False, outage.replica) for outage in outages]
        changes += [(outage.to_ns, True, outage.replica) for outage in outages if outage.to_ns is not None]
        for at_ns, group in groupby(sorted(changes), key=lambda change: change[0]):
            alarm(env, at_ns, _DIES, self._change([(is_up, index) for _, is_up, index in group]))

    @property
    def replicas(self) -> list[Replica]:
        """Those that are up, by number."""
        return [self._up[index] for index in sorted(self._up)]

    def submit(self, request: Request) -> None:
        """Send a request to the replica that the router chooses; if none is up, as soon as one is.

        Raises:
            InputError: the router chooses a replica that is not there.
        """
        replicas = self.replicas
        if not replicas:
            self._waiting.append(request)
            return
        replica = _chosen(self._router, request, replicas)
        self._outstanding[request.id] = request
        self._listener.sent(request, replica.index)
        replica.submit(request.to_sequence(self._params))

    def _begin(self, index: int) -> None:
        core = self._listener.begun(index, self._lives[index])
        self._up[index] = Replica(
            self._env,
            core,
            self._latencies[index],
            self._ended,
            index=index,
            step_by_step=self._step_by_step,
            acceptance=self._listener.acceptance(index),
        )
        self._lives[index] += 1

    def _ended(self, seq: Sequence) -> None:
        del self._outstanding[seq.seq_id]
        self._on_end(seq)

    def _change(self, changes: list[tuple[bool, int]]) -> Callable[[simpy.Event], None]:
        """What happens at an instant at which replicas die (False) or come back (True)."""

        def change(_: simpy.Event) -> None:
            if self._is_done():
                return
            lost: list[Request] = []
            for is_up, index in changes:
                if is_up:
                    self._begin(index)
                else:
                    seqs = self._up.pop(index).stop()
                    self._listener.died(index, seqs)
                    lost += [self._outstanding.pop(seq.seq_id) for seq in seqs]
            self._waiting.extend(sorted(lost, key=lambda request: request.id))
            while self._waiting and self._up:
                self.submit(self._waiting.popleft())

        return change

    def check_integrity(self) -> None:
        """Raise AssertionError if a request is still somewhere, or a replica's policies are inconsistent."""
        assert not self._outstanding and not self._waiting, f"unanswered: {[*self._outstanding, *self._waiting]}"
        for replica in self.replicas:
            replica.core.scheduler.check_integrity()
            left = replica.outstanding_requests, replica.outstanding_tokens
            assert replica.core.is_idle and left == (0, 0), f"replica {replica.index} still has {left}"


def _chosen(router: Router, request: Request, replicas: list[Replica]) -> Replica:
    place = router.choose(request, replicas)
    if not 0 <= place < len(replicas):
        raise InputError(f"the router chose {place}, expected a place from 0 to {len(replicas) - 1}")
    return replicas[place]


def simulate_fleet(
    requests: Iterable[Request],
    latencies: Seq[LatencyModel],
    router: Router,
    listener: FleetListener,
    *,
    params: SamplingParams | None = None,
    outages: Iterable[Outage] = (),
    progress: Callable[[Sequence], None] | None = None,
    step_by_step: bool = False,
) -> None:
    """Replay a trace on a simulated fleet until every request has ended.

    Args:
        latencies: what a step costs, one a replica.
        router: chooses a replica for each request as it arrives.
        listener: builds the policies.
        progress: called with each sequence that ends; in the order of time, unless the router is blind.
        step_by_step: make every decision by itself, which takes longer; the results are the same.

    Raises:
        ValueError: the outages are impossible; an InputError, which is one, if the router's choices are.
    """
    params, outages = params or SamplingParams(ignore_eos=True), list(outages)
    arrivals = Arrivals(requests)
    is_apart = getattr(router, "is_blind", False) and not outages and isinstance(requests, Seq)
    if is_apart and all(request.after is None for request in requests):
        # Replicas that know nothing of one another: one after the other, more of what one works with is found in the
        # processor's caches. Eight take a tenth less on the Mooncake trace.
        for index, share in enumerate(_shares(arrivals, router, len(latencies))):
            simulate(
                share,
                listener.begun(index, 0),
                latencies[index],
                params=params,
                announce=lambda request, index=index: listener.sent(request, index),  # type: ignore[misc]
                progress=progress,
                step_by_step=step_by_step,
                acceptance=listener.acceptance(index),
            )
        return
    env = simpy.Environment()

    def ended(seq: Sequence) -> None:
        if progress is not None:
            progress(seq)
        feeder.answered(seq)

    fleet = Fleet(
        env,
        latencies,
        router,
        listener,
        ended,
        params=params,
        outages=outages,
        is_done=lambda: arrivals.is_empty and not fleet._outstanding and not fleet._waiting,
        step_by_step=step_by_step,
    )
    feeder = Feeder(env, arrivals, fleet.submit)
    env.run()
    fleet.check_integrity()
    if not arrivals.is_empty:
        raise RuntimeError(f"the simulation stopped at {now_ns(env)} with requests that never arrived")


def _shares(arrivals: Arrivals, router: Router, num_replicas: int) -> list[list[Request]]:
    """The requests that a blind router sends to each replica."""
    shares: list[list[Request]] = [[] for _ in range(num_replicas)]
    replicas: list[Any] = list(map(_Numbered, range(num_replicas)))
    while not arrivals.is_empty:
        request = arrivals.pop()
        shares[_chosen(router, request, replicas).index].append(request)
    return shares


@dataclass(frozen=True)
class _Numbered:
    """What a blind router reads of a replica."""

    index: int
