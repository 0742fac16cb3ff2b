"""Transforms: explicit changes to a trace, each counted and written down in the run record.

Each takes requests with the ids 0, 1, 2... in the order of their arrival, as readers and generator give them, returns
such requests, and appends to a log `{"transform": name, "parameters": {...}, "changed": {what: how many, ...}}`. The
log says all that a stranger needs to make the same requests from the same trace. Errors name the option of
`TraceOptions` that asks for a transform.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import groupby, pairwise, repeat
from typing import Any

from twinserve.settings.errors import InputError
from twinserve.traces.lines import LATEST_NS
from twinserve.traces.request import Part, Request, answer_text
from twinserve.traces.requests import Requests, as_requests

TransformLog = list[dict[str, Any]]


def window(requests: Seq[Request], start_s: float, end_s: float, log: TransformLog) -> Seq[Request]:
    """The requests that arrive in [start_s, end_s), in seconds from the first arrival; start_s becomes time 0.

    What a request held of the answer of one before the window becomes text that its conversation alone has, and it no
    longer waits for it.

    Raises:
        InputError: the window is empty.
    """
    asked = f"{start_s:g}:{end_s:g}"
    require(0 <= start_s < math.inf, "window_s", asked, "a START in seconds >= 0")
    require(start_s < end_s, "window_s", asked, "an END behind its START")
    origin_ns = requests[0].arrival_ns + round(start_s * 1e9)
    length_ns = math.inf if end_s == math.inf else round(end_s * 1e9) - round(start_s * 1e9)
    moved = (request._replace(arrival_ns=request.arrival_ns - origin_ns) for request in requests)
    kept = Requests(request for request in moved if 0 <= request.arrival_ns < length_ns)
    require(bool(kept), "window_s", asked, "at least one request in it")
    orphaned = sum(request.after is not None and request.after < kept[0].id for request in kept.others.values())
    changed = {"requests_dropped": len(requests) - len(kept), "requests_cut_from_their_past": orphaned}
    _write(log, "window", {"start_s": start_s, "end_s": None if end_s == math.inf else end_s}, changed)
    return renumbered(kept)


def limit(requests: Seq[Request], num_requests: int, log: TransformLog) -> Seq[Request]:
    """The first `num_requests` requests.

    Raises:
        InputError: `num_requests` is less than 1.
    """
    require(num_requests >= 1, "limit", num_requests, "an integer >= 1")
    kept = requests[:num_requests]
    _write(log, "limit", {"num_requests": num_requests}, {"requests_dropped": len(requests) - len(kept)})
    return kept


def scale_rate(requests: Seq[Request], factor: float, log: TransformLog) -> Seq[Request]:
    """Arrivals `factor` times as dense: each time divided by it and rounded to a nanosecond.

    Where requests wait for answers, sessions begin so much denser, and within a session nothing moves: how long its
    turns take is the users' and the server's.

    Raises:
        InputError: `factor` is not a number above 0, or so small that times are beyond 63 bits; or there are sessions,
            and all begin at one instant.
    """
    require(0 < factor < math.inf, "rate_scale", factor, "a number > 0")
    least = requests[-1].arrival_ns / LATEST_NS
    require(factor > least, "rate_scale", factor, f"a number > {least:.3g}, so that times have at most 63 bits")
    if all(request.after is None for request in as_requests(requests).others.values()):
        return _at(requests, (round(r.arrival_ns / factor) for r in requests), "scale_rate", {"factor": factor}, log)
    begins = session_begins(requests)
    at_once = len(begins) > 1 and len(set(begins.values())) == 1
    words = "1, as all sessions begin at one instant: session_rate has them begin at random"
    require(not at_once or factor == 1, "rate_scale", factor, words)
    moved = [
        request._replace(arrival_ns=request.arrival_ns - begin + round(begin / factor))
        for request, begin in zip(requests, map(begins.__getitem__, session_keys(requests)), strict=True)
    ]
    num_moved = sum(map(bool, begins.values()))
    changed = {"arrivals_moved": _count_changed(requests, moved), "sessions_moved": num_moved}
    _write(log, "scale_rate", {"factor": factor}, changed)
    return renumbered(sorted(moved, key=lambda request: request.arrival_ns))


def session_keys(requests: Seq[Request]) -> list[int]:
    """Of each request the first of those that it belongs to: of its session, or of those that wait for one another."""
    of_session: dict[int, int] = {}
    keys: list[int] = []
    for request in requests:
        key = request.id if request.after is None else keys[request.after]
        if request.session is not None:
            key = of_session.setdefault(request.session, key)
        keys.append(key)
    return keys


def session_begins(requests: Seq[Request]) -> dict[int, int]:
    """When each session begins, in nanoseconds, by its first request; a request without one is one of its own."""
    begins: dict[int, int] = {}
    for request, key in zip(requests, session_keys(requests), strict=True):
        begins.setdefault(key, request.arrival_ns)
    return begins


def all_at_zero(requests: Seq[Request], log: TransformLog) -> Seq[Request]:
    """Every request arrives at 0; those with `after` still wait for the answer before them."""
    return _at(requests, repeat(0, len(requests)), "all_at_zero", {}, log)


def spread(requests: Seq[Request], seed: int, log: TransformLog) -> Seq[Request]:
    """Arrivals that were recorded in coarse steps, spread out again.

    The requests of an instant get times drawn uniformly within a step of the clock from it on, sorted, in the order of
    the file; so a time in which nothing came stays empty. Raw, such a trace arrives in bursts that its users never
    made. The step is the commonest time between two instants, the shortest of those.

    Args:
        seed: another seed, other times.
    """
    rng = random.Random(seed)
    instants = sorted({request.arrival_ns for request in requests})
    gaps = Counter(following - instant for instant, following in pairwise(instants))
    step_ns = min(gaps, key=lambda gap: (-gaps[gap], gap), default=1_000_000_000)
    # A clock's steps are not quite equal; what is much longer is several of them.
    widths = {instant: following - instant for instant, following in pairwise(instants)}
    widths = {instant: width if 2 * width < 3 * step_ns else step_ns for instant, width in widths.items()}
    times_ns = array("q")
    for instant_ns, group in groupby(request.arrival_ns for request in requests):
        width_ns = widths.get(instant_ns, step_ns)
        times_ns.extend(sorted(rng.randrange(instant_ns, instant_ns + width_ns) for _ in group))
    return _at(requests, times_ns, "spread", {"seed": seed, "step_s": step_ns / 1e9}, log)


def shuffle(requests: Seq[Request], seed: int, log: TransformLog) -> Seq[Request]:
    """The same arrival times and the same requests, dealt to each other at random: bursts and lengths stay.

    Args:
        seed: another seed, another order.

    Raises:
        InputError: a request waits for another's answer, so that their order means something.
    """
    waiting = sum(request.after is not None for request in requests)
    require(not waiting, "shuffle_seed", seed, f"a trace without turns; {waiting} requests wait for an answer")
    order = random.Random(seed).sample(range(len(requests)), len(requests))
    moved = [
        requests[number]._replace(arrival_ns=request.arrival_ns)
        for number, request in zip(order, requests, strict=True)
    ]
    changed = {"arrivals_moved": sum(number != place for place, number in enumerate(order))}
    _write(log, "shuffle", {"seed": seed}, changed)
    return renumbered(moved)


def start_sessions(requests: Seq[Request], rate: float, seed: int, log: TransformLog) -> Seq[Request]:
    """Sessions that begin at random, with exponential gaps, the first one at 0; within a session nothing moves.

    Some traces do not say when a session began. A request without a session that waits for none is one of its own.

    Args:
        rate: sessions per second.
        seed: another seed, other times.

    Raises:
        InputError: `rate` is not a number above 0.
    """
    require(0 < rate < math.inf, "session_rate", rate, "sessions per second > 0")
    rng = random.Random(seed)
    shifts_ns: dict[int, int] = {}
    next_s = 0.0
    moved = []
    for request, key in zip(requests, session_keys(requests), strict=True):
        if key not in shifts_ns:
            least = next_s * 1e9 / LATEST_NS
            require(least < 1, "session_rate", rate, "so many sessions per second that times have at most 63 bits")
            shifts_ns[key] = round(next_s * 1e9) - request.arrival_ns
            next_s += rng.expovariate(rate)
        moved.append(request._replace(arrival_ns=request.arrival_ns + shifts_ns[key]))
    changed = {"arrivals_moved": _count_changed(requests, moved)}
    _write(log, "start_sessions", {"rate": rate, "seed": seed}, changed)
    return renumbered(sorted(moved, key=lambda request: request.arrival_ns))


def cap_prompt_tokens(requests: Seq[Request], most: int, log: TransformLog) -> Seq[Request]:
    """Prompts of at most `most` tokens: longer ones keep their first tokens, and so the prefixes they share.

    Raises:
        InputError: `most` is less than 1.
    """
    require(most >= 1, "max_prompt_tokens", most, "an integer >= 1")
    capped = Requests(request._replace(parts=_head(request.parts, most)) for request in requests)
    _write(log, "cap_prompt_tokens", {"most": most}, {"prompts_shortened": _count_changed(requests, capped)})
    return capped


def cap_output_tokens(requests: Seq[Request], most: int, log: TransformLog) -> Seq[Request]:
    """Answers of at most `most` tokens; prompts that hold such an answer hold what is left of it.

    Raises:
        InputError: `most` is less than 1.
    """
    require(most >= 1, "max_output_tokens", most, "an integer >= 1")
    capped = Requests(request._replace(max_tokens=min(request.max_tokens, most)) for request in requests)
    lengths = {request.id: request.max_tokens for request in capped} if capped.others else {}
    resolved = Requests(request.resolved(lengths) for request in capped)
    changed = {
        "outputs_shortened": _count_changed(requests, capped),
        "prompts_with_shortened_answers": _count_changed(capped, resolved),
    }
    _write(log, "cap_output_tokens", {"most": most}, changed)
    return resolved


def renumbered(requests: Seq[Request]) -> Seq[Request]:
    """The requests with ids 0, 1, 2... in the given order, and references to them changed alike.

    A reference to a request that is not among them: `after` becomes None, and the parts of its answer become parts of
    a text that nothing else in the trace has (one text an answer, so that later turns still share it).
    """
    said = as_requests(requests).others.values()
    if all(request.after is None and all(part.text >= 0 for part in request.parts) for request in said):
        return Requests(request._replace(id=index) for index, request in enumerate(requests))
    new_ids = {request.id: index for index, request in enumerate(requests)}
    texts = {answer_text(old): answer_text(new) for old, new in new_ids.items()}
    next_text = 1 + max((part.text for request in requests for part in request.parts), default=0)
    for request in requests:
        for part in request.parts:
            if part.text < 0 and part.text not in texts:
                texts[part.text] = next_text
                next_text += 1
    return [
        request._replace(
            id=new_ids[request.id],
            parts=tuple(part._replace(text=texts.get(part.text, part.text)) for part in request.parts),
            after=None if request.after is None else new_ids.get(request.after),
            think_ns=request.think_ns if request.after in new_ids else 0,
        )
        for request in requests
    ]


def require(holds: bool, field: str, value: object, expected: str) -> None:
    """Raise an InputError that names field, value and what was expected, unless the condition holds."""
    if not holds:
        raise InputError(f"expected {expected}", field=field, value=value)


def _at(
    requests: Seq[Request], times_ns: Iterable[int], name: str, parameters: dict[str, Any], log: TransformLog
) -> Seq[Request]:
    """The requests at other times, which keep their order."""
    moved = Requests(request._replace(arrival_ns=time) for request, time in zip(requests, times_ns, strict=True))
    _write(log, name, parameters, {"arrivals_moved": _count_changed(requests, moved)})
    return moved


def _head(parts: Seq[Part], most: int) -> tuple[Part, ...]:
    """The parts of the first `most` tokens."""
    head = []
    for part in parts:
        if most <= 0:
            break
        head.append(part._replace(length=min(part.length, most)))
        most -= part.length
    return tuple(head)


def _count_changed(before: Iterable[Request], after: Iterable[Request]) -> int:
    return sum(old != new for old, new in zip(before, after, strict=True))


def _write(log: TransformLog, name: str, parameters: dict[str, Any], changed: dict[str, int]) -> None:
    log.append({"transform": name, "parameters": parameters, "changed": changed})
