"""Generator: synthetic requests, the same for the same arguments and seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST_REQUESTS, plain
from twinserve.traces.readers import read_trace
from twinserve.traces.request import Part, Request, answer_text
from twinserve.traces.transforms import renumbered, require

Arrivals = Literal["poisson", "gamma", "burst"]

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
        if not (1 <= spec.low <= spec.mean <= spec.high and 0 <= spec.cv < math.inf):
            raise InputError(
                f"expected 1 <= MIN ({spec.low}) <= mean <= MAX ({spec.high}) and CV >= 0", field=field, value=text
            )
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
    num_system_prompts: int = 0,
    system_prompt_tokens: int = 0,
    turns: int = 1,
    think_time_s: float = 0.0,
) -> list[Request]:
    """Synthetic requests in the order of their arrival, the first one at 0.

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
        arrivals: "poisson", "gamma" (gaps with coefficient of variation `cv`), or "burst" (`burst_size`
            conversations at the same instant, bursts at exponential gaps).
        cv: standard deviation of the gaps divided by their mean; for "gamma".
        burst_size: conversations in a burst; for "burst".
        num_system_prompts: texts of which each conversation has one, chosen uniformly, at its start; 0 is none.
        system_prompt_tokens: length of each of them.
        turns: requests in a conversation; the last conversation may have fewer.
        think_time_s: mean, in seconds, of the exponential time from an answer to the next turn.

    Raises:
        InputError: a value is out of range.
    """
    _check(num_requests, rate, arrivals, cv, burst_size, num_system_prompts, system_prompt_tokens, turns, think_time_s)
    draws = _Draws.seeded(seed, prompt_tokens, output_tokens, num_system_prompts, think_time_s)
    gaps_s = _gaps(random.Random(f"{seed}:gaps"), rate / turns, arrivals, cv, burst_size)
    start_ns = 0
    drafts: list[Request] = []
    for session in range(-(-num_requests // turns)):
        parts = (Part(next(draws.systems), 0, system_prompt_tokens),) if num_system_prompts else ()
        opening = Request(len(drafts), start_ns, parts, max_tokens=0, session=session if turns > 1 else None)
        drafts += _conversation(opening, min(turns, num_requests - len(drafts)), draws)
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
    require(1e-3 <= cv <= 1e3, "cv", cv, "a number from 0.001 to 1000")
    require(burst_size >= 1, "burst_size", burst_size, "an integer >= 1")
    require(num_system_prompts >= 0, "num_system_prompts", num_system_prompts, "an integer >= 0")
    least = min(num_system_prompts, 1)
    require(system_prompt_tokens >= least, "system_prompt_tokens", system_prompt_tokens, f"an integer >= {least}")
    require(turns >= 1, "turns", turns, "an integer >= 1")
    require(0 <= think_time_s <= 1e6, "think_time_s", think_time_s, "seconds from 0 to 1e6")


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


def _conversation(opening: Request, turns: int, draws: _Draws) -> Iterator[Request]:
    """The turns of one conversation; `opening` has the id and time of the first, and what its prompt begins with."""
    parts = opening.parts
    arrival_ns, think_ns = opening.arrival_ns, 0
    for number in range(opening.id, opening.id + turns):
        parts = (*parts, Part(next(draws.texts), 0, next(draws.prompt_tokens)))
        max_tokens = next(draws.max_tokens)
        after = number - 1 if number > opening.id else None
        yield Request(number, arrival_ns, parts, max_tokens, opening.session, after, think_ns)
        parts = (*parts, Part(answer_text(number), 0, max_tokens))
        think_ns = next(draws.think_ns)
        arrival_ns += think_ns


def _gaps(rng: random.Random, rate: float, arrivals: Arrivals, cv: float, burst_size: int) -> Iterator[float]:
    """Seconds between successive starts, `rate` starts per second in the long run."""
    while True:
        if arrivals == "gamma":
            yield rng.gammavariate(1 / cv**2, cv**2 / rate)
        elif arrivals == "poisson":
            yield rng.expovariate(rate)
        else:
            yield from [0.0] * (burst_size - 1)
            yield rng.expovariate(rate / burst_size)
