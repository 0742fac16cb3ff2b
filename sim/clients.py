"""Clients and the door of an engine: who is turned away as too many are inside, and who gives up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import simpy
from mypy_extensions import mypyc_attr

from twinserve.policies import SamplingParams, Sequence
from twinserve.sim.clock import alarm, now_ns
from twinserve.traces.request import Request

REJECTED = "rejected"
"""How a request ends that no engine has taken in."""
_GIVES_UP = 2_500_000  # once the steps of that instant have ended, and before anything is decided


class Engine(Protocol):
    """What a door has to know of a replica, see `Replica`."""

    outstanding_requests: int

    @property
    def outstanding_tokens(self) -> int:
        """Prompts without a first token, and one token a request."""

    def abort(self, seq_id: int) -> None:
        """End a request at the next decision."""


@mypyc_attr(native_class=False)  # it may be pickled
@dataclass(frozen=True)
class Clients:
    """What the engine's door and clients do of which its policies see no more than aborts.

    Attributes:
        max_num_queued_reqs: a request is turned away, with HTTP 503, where so many have not ended; vLLM 0.33's.
        max_num_queued_tokens: and where the prompts without a first token have so many tokens; vLLM 0.33's, which
            takes off neither chunks that are computed nor cached tokens (`AsyncLLM.check_admission`).
        timeout_ns: nanoseconds from its arrival after which a client gives up: its request is aborted at the next
            decision.
    """

    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    timeout_ns: int | None = None

    def turn_away(self, replica: Engine) -> bool:
        """Is one request more too many for a replica?"""
        most, most_tokens = self.max_num_queued_reqs, self.max_num_queued_tokens
        if most is not None and replica.outstanding_requests >= most:
            return True
        return most_tokens is not None and replica.outstanding_tokens - replica.outstanding_requests >= most_tokens


NOBODY = Clients()


class Door:
    """Lets requests in to replicas, and has those aborted whose clients give up.

    Args:
        rejected: called with the sequence of each request that is turned away, which has ended then.

    Attributes:
        num_rejected, num_timed_out: requests that were turned away, and given up.
    """

    def __init__(
        self, env: simpy.Environment, clients: Clients, params: SamplingParams, rejected: Callable[[Sequence], None]
    ):
        self._env, self._clients, self._params, self._rejected = env, clients, params, rejected
        self._at: dict[int, Engine] = {}  # of each request that has not ended, where it is
        self._late: set[int] = set()
        self.num_rejected = self.num_timed_out = 0

    def opens(self, request: Request, replica: Engine) -> bool:
        """Is a request let in? If not, it has ended. One that an engine had before is not turned away."""
        if request.id not in self._at and self._clients.turn_away(replica):
            self.num_rejected += 1
            seq = request.to_sequence(self._params)
            seq.finish_reason, seq.refusal = REJECTED, "too many requests"
            self._rejected(seq)
            return False
        return True

    def submitted(self, request: Request, replica: Engine) -> None:
        """A request has been submitted, to the replica that is to end it; its client may give up."""
        is_new = request.id not in self._at
        self._at[request.id] = replica
        if self._clients.timeout_ns is None:
            return
        if request.id in self._late:
            replica.abort(request.id)
        elif is_new:
            due_ns = max(request.arrival_ns + self._clients.timeout_ns, now_ns(self._env))
            alarm(self._env, due_ns, _GIVES_UP, lambda _, number=request.id: self._give_up(number))  # type: ignore[misc]

    def ended(self, seq: Sequence) -> None:
        """A request has ended."""
        self._at.pop(seq.seq_id, None)
        self.num_timed_out += seq.seq_id in self._late and seq.finish_reason == "abort"

    def _give_up(self, number: int) -> None:
        replica = self._at.get(number)
        if replica is not None:
            self._late.add(number)
            replica.abort(number)
