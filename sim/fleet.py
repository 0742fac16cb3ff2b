"""A simulated fleet: replicas behind a router, some of which die and come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import simpy
from mypy_extensions import mypyc_attr

from twinserve.orders import Loading
from twinserve.policies import Core, SamplingParams, Sequence
from twinserve.settings.errors import InputError
from twinserve.sim.clients import NOBODY, Clients, Door
from twinserve.sim.clock import alarm, now_ns
from twinserve.sim.disaggregation import BOTH, Disaggregation, Handover, Transfers
from twinserve.sim.latency import LatencyModel
from twinserve.sim.replica import Feeder, Replica, simulate
from twinserve.sim.routers import Router
from twinserve.sim.scaling import Lease, Scaling
from twinserve.sim.speculation import Acceptance
from twinserve.sim.tiers import FleetTiers, TierPlan
from twinserve.traces.arrivals import Arrivals
from twinserve.traces.request import Request
from twinserve.traces.runs.metrics import DECODE, PREFILL, SERVED

_CHANGES = -1
_DIES, _NOTICED, _RETURNS = range(3)
"""What happens to replicas, in the order of those at one instant."""


@mypyc_attr(native_class=False)  # it may be pickled
@dataclass(frozen=True, slots=True)
class Outage:
    """A replica dies at `from_ns` and comes back, with nothing in it, at `to_ns`; None is never."""

    replica: int
    from_ns: int
    to_ns: int | None = None

    def __str__(self) -> str:
        return f"{self.replica}:{self.from_ns / 1e9:g}:{'' if self.to_ns is None else f'{self.to_ns / 1e9:g}'}"


@mypyc_attr(native_class=False)  # it may be pickled
@dataclass(frozen=True, slots=True)
class Restart:
    """Replicas are restarted one after another, from `from_ns` on: each is sent nothing more, ends what it has, is down
    for `down_ns`, and is back, with nothing in it, before the next begins."""

    replicas: tuple[int, ...]
    from_ns: int
    down_ns: int


@mypyc_attr(allow_interpreted_subclasses=True)
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

    def prompt_sent(self, request: Request, replica: int) -> None:
        """It sends it to one that computes its prompt and its first token alone."""
        self.sent(request, replica)

    def handed_over(self, request: Request, source: int | None, target: int) -> None:
        """Another replica goes on with it behind its first token; without a source it computes the prompt again."""
        self.sent(request, target)

    def died(self, replica: int, lost: list[Sequence]) -> None:
        """A replica is down; what it had not answered will be sent to another."""


def check_outages(outages: Iterable[Outage], num_replicas: int, roles: Seq[str] = ()) -> None:
    """Raise ValueError if a replica is not there, is down twice at once, or if none would ever be up again: of all, or
    of those that compute prompts alone, or go on with them alone, if there are such."""
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
    gone = {replica for replica, own in per_replica.items() if own[-1].to_ns is None}
    if len(gone) == num_replicas:
        raise ValueError("every replica dies and none comes back, expected one that does")
    for role in (PREFILL, DECODE):
        if role in roles and gone.issuperset(index for index, other in enumerate(roles) if other == role):
            raise ValueError(f"every {role} replica dies and none comes back, expected one that does")


def check_restarts(restarts: Iterable[Restart], outages: Iterable[Outage], num_replicas: int) -> None:
    """Raise ValueError if a replica is not there, is restarted twice, or dies as well."""
    seen = {outage.replica for outage in outages}
    for restart in restarts:
        for index in restart.replicas:
            if not 0 <= index < num_replicas:
                raise ValueError(f"restart of {index}, expected a replica from 0 to {num_replicas - 1}")
            if index in seen:
                raise ValueError(f"restart of {index}, expected one that neither dies nor is restarted twice")
            seen.add(index)


class Fleet:
    """Replicas behind a router, in simulated time.

    What a replica has not answered when it dies is sent anew, to those that are up; its tokens are lost. A request is
    sent to one that can serve it. While none of them is up and one will be, it waits before the router.

    A death is noticed some time later, or when the replica is back. Until then the router goes on sending requests
    there, and what was sent waits.

    Args:
        latencies: one a replica.
        failover_ns: nanoseconds from a death until the router knows of it.
        restarts: see `Restart`; the router knows of them.
        ended: called with each sequence that ends, those of requests that are turned away among them.
        clients: see `Clients`.
        split: who computes prompts and who goes on; None: all do both.
        tiers: behind the prefix caches of those who compute prompts.
        scaling: how many are up; None: all.
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
        failover_ns: int = 0,
        restarts: Iterable[Restart] = (),
        is_done: Callable[[], bool],
        step_by_step: bool = False,
        clients: Clients = NOBODY,
        split: Disaggregation | None = None,
        tiers: TierPlan | None = None,
        scaling: Scaling | None = None,
    ):
        self._split, self._scaling = split, scaling
        self.leases: list[Lease] = []
        self.tiers = None if tiers is None else FleetTiers(env, tiers, self._catch_up)
        self.transfers = None if split is None else Transfers(env, split, lambda replica: self._emptied(replica.index))
        self.door = Door(env, clients, params, ended)
        self._env, self._latencies, self._router, self._listener = env, latencies, router, listener
        self._on_end, self._params, self._is_done, self._step_by_step = ended, params, is_done, step_by_step
        self._lives = [0] * len(latencies)
        self._cores: dict[int, Core] = {}
        self._up: dict[int, Replica] = {}
        self._dead: set[int] = set()
        self._outstanding: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        self._handing_over: deque[Handover] = deque()
        """Those that nobody can go on with just now."""
        self._going_on: set[int] = set()
        """Requests that a replica goes on with."""
        self._again: deque[Request] = deque()
        """Those that it waits for, as their prompts have to be computed again, and that nobody can serve just now."""
        self._lost_kv: dict[int, list[Request]] = {}
        """Of those that are dead, whose KV they kept."""
        for index in range(len(latencies) if scaling is None else scaling.least):
            self.leases.append(Lease(index, 0, 0))
            self._begin(index)
        if scaling is not None:
            self._enough: deque[tuple[int, int]] = deque()
            alarm(env, scaling.period_ns, _CHANGES, self._look)
        outages = list(outages)
        check_outages(outages, len(latencies), () if split is None else split.roles)
        self._returns = [(outage.replica, outage.to_ns) for outage in outages if outage.to_ns is not None]
        changes = []
        for outage in outages:
            noticed_ns, back_ns = outage.from_ns + failover_ns, outage.to_ns
            if back_ns is not None:
                noticed_ns = min(noticed_ns, back_ns)
                changes.append((back_ns, _RETURNS, outage.replica))
            changes += [(outage.from_ns, _DIES, outage.replica), (noticed_ns, _NOTICED, outage.replica)]
        self._draining: dict[int, Callable[[], None]] = {}
        """Those that are to be empty before they go, with what comes then."""
        self._restarting: set[int] = set()
        for restart in restarts:
            alarm(env, restart.from_ns, _CHANGES, lambda _, restart=restart: self._drain(restart, 0))  # type: ignore[misc]
        for at_ns, group in groupby(sorted(changes), key=lambda change: change[0]):
            alarm(env, at_ns, _CHANGES, self._change([(kind, index) for _, kind, index in group]))

    @property
    def replicas(self) -> list[Replica]:
        """Those to which requests are sent, as they are up as far as the router knows, by number."""
        return [self._up[index] for index in sorted(self._up) if index not in self._draining]

    def submit(self, request: Request) -> None:
        """Send a request to the replica that the router chooses; if none is up, as soon as one is.

        Raises:
            InputError: the router chooses a replica that is not there.
        """
        seq = request.to_sequence(self._params)
        roles = (PREFILL,) if request.id in self._outstanding else self._roles_for(seq)
        replicas = [replica for replica in self.replicas if self._role(replica.index) in roles]
        able = [replica for replica in replicas if self._could(replica.index, seq, roles)]
        if not replicas or (not able and any(self._could(index, seq, roles) for index in self._to_return())):
            (self._again if request.id in self._outstanding else self._waiting).append(request)
            return
        replica = _chosen(self._router, request, able or replicas)
        if not self.door.opens(request, replica):
            return
        self._outstanding[request.id] = request
        is_handed_over = self._role(replica.index) == PREFILL and request.max_tokens > 1
        if is_handed_over:
            seq = request._replace(max_tokens=1).to_sequence(self._params)
        if replica.index not in self._dead:
            tell = self._listener.prompt_sent if is_handed_over else self._listener.sent
            tell(request, replica.index)
        replica.submit(seq, keeps_kv=is_handed_over)
        if request.id not in self._going_on:
            self.door.submitted(request, replica)

    def _roles_for(self, seq: Sequence) -> tuple[str, ...]:
        """The roles of those that a request may be sent to; if it can never be served, of those that refuse it."""
        if self._split is None or any(self._could(index, seq, (BOTH, PREFILL)) for index in self._cores):
            return BOTH, PREFILL
        if BOTH in self._split.roles:
            return (BOTH,)
        return (PREFILL,) if self._could_go_on(seq) else (DECODE,)

    def _role(self, index: int) -> str:
        return BOTH if self._split is None else self._split.roles[index]

    def _could(self, index: int, seq: Sequence, roles: tuple[str, ...]) -> bool:
        """Could a replica with one of these roles, were it up, ever do its part of this?"""
        role, core = self._role(index), self._cores[index]
        if role not in roles:
            return False
        if role == PREFILL:
            return _could_serve(core, seq, min(1, seq.max_tokens)) and (seq.max_tokens == 1 or self._could_go_on(seq))
        return _could_serve(core, seq, seq.max_tokens)

    def _could_go_on(self, seq: Sequence) -> bool:
        """Is there a replica that could ever go on with this, once its prompt is computed?"""
        return any(self._could(index, seq, (DECODE,)) for index in self._cores)

    def _hand_over(self, handover: Handover) -> None:
        """Have another replica go on with a request; if none that could is up, as soon as one is."""
        assert self._split is not None and self.transfers is not None
        if handover.source is None and not handover.is_lost:
            return  # its prompt is computed again, and that ends here as well
        request, computed = handover.request, handover.computed
        seq = request.to_sequence(self._params)
        able = [replica for replica in self.replicas if self._could(replica.index, seq, (DECODE,))]
        if not able:
            self._handing_over.append(handover)
            return
        replica = _chosen(self._split.router, request, able)
        seq.prefix_key = computed.prefix_key  # it knows the keys of the prompt
        seq.append_token(None)
        seq.first_scheduled_ns, seq.first_token_ns = computed.first_scheduled_ns, computed.first_token_ns
        handover.target = replica, seq
        self._going_on.add(request.id)
        if replica.index not in self._dead:
            source = handover.source
            self._listener.handed_over(request, None if source is None else source.index, replica.index)
        replica.submit(seq)
        self.door.submitted(request, replica)
        self.transfers.send(handover)

    def _to_return(self) -> Iterator[int]:
        """Replicas that are down, or will be so that they are empty, and will come back."""
        now = now_ns(self._env)
        yield from self._restarting
        yield from (index for index, at_ns in self._returns if at_ns > now and index not in self._up)

    def _begin(self, index: int) -> None:
        core = self._cores[index] = self._listener.begun(index, self._lives[index])
        loads: Callable[[Sequence, int, int], None] | None = None
        waiting, role = core.scheduler.waiting, self._role(index)
        if self.transfers is not None and role == DECODE:
            assert isinstance(waiting, Loading), f"replica {index} loads no KV"
            waiting.source, loads = self.transfers, self.transfers.has_blocks
        elif self.tiers is not None:
            assert isinstance(waiting, Loading), f"replica {index} loads no KV"
            tiers = waiting.source = self.tiers.of(index, core.scheduler.block_manager)

            def loads(seq: Sequence, num_tokens: int, found: int) -> None:
                tiers.load(seq, partial(replica.tell, "loaded"))

        replica = self._up[index] = Replica(
            self._env,
            core,
            self._latencies[index],
            self._ended,
            index=index,
            step_by_step=self._step_by_step,
            acceptance=self._listener.acceptance(index),
            loads=loads,
        )
        self._lives[index] += 1

    def _ended(self, seq: Sequence) -> None:
        request = self._outstanding.get(seq.seq_id)
        if request is None:
            self._release(seq)
        elif seq.max_tokens < request.max_tokens and seq.finish_reason in SERVED:
            self._prompt_ended(request, seq)
        else:
            del self._outstanding[seq.seq_id]
            if self.transfers is not None:
                self._going_on.discard(seq.seq_id)
                self.transfers.forget(seq.seq_id)
            self.door.ended(seq)
            self._on_end(seq)
        for index in list(self._draining):
            self._emptied(index)

    def _prompt_ended(self, request: Request, seq: Sequence) -> None:
        """A replica has computed a prompt: another one goes on with it, or has waited for it."""
        assert self.transfers is not None
        source = next(replica for replica in self._up.values() if seq.seq_id in replica.kept)
        handover = self.transfers.handovers.setdefault(request.id, Handover(request, source, seq))
        handover.source, handover.computed = source, seq
        if handover.target is None:
            self._hand_over(handover)
        else:
            self.transfers.send(handover)

    def _release(self, seq: Sequence) -> None:
        """Keep no KV of a prompt that was computed again in vain, as its client has given up meanwhile."""
        for replica in self._up.values():
            if seq.seq_id in replica.kept:
                replica.release(seq.seq_id)

    def _emptied(self, index: int) -> None:
        """Let a replica go that is to be empty before it does, if it is."""
        if index not in self._draining or self._up[index].outstanding_requests:
            return
        if self.transfers is None or not self.transfers.holds(self._up[index]):
            self._draining.pop(index)()

    def _drain(self, restart: Restart, place: int) -> None:
        """Send nothing more to a replica that is to be restarted; once it is empty, it goes."""
        if self._is_done():
            return
        index = restart.replicas[place]

        def back(_: simpy.Event) -> None:
            if self._is_done():
                return
            self._restarting.remove(index)
            self._begin(index)
            self._send_waiting()
            if place + 1 < len(restart.replicas):
                self._drain(restart, place + 1)

        def emptied() -> None:
            del self._up[index]
            alarm(self._env, now_ns(self._env) + restart.down_ns, _CHANGES, back)

        self._restarting.add(index)
        self._draining[index] = emptied
        self._emptied(index)

    def _look(self, _: simpy.Event) -> None:
        """Begin as many replicas as are missing, or drain those that have been too many for a while."""
        scaling, now = self._scaling, now_ns(self._env)
        if scaling is None or self._is_done():
            return
        there = [lease for lease in self.leases if lease.to_ns is None and lease.replica not in self._draining]
        wanted = scaling.wanted(self.replicas, len(there), len(self._latencies))
        free = set(range(len(self._latencies))) - {lease.replica for lease in self.leases if lease.to_ns is None}
        for index in sorted(free)[: max(0, wanted - len(there))]:
            lease = Lease(index, now)
            self.leases.append(lease)
            alarm(self._env, now + scaling.start_ns, _CHANGES, lambda _, lease=lease: self._started(lease))  # type: ignore[misc]
        self._enough.append((now, wanted))
        while self._enough[0][0] < now - scaling.settle_ns:
            self._enough.popleft()
        most = max(count for _, count in self._enough)
        up = sorted((lease for lease in there if lease.up_ns is not None), key=lambda lease: lease.replica)
        for lease in reversed(up[most:]):
            self._draining[lease.replica] = lambda lease=lease: self._gone(lease)  # type: ignore[misc]
            self._emptied(lease.replica)
        alarm(self._env, now + scaling.period_ns, _CHANGES, self._look)

    def _started(self, lease: Lease) -> None:
        if not self._is_done():
            lease.up_ns = now_ns(self._env)
            self._begin(lease.replica)
            self._send_waiting()

    def _gone(self, lease: Lease) -> None:
        del self._up[lease.replica]
        lease.to_ns = now_ns(self._env)

    def _catch_up(self) -> None:
        """Have all replicas that have tiers make what they have planned up to now."""
        for index, replica in self._up.items():
            if self._role(index) != DECODE:
                replica.catch_up()

    def _send_waiting(self) -> None:
        """Try again to send what waits."""
        waiting = [*self._waiting, *(request for request in self._again if request.id in self._outstanding)]
        self._waiting.clear()
        self._again.clear()
        for request in waiting:
            self.submit(request)
        handing_over = list(self._handing_over)
        self._handing_over.clear()
        for handover in handing_over:
            self._hand_over(handover)

    def _change(self, changes: list[tuple[int, int]]) -> Callable[[simpy.Event], None]:
        """What happens at an instant at which replicas die, are noticed to have died, or come back."""

        def change(_: simpy.Event) -> None:
            if self._is_done():
                return
            lost: list[Request] = []
            for kind, index in changes:
                if kind == _DIES:
                    self._listener.died(index, self._up[index].stop())
                    self._dead.add(index)
                    if self.transfers is not None:
                        self._lost_kv[index] = self.transfers.lost(self._up[index])
                elif kind == _NOTICED:
                    replica = self._up.pop(index)
                    self._dead.remove(index)
                    for seq in replica.unanswered:
                        if not self._goes_on_elsewhere(seq) and seq.seq_id in self._outstanding:
                            is_again = seq.seq_id in self._going_on
                            (self._again if is_again else lost).append(self._outstanding[seq.seq_id])
                            if not is_again:
                                del self._outstanding[seq.seq_id]
                    for request in self._lost_kv.pop(index, ()):
                        assert self.transfers is not None
                        if self.transfers.give_up(request.id):
                            self._again.append(request)
                else:
                    self._begin(index)
            self._waiting.extend(sorted(lost, key=lambda request: request.id))
            self._send_waiting()

        return change

    def _goes_on_elsewhere(self, seq: Sequence) -> bool:
        """Does another replica go on with a request that one had which went on with it? With the KV of its prompt, if
        that is still kept where it was computed."""
        if self.transfers is None or seq.seq_id not in self._going_on or not seq.num_completion_tokens:
            return False
        handover = self.transfers.handovers.get(seq.seq_id)
        if handover is None:
            handover = Handover(self._outstanding[seq.seq_id], None, seq, is_lost=True)
        elif handover.target is None or handover.target[1] is not seq:
            return False
        self._going_on.discard(seq.seq_id)
        handover.target = handover.needs = None
        handover.is_given_up = False
        handover.take_back()
        self._handing_over.append(handover)
        return True

    def check_integrity(self) -> None:
        """Raise AssertionError if a request is still somewhere, or a replica's policies are inconsistent."""
        assert not self._handing_over and not (self.transfers and self.transfers.handovers), "handed over to nobody"
        assert not self._outstanding and not self._waiting, f"unanswered: {[*self._outstanding, *self._waiting]}"
        for index, replica in self._up.items():
            if index in self._dead:
                continue
            replica.core.scheduler.check_integrity()
            left = replica.outstanding_requests, replica.outstanding_tokens
            assert replica.core.is_idle and left == (0, 0), f"replica {replica.index} still has {left}"
            used = replica.core.scheduler.block_manager.num_used_blocks
            assert not used, f"{used} blocks of replica {replica.index} are still held"


