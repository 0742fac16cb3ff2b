"""Generator: synthetic requests, the same for the same arguments and seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST_PARTS, MOST_REQUESTS, MOST_TOKENS, plain
from twinserve.traces.lines import LATEST_NS
from twinserve.traces.readers import read_trace
from twinserve.traces.request import Part, Request, answer_text
from twinserve.traces.transforms import renumbered, require

MOST_CV = 1e3
"""Coefficient of variation of what is drawn."""
Arrivals = Literal["poisson", "gamma", "burst", "mmpp", "diurnal"]

_LENGTH_FORMS = "fixed:N or lognormal:MEAN:CV[:MIN:MAX], in tokens, or empirical:FILE"


@dataclass(frozen=True)
class LengthSpec:
    """How many tokens something has: always `mean`, or drawn from a lognormal distribution.

    Attributes:
        mean: mean of the distribution before rounding and clipping, in tokens.
        cv: its standard deviation divided by its mean; 0 makes the length fixed.
        low, high: draws are clipped to these.
    """

    mean: float
    cv: float = 0.0
    low: int = 1
    high: int = 1 << 20

    @classmethod
    def parse(cls, text: str, field: str | None = None) -> LengthSpec:
        """The spec that "fixed:N" or "lognormal:MEAN:CV[:MIN:MAX]" says.

        Args:
            field: the setting that holds the text, for the error.

        Raises:
            InputError: the text is neither, or a number in it is out of range.
        """
        kind, *values = text.split(":")
        try:
            if kind == "fixed" and len(values) == 1:
                spec = cls(int(plain(values[0])))
            elif kind == "lognormal" and len(values) in (2, 4):
                mean, cv, *ends = map(plain, values)
                spec = cls(float(mean), float(cv), *map(int, ends))
            else:
                raise ValueError(kind)
        except ValueError as error:
            raise InputError(f"expected {_LENGTH_FORMS}", field=field, value=text) from error
        if not (1 <= spec.low <= spec.mean <= spec.high and 0 <= spec.cv <= MOST_CV):
            bounds = f"1 <= MIN ({spec.low}) <= mean <= MAX ({spec.high}) and CV from 0 to {MOST_CV:g}"
            raise InputError(f"expected {bounds}", field=field, value=text)
        return spec

    def draw(self, rng: random.Random) -> int:
        """One length: exp(N(ln mean - s^2/2, s^2)) with s^2 = ln(1 + cv^2), rounded and clipped."""
        if not self.cv:
            return round(self.mean)
        variance = math.log1p(self.cv**2)
        drawn = rng.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance))
        return round(min(max(drawn, self.low), self.high))


@dataclass(frozen=True)
class EmpiricalLengths:
    """Lengths drawn from those of a trace's requests, each as likely as any other.

    Attributes:
        values: in tokens, by request.
        sha256: of the trace.
    """

    values: tuple[int, ...]
    sha256: str

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return self.values[rng.randrange(len(self.values))]


Lengths = LengthSpec | EmpiricalLengths


def parse_lengths(text: str, field: Literal["prompt_tokens", "output_tokens"]) -> Lengths:
    """The lengths that `text` says: what `LengthSpec.parse` takes, or "empirical:FILE", those of a trace.

    Args:
        field: whether they are of prompts or of outputs.

    Raises:
        InputError: the text is neither, or the trace cannot be read.
    """
    kind, _, path = text.partition(":")
    if kind != "empirical" or not path:
        return LengthSpec.parse(text, field)
    trace = read_trace(Path(path))
    prompts = field == "prompt_tokens"
    values = (request.prompt_tokens if prompts else request.max_tokens for request in trace.requests)
    return EmpiricalLengths(tuple(values), trace.sha256)


def generate(
    *,
    seed: int,
    num_requests: int,
    rate: float,
    prompt_tokens: Lengths,
    output_tokens: Lengths,
    arrivals: Arrivals = "poisson",
    cv: float = 1.0,
    burst_size: int = 1,
    peak: float = 2.0,
    period_s: float = 86_400.0,
    users: int = 0,
    priority_shares: Seq[float] = (),
    num_system_prompts: int = 0,
    system_prompt_tokens: int = 0,
    turns: int = 1,
    think_time_s: float = 0.0,
) -> list[Request]:
    """Synthetic requests in the order of their arrival; the first one at 0, that of a user after a think time.

    Conversations of `turns` requests begin at random times. A later turn's prompt is the prompt before it, the answer
    to that, and new text; it arrives a think time after that answer is complete.
    Each aspect has a random stream of its own: another rate leaves the lengths as they are.

    Args:
        seed: another seed, other requests.
        num_requests: how many, all turns counted.
        rate: requests per second in the long run, all turns counted; conversations begin at `rate / turns`.
        prompt_tokens: new text of a turn; system prompt and earlier turns come on top.
        output_tokens: what a request asks for. If both are of the same trace, a request has the two lengths of one of
            its requests.
        arrivals: "poisson", "gamma" (gaps with coefficient of variation `cv`), "burst" (`burst_size` conversations at
            the same instant, bursts at exponential gaps), "mmpp" (a Poisson process modulated by two states: Fischer
            and Meier-Hellstern, Performance Evaluation 18, 1993), or "diurnal" (one whose rate is a sine, from its
            least on).
        cv: standard deviation of the gaps divided by their mean; for "gamma".
        burst_size: conversations in a burst; for "burst".
        peak: the highest rate divided by the mean; for "mmpp", in whose busy state half of all conversations begin,
            and "diurnal".
        period_s: the mean time from one busy state to the next, and the time from one peak to the next.
        users: so many send one conversation after another, each a think time after the end of the one before, in
            place of `rate` and `arrivals`: a closed loop. 0: conversations begin whatever becomes of the others.
        priority_shares: of conversations, the share that has priority 0, 1, ...; none: all have 0.
        num_system_prompts: texts of which each conversation has one, chosen uniformly, at its start; 0 is none.
        system_prompt_tokens: length of each of them.
        turns: requests in a conversation; the last conversation may have fewer.
        think_time_s: mean, in seconds, of the exponential time from an answer to the next turn.

    Raises:
        InputError: a value is out of range.
    """
    _check(num_requests, rate, arrivals, cv, burst_size, num_system_prompts, system_prompt_tokens, turns, think_time_s)
    _check_patterns(peak, period_s, users, priority_shares, arrivals)
    draws = _Draws.seeded(seed, prompt_tokens, output_tokens, num_system_prompts, think_time_s)
    gaps_s = _gaps(random.Random(f"{seed}:gaps"), rate / turns, arrivals, cv, burst_size, peak, period_s)
    priority_rng, kinds = random.Random(f"{seed}:priorities"), range(len(priority_shares))
    start_ns = 0
    drafts: list[Request] = []
    latest: list[Request] = []  # of each conversation
    for session in range(-(-num_requests // turns)):
        parts = (Part(next(draws.systems), 0, system_prompt_tokens),) if num_system_prompts else ()
        priority = priority_rng.choices(kinds, priority_shares)[0] if priority_shares else 0
        opening = Request(len(drafts), start_ns, parts, 0, session=session if turns > 1 else None, priority=priority)
        if users:
            opening = _following(opening, latest[session - users] if session >= users else None, next(draws.think_ns))
        drafts += _conversation(opening, min(turns, num_requests - len(drafts)), draws)
        latest.append(drafts[-1])
        in_time = f"one at which all arrive within {LATEST_NS / 1e9:.3g} s"
        require(drafts[-1].arrival_ns <= LATEST_NS, "rate", rate, in_time)
        start_ns += round(next(gaps_s) * 1e9)
    # Stable, so that a turn stays behind the one before it.
    drafts.sort(key=lambda request: request.arrival_ns)
    return list(renumbered(drafts))


def _check(
    num_requests: int,
    rate: float,
    arrivals: str,
    cv: float,
    burst_size: int,
    num_system_prompts: int,
    system_prompt_tokens: int,
    turns: int,
    think_time_s: float,
) -> None:
    """Raise an InputError for the first argument that is out of range."""
    most = MOST_REQUESTS
    require(1 <= num_requests <= most, "num_requests", num_requests, f"an integer from 1 to {most}")
    require(1e-9 <= rate < math.inf, "rate", rate, "requests per second >= 1e-9")
    require(arrivals in get_args(Arrivals), "arrivals", arrivals, f"one of {', '.join(get_args(Arrivals))}")
    require(1e-3 <= cv <= MOST_CV, "cv", cv, f"a number from 0.001 to {MOST_CV:g}")
    counts = (
        ("burst_size", burst_size, 1, most),
        ("num_system_prompts", num_system_prompts, 0, most),
        ("system_prompt_tokens", system_prompt_tokens, min(num_system_prompts, 1), MOST_TOKENS),
        ("turns", turns, 1, most),
    )
    for name, found, least, highest in counts:
        require(least <= found <= highest, name, found, f"an integer from {least} to {highest}")
    fewer = f"at most {MOST_PARTS // num_requests} with {num_requests} requests (TWINSERVE_MOST_PARTS)"
    require(num_requests * min(turns, num_requests) <= MOST_PARTS, "turns", turns, fewer)
    require(0 <= think_time_s <= 1e6, "think_time_s", think_time_s, "seconds from 0 to 1e6")


def _check_patterns(peak: float, period_s: float, users: int, priority_shares: Seq[float], arrivals: str) -> None:
    """Refuse patterns of arrivals, users and priorities that are out of range."""
    most = 2 if arrivals == "diurnal" else 1e3
    require(1 < peak <= most, "peak", peak, f"a number above 1, and at most {most:g}")
    require(1e-3 <= period_s <= 1e9, "period_s", period_s, "seconds from 0.001 to 1e9")
    require(0 <= users <= MOST_REQUESTS, "users", users, f"an integer from 0 to {MOST_REQUESTS}")
    are_shares = all(share >= 0 for share in priority_shares) and 0 < sum(priority_shares) < math.inf
    expected = "numbers >= 0, not all 0, whose sum is one too"
    require(not priority_shares or are_shares, "priority_shares", list(priority_shares), expected)


class _Draws(NamedTuple):
    """Where the random numbers of the conversations come from, an endless stream for each aspect."""

    systems: Iterator[int]
    texts: Iterator[int]
    prompt_tokens: Iterator[int]
    max_tokens: Iterator[int]
    think_ns: Iterator[int]

    @classmethod
    def seeded(
        cls, seed: int, prompt_tokens: Lengths, output_tokens: Lengths, num_systems: int, think_time_s: float
    ) -> _Draws:
        # Equal streams draw equal numbers of requests, so the lengths stay together.
        outputs = "prompts" if _are_of_one_trace(prompt_tokens, output_tokens) else "outputs"
        system_rng, prompt_rng, output_rng, think_rng = (
            random.Random(f"{seed}:{aspect}") for aspect in ("systems", "prompts", outputs, "thinking")
        )
        return cls(
            systems=(system_rng.randrange(num_systems) for _ in count()),
            texts=count(num_systems),
            prompt_tokens=(prompt_tokens.draw(prompt_rng) for _ in count()),
            max_tokens=(output_tokens.draw(output_rng) for _ in count()),
            think_ns=(round(think_rng.expovariate(1.0) * think_time_s * 1e9) for _ in count()),
        )


def _are_of_one_trace(prompt_tokens: Lengths, output_tokens: Lengths) -> bool:
    return (
        isinstance(prompt_tokens, EmpiricalLengths)
        and isinstance(output_tokens, EmpiricalLengths)
        and prompt_tokens.sha256 == output_tokens.sha256
    )


def _following(opening: Request, before: Request | None, think_ns: int) -> Request:
    """The opening of a user's conversation, so long after the end of the one before; the first after so long."""
    if before is None:
        return opening._replace(arrival_ns=think_ns)
    return opening._replace(arrival_ns=before.arrival_ns + think_ns, after=before.id, think_ns=think_ns)


