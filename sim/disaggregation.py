"""Prefill and decode on separate replicas (DistServe, OSDI 2024; Splitwise, ISCA 2024): whose KV lies where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import simpy
from mypy_extensions import mypyc_attr

from twinserve.policies import Sequence
from twinserve.sim.clock import alarm, now_ns
from twinserve.sim.links import Link, Ports
from twinserve.sim.replica import Replica
from twinserve.sim.routers import Router
from twinserve.traces.request import Request
from twinserve.traces.runs.metrics import DECODE, PREFILL

ROLES = (BOTH := "both", PREFILL, DECODE)
_ARRIVED = 1_500_000  # once steps have ended at that instant, and before anything is decided


@mypyc_attr(native_class=False)  # it may be pickled
@dataclass(frozen=True)
class Disaggregation:
    """Which replicas compute prompts, and which ones what follows their first tokens.

    Attributes:
        roles: of each replica, one of ROLES.
        bytes_per_token: of the KV of each replica.
        link: what KV goes over.
        router: chooses who goes on with a request.
        num_layers: of a model each of whose layers is sent as soon as it is computed, into a buffer of the receiver;
            None: what the receiver's pool lacks is sent once the prompt is computed and there are blocks for it.
    """

    roles: tuple[str, ...]
    bytes_per_token: tuple[float, ...]
    link: Link
    router: Router
    num_layers: int | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of it."""
        names = ("roles", "bytes_per_token", "num_layers")
        return {name: getattr(self, name) for name in names} | {"link": asdict(self.link)}


@dataclass
class Handover:
    """A request whose prompt one replica computes, and that another one goes on with.

    Attributes:
        source: where the KV of the prompt lies; None while it is computed again.
        computed: the sequence that ended there.
        target: who goes on with it, and the sequence there; None before that is known.
        needs: tokens of the prompt that the target's pool has, and with those that it waits for; None before it has
            blocks for them.
        number: of the latest transfer; an older one arrives in vain.
        is_sent, is_there: has that been asked for, has it ended?
        is_lost: nobody has the KV: who goes on computes it again.
        is_given_up: who goes on waits for nothing, and has no blocks for the KV, until that is computed again.
    """

    request: Request
    source: Replica | None
    computed: Sequence
    target: tuple[Replica, Sequence] | None = None
    needs: tuple[int, int] | None = None
    number: int = 0
    is_sent: bool = False
    is_there: bool = False
    is_lost: bool = False
    is_given_up: bool = False

    def take_back(self) -> None:
        """What was sent is lost."""
        self.number += 1
        self.is_sent = self.is_there = False


class Transfers:
    """Moves the KV of prompts from those who computed it to those who go on with it.

    The source keeps its blocks until all has arrived.

    Args:
        released: called with a replica that keeps a request's KV no longer.

    Attributes:
        handovers: by request.
        num_bytes, num_transfers: that were sent.
    """

    def __init__(self, env: simpy.Environment, split: Disaggregation, released: Callable[[Replica], None]):
        self._env, self._split, self._released = env, split, released
        self._ports = Ports(split.link)
        self.handovers: dict[int, Handover] = {}
        self.num_bytes = 0.0
        self.num_transfers = 0

    def holds(self, replica: Replica) -> bool:
        """Does a replica keep anybody's KV?"""
        return any(one.source is replica for one in self.handovers.values())

    def find(self, seq: Sequence, num_tokens: int) -> int:
        """The KV of a request's prompt lies elsewhere where it goes on, until it has come from there, or is there."""
        handover = self.handovers.get(seq.seq_id)
        if handover is None or handover.target is None or handover.target[1] is not seq:
            return 0
        if num_tokens >= seq.num_prompt_tokens:
            self.forget(seq.seq_id)
            return 0
        return seq.num_prompt_tokens

    def has_blocks(self, seq: Sequence, num_tokens: int, found: int) -> None:
        """A sequence has blocks where it goes on, for the KV of its tokens from `num_tokens` to `found`."""
        handover = self.handovers[seq.seq_id]
        handover.needs = num_tokens, found
        self.send(handover)

    def send(self, handover: Handover) -> None:
        """Begin a transfer as soon as it can be, or end one that had to wait for blocks."""
        source, target, needs, layers = handover.source, handover.target, handover.needs, self._split.num_layers
        if handover.is_given_up and source is not None and target is not None:
            handover.is_given_up = False
            target[0].tell("found", target[1])
        if handover.is_there:
            self._at(now_ns(self._env), handover)
        if handover.is_sent or source is None or target is None or (needs is None and layers is None):
            return
        handover.is_sent = True
        now, link = now_ns(self._env), self._split.link
        first, end = (0, int(handover.computed.num_prompt_tokens)) if needs is None or layers is not None else needs
        num_bytes = (end - first) * self._split.bytes_per_token[source.index]
        self.num_bytes += num_bytes
        self.num_transfers += 1
        ready_ns, last_ns = now, 0
        if layers is not None:
            begun_ns, ended_ns = handover.computed.first_scheduled_ns or 0, handover.computed.finish_ns or now
            if ended_ns == now:
                ready_ns = begun_ns + (ended_ns - begun_ns) // layers
                last_ns = ended_ns + link.duration_ns(num_bytes / layers) + link.latency_ns
        _, there_ns = self._ports.transfer(source.index, target[0].index, num_bytes, ready_ns)
        self._at(max(there_ns, last_ns), handover)

    def _at(self, there_ns: int, handover: Handover) -> None:
        number = handover.number
        alarm(self._env, there_ns, _ARRIVED, lambda _: self._arrived(handover, number))

    def _arrived(self, handover: Handover, number: int) -> None:
        if handover.number != number or handover.target is None:
            return
        handover.is_there = True
        if handover.needs is not None:
            replica, seq = handover.target
            replica.tell("loaded", seq)
            self.forget(handover.request.id)

    def forget(self, request_id: int) -> None:
        """A request's KV is where it is needed, or needed no longer."""
        handover = self.handovers.pop(request_id, None)
        if handover is None:
            return
        handover.take_back()
        if handover.source is not None:
            handover.source.release(request_id)
            self._released(handover.source)

    def give_up(self, request_id: int) -> bool:
        """A request's KV is known to be lost; does anybody still need it? Who has blocks for it gives them back, and
        who waits for some gets none until it is computed again, as the replica that computes it may have to wait for
        others that need them."""
        handover = self.handovers.get(request_id)
        if handover is None:
            return False
        if handover.target is not None:
            handover.needs, handover.is_given_up = None, True
            handover.target[0].tell("lost", handover.target[1])
        return True

    def lost(self, replica: Replica) -> list[Request]:
        """A replica has died: the requests whose KV it kept, which has to be computed again."""
        lost = []
        for handover in self.handovers.values():
            if handover.source is replica:
                handover.source = None
                handover.take_back()
                lost.append(handover.request)
        return lost