def _could_serve(core: Core, seq: Sequence, max_tokens: int) -> bool:
    """Would these policies take in a sequence that has not been added anywhere yet, and make so many tokens?"""
    seq.final_length = min(seq.num_prompt_tokens + max_tokens, core.scheduler.max_model_len)
    return core.scheduler.refusal_of(seq) is None


def _chosen(router: Router, request: Request, replicas: list[Any]) -> Any:
    place = router.choose(request, replicas)
    if not 0 <= place < len(replicas):
        raise InputError(f"the router chose {place}, expected a place from 0 to {len(replicas) - 1}")
    return replicas[place]


class FleetCounts(NamedTuple):
    """What a fleet's replicas do not count: requests that were turned away, and given up; KV from elsewhere."""

    rejected: int
    timed_out: int
    transfers: int = 0
    transfer_bytes: float = 0.0
    tiers: list[dict[str, Any]] | None = None
    leases: list[Lease] | None = None


def simulate_fleet(
    requests: Iterable[Request],
    latencies: Seq[LatencyModel],
    router: Router,
    listener: FleetListener,
    *,
    params: SamplingParams | None = None,
    outages: Iterable[Outage] = (),
    failover_ns: int = 0,
    restarts: Iterable[Restart] = (),
    progress: Callable[[Sequence], None] | None = None,
    step_by_step: bool = False,
    clients: Clients = NOBODY,
    split: Disaggregation | None = None,
    tiers: TierPlan | None = None,
    scaling: Scaling | None = None,
) -> FleetCounts:
    """Replay a trace on a simulated fleet until every request has ended.

    Args:
        latencies: what a step costs, one a replica.
        router: chooses a replica for each request as it arrives.
        listener: builds the policies.
        failover_ns: nanoseconds from a death until the router knows of it.
        restarts: replicas that are drained and restarted.
        progress: called with each sequence that ends; in the order of time, unless the router is blind.
        step_by_step: make every decision by itself, which takes longer; the results are the same.
        clients: see `Clients`; whoever is turned away by one replica tries no other.
        split: who computes prompts and who goes on with them; None: all do both.
        tiers: behind the prefix caches of those who compute prompts.
        scaling: how many replicas are up; None: all, but for outages and restarts, beside which there can be none.

    Raises:
        ValueError: the outages are impossible; an InputError, which is one, if the router's choices are.
    """
    params, outages, restarts = params or SamplingParams(ignore_eos=True), list(outages), list(restarts)
    check_restarts(restarts, outages, len(latencies))
    arrivals = Arrivals(requests)
    is_bound = outages or restarts or split is not None or tiers is not None or scaling is not None
    is_apart = getattr(router, "is_blind", False) and not is_bound and isinstance(requests, Seq)
    if is_apart and all(request.after is None for request in requests):
        # Replicas that know nothing of one another: one after the other, more of what one works with is found in the
        # processor's caches. Eight take a tenth less on the Mooncake trace.
        cores = [listener.begun(index, 0) for index in range(len(latencies))]
        counts = []
        for index, share in enumerate(_shares(arrivals, router, cores, params)):
            found = simulate(
                share,
                cores[index],
                latencies[index],
                params=params,
                announce=lambda request, index=index: listener.sent(request, index),  # type: ignore[misc]
                progress=progress,
                step_by_step=step_by_step,
                acceptance=listener.acceptance(index),
                clients=clients,
            )
            counts.append(found)
        return FleetCounts(sum(rejected for rejected, _ in counts), sum(late for _, late in counts))
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
        failover_ns=failover_ns,
        restarts=restarts,
        is_done=lambda: arrivals.is_empty and not fleet._outstanding and not fleet._waiting,
        step_by_step=step_by_step,
        clients=clients,
        split=split,
        tiers=tiers,
        scaling=scaling,
    )
    feeder = Feeder(env, arrivals, fleet.submit)
    env.run()
    fleet.check_integrity()
    if not arrivals.is_empty:
        raise RuntimeError(f"the simulation stopped at {now_ns(env)} with requests that never arrived")
    of_fleet = FleetCounts(fleet.door.num_rejected, fleet.door.num_timed_out)
    if fleet.transfers is not None:
        of_fleet = of_fleet._replace(transfers=fleet.transfers.num_transfers, transfer_bytes=fleet.transfers.num_bytes)
    if scaling is not None:
        of_fleet = of_fleet._replace(leases=fleet.leases)
    if fleet.tiers is not None:
        of_fleet = of_fleet._replace(tiers=fleet.tiers.summary)
    return of_fleet


def _shares(arrivals: Arrivals, router: Router, cores: list[Core], params: SamplingParams) -> list[list[Request]]:
    """The requests that a blind router sends to each replica."""
    shares: list[list[Request]] = [[] for _ in cores]
    replicas: list[Any] = list(map(_Numbered, range(len(cores))))
    while not arrivals.is_empty:
        request = arrivals.pop()
        seq = request.to_sequence(params)
        able = [replica for replica in replicas if _could_serve(cores[replica.index], seq, seq.max_tokens)]
        shares[_chosen(router, request, able or replicas).index].append(request)
    return shares


@mypyc_attr(native_class=False)
@dataclass(frozen=True)
class _Numbered:
    """What a blind router reads of a replica."""

    index: int