def _conversation(opening: Request, turns: int, draws: _Draws) -> Iterator[Request]:
    """The turns of one conversation; `opening` has the id and time of the first, and what its prompt begins with."""
    parts = opening.parts
    arrival_ns, think_ns = opening.arrival_ns, opening.think_ns
    for number in range(opening.id, opening.id + turns):
        parts = (*parts, Part(next(draws.texts), 0, next(draws.prompt_tokens)))
        max_tokens = next(draws.max_tokens)
        after = number - 1 if number > opening.id else opening.after
        yield Request(number, arrival_ns, parts, max_tokens, opening.session, after, think_ns, opening.priority)
        parts = (*parts, Part(answer_text(number), 0, max_tokens))
        think_ns = next(draws.think_ns)
        arrival_ns += think_ns


def _gaps(
    rng: random.Random, rate: float, arrivals: Arrivals, cv: float, burst_size: int, peak: float, period_s: float
) -> Iterator[float]:
    """Seconds between successive starts, `rate` starts per second in the long run."""
    if arrivals == "mmpp":
        yield from _modulated_gaps(rng, rate, peak, period_s)
    if arrivals == "diurnal":
        yield from _diurnal_gaps(rng, rate, peak, period_s)
    while True:
        if arrivals == "gamma":
            yield rng.gammavariate(1 / cv**2, cv**2 / rate)
        elif arrivals == "poisson":
            yield rng.expovariate(rate)
        else:
            yield from repeat(0.0, burst_size - 1)
            yield rng.expovariate(rate / burst_size)


