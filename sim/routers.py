"""Routers: which replica of a fleet serves a request."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Protocol

from twinserve.sim.replica import Replica
from twinserve.traces.request import PrefixKeys, Request, answer_text


class Router(Protocol):
    """Chooses a replica for each request, once, when it arrives; and again if that replica dies.

    What it may read of a replica is what a router can know: `index`, `outstanding_requests`, `kv_use`,
    `outstanding_tokens`, and `cached_prefixes`, which engines tell by events; the last three are worked out when they
    are read. `remaining_tokens` is for oracles, as it knows how long answers will be. A class that reads no more than
    `index` may say so by `is_blind = True`, False where it is missing; one that derives from such a class and reads
    more says `is_blind = False`. Replicas of a blind router can
    be simulated one after the other, which takes less time.
    """

    def choose(self, request: Request, replicas: Seq[Replica]) -> int:
        """The place in `replicas`, which are those that are up and can serve it, or else all that are up, by number."""


class RoundRobin:
    """One after the other; who is down is passed over."""

    is_blind = True

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, replicas: Seq[Replica]) -> int:
        place = next((place for place, replica in enumerate(replicas) if replica.index >= self._next), 0)
        self._next = replicas[place].index + 1
        return place


class RandomChoice:
    """Any, evenly; the same seed chooses the same."""

    is_blind = True

    def __init__(self, seed: int = 0):
        self._draws = random.Random(seed)

    def choose(self, request: Request, replicas: Seq[Replica]) -> int:
        return self._draws.randrange(len(replicas))


class LeastOutstanding:
    """The one with the fewest outstanding tokens, as far as a router knows them; of equal ones the first."""

    def choose(self, request: Request, replicas: Seq[Replica]) -> int:
        return _least_loaded(replicas, range(len(replicas)))


class PowerOfTwo:
    """Of two replicas drawn at random, the one with fewer outstanding tokens (Mitzenmacher, IEEE TPDS 12(10), 2001).

    The same seed draws the same.
    """

    def __init__(self, seed: int = 0):
        self._draws = random.Random(seed)

    def choose(self, request: Request, replicas: Seq[Replica]) -> int:
        places = self._draws.sample(range(len(replicas)), min(2, len(replicas)))
        return _least_loaded(replicas, places)


class LeastKvUse:
    """The one with the smallest share of its KV blocks in use, as the router knows it: by metrics that it reads anew of
    all replicas where they are older than a period, at the arrival of a request; of equal ones the one with the fewest
    outstanding tokens.

    Args:
        period_s: how old what it knows may be; gateways read engines' metrics several times a second.

    Raises:
        ValueError: the period is below 0.
    """

    def __init__(self, period_s: float = 0.05):
        self._period_ns = _nanoseconds("period_s", period_s)
        self._read_ns: int | None = None
        self._known: dict[int, float] = {}

    def choose(self, request: Request, replicas: Seq[Replica]) -> int:
        now_ns = request.arrival_ns
        if self._read_ns is None or now_ns - self._read_ns >= self._period_ns:
            self._read_ns = now_ns
            self._known = {replica.index: replica.kv_use for replica in replicas}
        uses = [(self._known.get(replica.index, 0.0), replica.outstanding_tokens) for replica in replicas]
        return uses.index(min(uses))


class SessionSticky:
    """The replica that the session was sent to last, as long as it is up; else, and without a session, the one with the
    fewest outstanding tokens."""

    def __init__(self) -> None:
        self._replica_of: dict[int, int] = {}

    def choose(self, request: Request, replicas: Seq[Replica]) -> int:
        session = request.session
        if session is not None and (known := self._replica_of.get(session)) is not None:
            for place, replica in enumerate(replicas):
                if replica.index == known:
                    return place
        place = _least_loaded(replicas, range(len(replicas)))
        if session is not None:
            self._replica_of[session] = replicas[place].index
        return place


class LeastRemaining:
    """The one with the fewest tokens still to compute; of equal ones the first. It knows how long answers will be."""

    def choose(self, request: Request, replicas: Seq[Replica]) -> int:
        return min(range(len(replicas)), key=lambda place: replicas[place].remaining_tokens)


class KvEvents:
    """The one with the fewest tokens to compute before the request's first: outstanding ones, and those of the prompt
    that its cache is not known to hold; of equal ones the first. So does Dynamo's router, which weighs both alike.

    What caches hold, engines tell by events, block by block as they are stored and evicted; what was so `delay_s` ago
    is known. It is looked at when requests arrive: known is what was so at the latest arrival that is as long ago.

    Args:
        delay_s: from an event until the router has heard of it.

    Raises:
        ValueError: the delay is below 0.
    """

    def __init__(self, delay_s: float = 0.1):
        self._delay_ns = _nanoseconds("delay_s", delay_s)
        self._seen: deque[tuple[int, dict[int, frozenset[int]]]] = deque()

    def choose(self, request: Request, replicas: Seq[Replica]) -> int:
        now_ns, seen = request.arrival_ns, self._seen
        seen.append((now_ns, {replica.index: replica.cached_prefixes for replica in replicas}))
        while len(seen) > 1 and seen[1][0] <= now_ns - self._delay_ns:
            seen.popleft()
        known = seen[0][1] if seen[0][0] <= now_ns - self._delay_ns else {}
        none: frozenset[int] = frozenset()
        loads = [
            replica.outstanding_tokens - replica.num_hit_tokens(request, known.get(replica.index, none))
            for replica in replicas
        ]
        return loads.index(min(loads))


class PrefixAffine:
    """The replica that was sent the longest prefix of the prompt before, unless it has too much to do.

    The router remembers to which replica each prefix, in whole blocks, went last; beyond 32 blocks, the prefixes that
    end at every 32nd. It does not know what the replicas' caches still hold. Where no prefix is known, or the replica
    is down or has more than `max_lead_tokens` outstanding tokens more than the least loaded one, the request goes to
    the least loaded one, and its prefixes with it.

    Args:
        max_lead_tokens: outstanding tokens that a cached prefix is worth waiting for.
        block_tokens: of a block of the replicas' caches.
        most_prefixes: so many are remembered; the least recently used is forgotten first.

    Raises:
        ValueError: one of them is out of range.
    """

    def __init__(self, max_lead_tokens: int = 32_768, block_tokens: int = 16, most_prefixes: int = 1 << 20):
        for name, value, least in (
            ("max_lead_tokens", max_lead_tokens, 0),
            ("block_tokens", block_tokens, 1),
            ("most_prefixes", most_prefixes, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, expected an integer >= {least}")
        self._max_lead_tokens, self._block_tokens, self._most_prefixes = max_lead_tokens, block_tokens, most_prefixes
        self._sent: OrderedDict[tuple[str, int], int] = OrderedDict()

    def choose(self, request: Request, replicas: Seq[Replica]) -> int:
        key_of = PrefixKeys(request.parts, answer_text(request.id))
        block, most = self._block_tokens, 32 * self._block_tokens
        ends = (
            range(block, min(most, request.prompt_tokens) + 1, block),
            range(2 * most, request.prompt_tokens + 1, most),
        )
        keys = [(request.salt, key) for part in ends for key in key_of.each(part)]
        tokens = [replica.outstanding_tokens for replica in replicas]
        least = tokens.index(min(tokens))
        place = self._known(keys, replicas)
        if place is None or tokens[place] - tokens[least] > self._max_lead_tokens:
            place = least
        for key in keys:
            self._sent[key] = replicas[place].index
            self._sent.move_to_end(key)
        while len(self._sent) > self._most_prefixes:
            self._sent.popitem(last=False)
        return place

    def _known(self, keys: list[tuple[str, int]], replicas: Seq[Replica]) -> int | None:
        """The place of the replica that has the longest of these prefixes, if it is up."""
        for key in reversed(keys):
            if (index := self._sent.get(key)) is not None:
                return next((place for place, replica in enumerate(replicas) if replica.index == index), None)
        return None


def _nanoseconds(name: str, seconds: float) -> float:
    """A router's parameter; ValueError, with its name, if it is below 0."""
    if not seconds >= 0:
        raise ValueError(f"{name} is {seconds}, expected seconds >= 0")
    return seconds * 1e9


def _least_loaded(replicas: Seq[Replica], places: Iterable[int]) -> int:
    """Of these places the one whose replica has the fewest outstanding tokens; of equal ones the first."""
    return min(places, key=lambda place: replicas[place].outstanding_tokens)


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "random": RandomChoice,
    "least-outstanding": LeastOutstanding,
    "power-of-two": PowerOfTwo,
    "least-kv-use": LeastKvUse,
    "session-sticky": SessionSticky,
    "oracle-least-remaining": LeastRemaining,
    "prefix-affine": PrefixAffine,
    "kv-events": KvEvents,
}
SEEDED: dict[str, Callable[[int], Router]] = {"random": RandomChoice, "power-of-two": PowerOfTwo}
"""Those that draw at random."""
