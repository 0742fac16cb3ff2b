"""Intervals: how sure a prediction is, from simulations whose costs are off by as much as they may be.

What matters to a run is by how much sums of step times are off, not single steps: an error that is all of one kind's
steps' alike moves every latency, and near saturation many times as far. So what is uncertain are common factors, drawn
anew for each of a few simulations; what these spread is what the prediction may be off by.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from twinserve.settings.errors import InputError
from twinserve.sim.fit import FOLDS, REGIMES, FittedLatency, StepSample, regime_of
from twinserve.traces.runs.compare import LATENCIES, STATISTICS, value_of

COVERAGE = 0.9
"""Share of the runs whose metrics shall lie within their limits."""

NUM_DRAWS = 16
"""Simulations of a prediction's intervals; a power of two, which a Sobol sequence fills evenly."""

METRICS = (*(f"{name}.{statistic}" for name in LATENCIES for statistic in STATISTICS), "output_tok_s")
"""What has limits, as `value_of` knows it."""

Intervals = dict[str, tuple[float, float]]
"""The limits of each metric."""

HOST = "host"

ASSUMED_RESIDUAL = 0.02
"""What sums over a kind of step are off by, before there are runs that say it: somewhat more than docs/fidelity.md
finds, as another card or model may be further off."""

ASSUMED_CARD, ASSUMED_HOST = 0.01, 0.1
"""What a card and a host differ by between runs, before there are repeats that say it.

The card's is an assumption; the host's goes with the levels of processes on one machine in docs/fidelity-vllm.md.
"""


@dataclass(frozen=True)
class Uncertainty:
    """What is not known of a latency model: standard deviations of the logarithms of common factors.

    Attributes:
        device: by regime, of the device's time for all of its steps: the model's error.
        host: the same of the host's time, for all steps.
        card: of the device's time from one run to another.
        host_drift: the same of the host's.
    """

    device: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(REGIMES, ASSUMED_RESIDUAL))
    host: float = ASSUMED_RESIDUAL
    card: float = ASSUMED_CARD
    host_drift: float = ASSUMED_HOST

    @classmethod
    def of(cls, model: FittedLatency) -> Uncertainty:
        """That which a latency file says, and where it says nothing, what is assumed.

        Raises:
            InputError: it says something else than deviations.
        """
        data = model.data.get("uncertainty", {})
        known = {one.name for one in fields(cls)}
        if not isinstance(data, dict) or not set(data) <= known or not isinstance(data.get("device", {}), dict):
            names = ", ".join(sorted(known))
            raise InputError(f"expected a table of {names}", field="uncertainty", value=data)
        device = dict.fromkeys(REGIMES, ASSUMED_RESIDUAL) | data.get("device", {})
        others = {name: value for name, value in data.items() if name != "device"}
        for name, value in (device | others).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise InputError("expected a number from 0 to below 1", field=f"uncertainty.{name}", value=value)
        return cls(device, **others)

    def as_dict(self) -> dict[str, Any]:
        """As a latency file has it."""
        return asdict(self)


class Draw(NamedTuple):
    """What a simulation takes the uncertain things to be: standard normal numbers, and the place in the host's drift.

    Attributes:
        device: by regime.
        phase: from 0 to below 1.
    """

    device: dict[str, float]
    card: float
    host: float
    phase: float


@cache
def draws(seed: int = 0) -> tuple[Draw, ...]:
    """NUM_DRAWS draws, by a scrambled Sobol sequence; a seed gives the same ones."""
    from scipy.stats import norm, qmc

    points = qmc.Sobol(len(REGIMES) + 3, seed=seed).random(NUM_DRAWS)
    found = []
    for *device, card, host, phase in points.tolist():
        normal = [float(number) for number in norm.ppf([*device, card, host])]
        found.append(Draw(dict(zip(REGIMES, normal, strict=False)), normal[-2], normal[-1], phase))
    return tuple(found)


def varied(model: FittedLatency, draw: Draw) -> FittedLatency:
    """The model as a draw has it: device and host slower or faster, the host's drift begun elsewhere.

    Raises:
        InputError: see `Uncertainty.of`.
    """
    sure = Uncertainty.of(model)
    device = {name: math.exp(sure.device[name] * draw.device[name] + sure.card * draw.card) for name in REGIMES}
    host = math.exp(math.hypot(sure.host, sure.host_drift) * draw.host)
    begin = int(draw.phase * len(model.drift))
    return scaled(model, device, host).with_drift(model.drift[begin:] + model.drift[:begin])


def scaled(model: FittedLatency, device: Mapping[str, float], host: float) -> FittedLatency:
    """The model with the device's time, by regime, and the host's so many times as long."""
    regimes = {}
    for regime, parts in model.data["regimes"].items():
        factors = {"device": device[regime], "host": host, "lead": host}
        regimes[regime] = {
            part: fitted | {"ns": {name: ns * factors[part] for name, ns in fitted["ns"].items()}}
            for part, fitted in parts.items()
        }
    return FittedLatency(model.data | {"regimes": regimes})


def with_uncertainty(model: FittedLatency, uncertainty: Uncertainty) -> FittedLatency:
    """The model, its file saying how sure it is."""
    return FittedLatency(model.data | {"uncertainty": uncertainty.as_dict()})