def _modulated_gaps(rng: random.Random, rate: float, peak: float, period_s: float) -> Iterator[float]:
    """Of a Poisson process with two states, each of exponential length, in each of which half of the starts lie."""
    busy = 1 / (2 * peak)  # the share of time
    states = ((rate * peak, period_s * busy), (rate / (2 * (1 - busy)), period_s * (1 - busy)))
    is_busy = rng.random() < busy
    left_s, gap_s = rng.expovariate(1 / states[not is_busy][1]), 0.0
    while True:
        next_s = rng.expovariate(states[not is_busy][0])
        if next_s < left_s:
            left_s -= next_s
            yield gap_s + next_s
            gap_s = 0.0
        else:
            gap_s += left_s
            is_busy = not is_busy
            left_s = rng.expovariate(1 / states[not is_busy][1])


def _diurnal_gaps(rng: random.Random, rate: float, peak: float, period_s: float) -> Iterator[float]:
    """Of a Poisson process whose rate is a sine, by thinning (Lewis and Shedler, Naval Research Logistics 26, 1979)."""
    time_s = latest_s = 0.0
    while True:
        time_s += rng.expovariate(rate * peak)
        share = (1 - (peak - 1) * math.cos(2 * math.pi * time_s / period_s)) / peak
        if rng.random() < share:
            yield time_s - latest_s
            latest_s = time_s
