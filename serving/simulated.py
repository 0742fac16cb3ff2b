"""Simulated replicas that answer in real time, and the stand-in text of its answers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import simpy
from simpy.events import URGENT

from twinserve.engine.live import BuildCore, Live
from twinserve.engine.online import Abort, Clock
from twinserve.policies import CoreListener, Sequence
from twinserve.sim.clock import alarm, now_ns
from twinserve.sim.latency import LatencyModel
from twinserve.sim.replica import Replica
from twinserve.sim.routers import Router
from twinserve.sim.speculation import Acceptance
from twinserve.traces.request import Request

_PIECE = re.compile(rb"\n|[^\S\n]?\S{1,3}|\S{1,4}|\s")
_WORDS = [
    b" one", b" two", b" six", b" ten", b" sun", b" sky", b" sea", b" ice", b" oak", b" elm", b" fox", b" owl",
    b" ant", b" bee", b" hat", b" map", b" key", b" cup", b" day", b" way", b" joy", b" art", b" ink", b" pen",
]  # fmt: skip


class StandInTokenizer:
    """A tokenizer without a vocabulary: a token is up to four bytes of text, mostly of one word.

    Text that is split at a token's border and encoded again gives the same tokens where the next begins with a space or
    a newline, so that the answers of `stand_in` are found again in the next turn of a conversation.
    """

    eos_token_id = None
    chat_template = "<ROLE>, a line break, what is said and a line break, for each message"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int.from_bytes(piece, "big") for piece in _PIECE.findall(text.encode())]

    def decode(self, token_ids: Seq[int], skip_special_tokens: bool = True) -> str:
        pieces = [token_id.to_bytes((token_id.bit_length() + 7) // 8 or 1, "big") for token_id in token_ids]
        return b"".join(pieces).decode(errors="replace")

    def apply_chat_template(
        self, messages: Seq[dict[str, Any]], add_generation_prompt: bool = True, **_: Any
    ) -> list[int]:
        said = "".join(f"<{message['role']}>\n{message['content']}\n" for message in messages)
        return self.encode(said + "<assistant>\n" * add_generation_prompt)


def stand_in(request_id: int, places: range) -> list[int]:
    """Tokens of an answer that says nothing, at these places: a word each, by the request's number."""
    words = [_WORDS[(request_id * 7 + place * (1 + request_id % 5)) % len(_WORDS)] for place in places]
    return [int.from_bytes(word if place else word.strip(), "big") for place, word in zip(places, words, strict=True)]


class ScaledClock(Clock):
    """Nanoseconds of a simulation, each of which takes `time_scale` on the wall."""

    def __init__(self, time_scale: float):
        super().__init__()
        self.time_scale = time_scale

    def __call__(self) -> int:
        return round(super().__call__() / self.time_scale)


class LiveReplicas(Live):
    """Simulated replicas whose requests come in as they are sent, and whose steps end when they are due.

    A request arrives when it is submitted, to the nanosecond, whatever this process does just then: only what it says
    comes later, by `lag_s`. So a simulation of what arrived decides the same.

    Args:
        latencies: what a step costs, one a Core. acceptances: what comes of drafts, likewise.
        router: chooses a replica for each request.
        time_scale: a simulated second takes so many on the wall.
        routed: told of each sequence which request it is, and the number of its replica, just before it comes in.

    Attributes:
        requests: of the sequences that are submitted, to be put in before them; those that are routed are taken out.
        lag_s: by how much the latest steps were simulated later than they were due, in seconds on the wall.
    """

    def __init__(
        self,
        build_cores: Seq[BuildCore],
        latencies: Seq[LatencyModel],
        router: Router,
        listeners: Seq[CoreListener] = (),
        *,
        acceptances: Seq[Acceptance | None] | None = None,
        time_scale: float = 1.0,
        routed: Callable[[Sequence, Request, int], None],
    ):
        super().__init__(build_cores, listeners)
        self.clock: ScaledClock = ScaledClock(time_scale)
        self.requests: dict[Sequence, Request] = {}
        self.lag_s = 0.0
        self._latencies, self._router, self._routed = latencies, router, routed
        self._acceptances = [None] * len(latencies) if acceptances is None else acceptances

    def walk(self) -> None:
        env = simpy.Environment()
        replicas = [
            Replica(env, core, latency, lambda seq: None, index=index, step_by_step=True, acceptance=acceptance)
            for index, (core, latency, acceptance) in enumerate(
                zip(self.cores, self._latencies, self._acceptances, strict=True)
            )
        ]
        while not (self.inbox.closed and self.is_idle and env.peek() == float("inf")):
            due_ns = env.peek()
            items = self._wait(due_ns)
            with self._lock:
                items += self.inbox.take(wait=False)
                until_ns = self.clock()
            for item in items:
                if isinstance(item, Abort):
                    for replica in replicas:
                        replica.abort(item.seq_id)
                else:
                    _run(env, item.arrival_ns)
                    request = self.requests.pop(item)
                    place = self._router.choose(request, replicas)
                    self._routed(item, request, place)
                    replicas[place].submit(item)
            _run(env, until_ns)
            self.lag_s = self._wall_s(self.clock() - due_ns) if due_ns < until_ns else 0.0

    def _wait(self, due_ns: float) -> list[Sequence | Abort]:
        """Wait until something comes in, or the simulation's next event is due; what has come in."""
        wait_s = None if due_ns == float("inf") else max(0.0, self._wall_s(due_ns - self.clock()))
        if not self.inbox.closed:
            return self.inbox.take(wait=True, timeout_s=wait_s)
        time.sleep(wait_s or 0.0)
        return []

    def _wall_s(self, span_ns: float) -> float:
        return span_ns * self.clock.time_scale / 1e9


def _run(env: simpy.Environment, until_ns: int) -> None:
    """Let what is due before `until_ns` happen."""
    if until_ns > now_ns(env):
        alarm(env, until_ns, URGENT)
        while now_ns(env) < until_ns:
            env.step()