def limits(values: Seq[float | None]) -> tuple[float, float] | None:
    """The limits within which one more such value lies with probability COVERAGE, of values that are lognormal.

    A prediction interval by Student's t, of the logarithms; None where a value is not there, or not above 0.
    """
    known = [math.log(value) for value in values if value]
    if len(known) < max(2, len(values)):
        return None
    from scipy.special import stdtrit

    mean, count = statistics.fmean(known), len(known)
    half = float(stdtrit(count - 1, (1 + COVERAGE) / 2)) * statistics.stdev(known) * math.sqrt(1 + 1 / count)
    return math.exp(mean - half), math.exp(mean + half)


def intervals(summaries: Seq[Mapping[str, Any]]) -> Intervals:
    """The limits of each metric, from summaries, one a draw; a metric that is not defined has none."""
    found = {metric: limits([value_of(summary, metric) for summary in summaries]) for metric in METRICS}
    return {metric: (pair[0], pair[1]) for metric, pair in found.items() if pair is not None}


class Served(NamedTuple):
    """The measured steps of a run that served something.

    Attributes:
        workload: says what; runs that say the same are repeats.
    """

    samples: list[StepSample]
    workload: str


Refit = Callable[[list[StepSample]], FittedLatency]
"""Fits a model on some samples; a ValueError says that these are too few."""


def uncertainty_of(model: FittedLatency, refit: Refit, served: Seq[Served], profiled: list[StepSample]) -> Uncertainty:
    """What a fit does not know, from how far it is off on what was held out of it.

    Each served run is held out in turn, and what is assumed counts as one run more, as few runs may agree by chance. A
    profile, or a run that is alone, says nothing of other runs: fifths of it are held out, and the error is taken to be
    no less than what is assumed. Card and host differ between repeats as much as what was measured of them, over what
    the model says, does; here, too, what is assumed counts as one difference more.

    Args:
        model: fitted on all samples.
        profiled: the measured steps of profiles.
    """
    runs = [run.samples for run in served]
    residuals = dict.fromkeys((*REGIMES, HOST), ASSUMED_RESIDUAL)
    if len(runs) + bool(profiled) > 1:
        others = [[s for other in runs if other is not run for s in other] + profiled for run in runs]
        errors = [_errors(refit, [pair]) for pair in zip(runs, others, strict=True)]
        for part, assumed in residuals.items():
            residuals[part] = _pooled(assumed, [found[part] for found in errors if part in found])
    else:
        steps = [s for run in runs for s in run] + profiled
        bounds = [len(steps) * number // FOLDS for number in range(FOLDS + 1)]
        fifths = [(steps[a:b], steps[:a] + steps[b:]) for a, b in pairwise(bounds)]
        for part, error in _errors(refit, fifths).items():
            residuals[part] = max(residuals[part], error)
    card, host_drift = _drifts(model, served)
    device = {regime: round(residuals[regime], 4) for regime in model.data["regimes"]}
    return Uncertainty(device, round(residuals[HOST], 4), round(card, 4), round(host_drift, 4))


def _costs(model: FittedLatency, samples: Iterable[StepSample]) -> Iterator[tuple[str, int, int, int]]:
    """Of each step: regime or host, octave of its tokens, nanoseconds measured and modelled."""
    for sample in samples:
        cost, octave = model.step_cost(sample.features), sample.features.tokens.bit_length()
        if sample.device_ns is not None:
            regime = regime_of(sample.features, model.data.get("captured_tokens"))
            yield regime, octave, sample.device_ns, cost.device_ns
        if sample.host_ns is not None:
            yield HOST, octave, sample.host_ns, cost.host_ns


def _errors(refit: Refit, parts: Iterable[tuple[list[StepSample], list[StepSample]]]) -> dict[str, float]:
    """By regime, and of the host, how far sums of steps are off that are predicted from others.

    It is the root mean square over octaves of tokens, by their steps: a run's steps of a kind have about as many tokens
    as one another, so that what one octave is off by need not cancel what another is.

    Args:
        parts: samples to predict, and those to fit a model on; where there is no fit, they are left out.
    """
    sums: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    for samples, others in parts:
        try:
            costs = list(_costs(refit(others), samples))
        except ValueError:
            continue
        for part, octave, *step in costs:
            sums[part, octave] = [a + b for a, b in zip(sums[part, octave], (1, *step), strict=True)]
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (part, _), (count, measured, modelled) in sums.items():
        if measured > 0 and modelled > 0:
            squares[part][0] += count
            squares[part][1] += count * math.log(modelled / measured) ** 2
    return {part: math.sqrt(square / count) for part, (count, square) in squares.items()}


def _drifts(model: FittedLatency, served: Seq[Served]) -> tuple[float, float]:
    """What card and host differ by between repeats."""
    repeats: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for run in served:
        sums = {True: [0, 0], False: [0, 0]}
        for part, _, measured, modelled in _costs(model, run.samples):
            sums[part == HOST][0] += measured
            sums[part == HOST][1] += modelled
        for is_host, (measured, modelled) in sums.items():
            if measured > 0 and modelled > 0:
                repeats[run.workload, is_host].append(math.log(measured / modelled))
    found: dict[bool, list[float]] = {True: [], False: []}
    for (_, is_host), ratios in repeats.items():
        if len(ratios) > 1:
            found[is_host] += [statistics.stdev(ratios)] * (len(ratios) - 1)
    return _pooled(ASSUMED_CARD, found[False]), _pooled(ASSUMED_HOST, found[True])


def _pooled(assumed: float, found: Seq[float]) -> float:
    """The root mean square of deviations, and of one that is assumed."""
    return math.hypot(assumed, *found) / math.sqrt(1 + len(found))
