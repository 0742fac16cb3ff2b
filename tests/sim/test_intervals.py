"""Intervals: what is uncertain is drawn evenly, scales what it says, and is found from what was held out."""

import math
import random
import statistics
from dataclasses import replace

import pytest

from twinserve.settings.errors import InputError
from twinserve.sim.fit import REGIMES, FittedLatency, StepSample, fit
from twinserve.sim.intervals import (
    ASSUMED_CARD,
    ASSUMED_HOST,
    ASSUMED_RESIDUAL,
    COVERAGE,
    METRICS,
    NUM_DRAWS,
    Draw,
    Served,
    Uncertainty,
    draws,
    intervals,
    limits,
    uncertainty_of,
    varied,
    with_uncertainty,
)
from twinserve.sim.latency import StepFeatures

DECODES = [StepFeatures(0, n, 0, n, n * c, n * c, n, longest_decode=c) for n in (1, 2, 4, 8, 16) for c in (64, 512)]
PROMPTS = [
    StepFeatures(0, 1, n, 0, n, n * (n + 1) // 2, 1, arrived=1, prompts=((0, n),)) for n in (8, 16, 64, 256, 512)
]


def samples(device: float = 1.0, host: float = 1.0) -> list[StepSample]:
    """Steps of a card and a host that are so many times slower than another."""
    steps = [(step, 2e6 + 1e5 * step.seqs + 20 * step.kv_tokens) for step in DECODES]
    steps += [(step, 2e6 + 1e4 * step.prompt_tokens) for step in PROMPTS]
    return [StepSample(step, round(2e5 * host), round(ns * device)) for step, ns in steps]


def refit(kept: list[StepSample]) -> FittedLatency:
    return fit(kept, {}, holds_out=False)


MODEL = fit(samples(), {})


def test_a_simulation_and_the_draws_are_no_more_than_twenty():
    assert NUM_DRAWS + 1 <= 20 and len(draws()) == NUM_DRAWS


def test_draws_are_normal_each_by_itself_and_the_same_for_a_seed():
    assert draws(3) == draws(3) != draws(4)
    factors = {regime: [draw.device[regime] for draw in draws()] for regime in REGIMES}
    factors |= {"card": [draw.card for draw in draws()], "host": [draw.host for draw in draws()]}
    for values in factors.values():
        assert abs(statistics.fmean(values)) < 0.15 and 0.8 < statistics.stdev(values) < 1.2
    names = list(factors)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            assert abs(statistics.correlation(factors[one], factors[other])) < 0.5
    assert sorted(int(draw.phase * NUM_DRAWS) for draw in draws()) == list(range(NUM_DRAWS))


def test_a_varied_model_is_slower_by_what_was_drawn_and_drifts_from_elsewhere():
    sure = Uncertainty({"decode": 0.02, "prompt": 0.04}, host=0.03, card=0.01, host_drift=0.04)
    model = with_uncertainty(MODEL, sure).with_drift([1.0, 2.0, 3.0, 4.0])
    found = varied(model, Draw({"decode": 1.0, "prompt": -1.0, "eager": 9.0}, card=2.0, host=-1.0, phase=0.5))
    assert found.drift == [3.0, 4.0, 1.0, 2.0]
    one, other = model.with_drift([]), found.with_drift([])
    for step, logarithm in ((DECODES[3], 0.02 + 0.02), (PROMPTS[2], 0.02 - 0.04)):
        was, now = one.step_cost(step), other.step_cost(step)
        assert now.device_ns / was.device_ns == pytest.approx(math.exp(logarithm), rel=1e-5)
        assert now.host_ns / was.host_ns == pytest.approx(math.exp(-0.05), rel=1e-4)
    assert found.identity != model.identity


def test_limits_hold_nine_of_ten_values_of_a_lognormal_distribution():
    rng = random.Random(0)
    inside = 0
    for _ in range(2000):
        *drawn, next_one = (rng.lognormvariate(1.0, 0.4) for _ in range(NUM_DRAWS + 1))
        low, high = limits(drawn)
        inside += low <= next_one <= high
    assert inside / 2000 == pytest.approx(COVERAGE, abs=0.02)


def test_what_is_not_defined_has_no_limits():
    assert limits([1.0, None, 2.0]) is None and limits([0.0, 1.0]) is None
    assert limits([3.0] * NUM_DRAWS) == pytest.approx((3.0, 3.0))
    statistic = {name: 1.5 for name in ("mean", "p50", "p90", "p95", "p99")}
    summary = {"ttft_s": statistic, "e2e_s": statistic, "itl_s": statistic, "output_tok_s": 7.0}
    found = intervals([summary | {"tpot_s": dict.fromkeys(statistic)}] * NUM_DRAWS)
    assert set(found) == {metric for metric in METRICS if not metric.startswith("tpot_s")}


def test_a_file_that_says_nothing_has_what_is_assumed_and_one_that_says_something_else_is_refused():
    assert Uncertainty.of(MODEL) == Uncertainty()
    sure = Uncertainty({"decode": 0.01, "prompt": 0.02}, 0.1, 0.002, 0.3)
    assert Uncertainty.of(with_uncertainty(MODEL, sure)).device == sure.device | {"eager": ASSUMED_RESIDUAL}
    for data in ([1], {"devices": {}}, {"device": 0.1}, {"card": "2"}, {"host": -0.1}, {"device": {"decode": 7}}):
        with pytest.raises(InputError, match="uncertainty"):
            Uncertainty.of(FittedLatency(MODEL.data | {"uncertainty": data}))


def test_runs_that_are_predicted_from_one_another_show_the_error_of_sums():
    runs = [Served(samples(factor), str(factor)) for factor in (0.92, 0.92, 1.08, 1.08)]
    model = refit([sample for run in runs for sample in run.samples])
    found = uncertainty_of(model, refit, [Served(run.samples, str(n)) for n, run in enumerate(runs)], [])
    # Each is predicted from the three others.
    error = math.log((0.92 + 1.08 + 1.08) / 3 / 0.92)
    expected = math.sqrt((4 * error**2 + ASSUMED_RESIDUAL**2) / 5)
    for regime in ("decode", "prompt"):
        assert found.device[regime] == pytest.approx(expected, rel=0.1)
    assert set(found.device) == {"decode", "prompt"}
    assert found.card == ASSUMED_CARD and found.host_drift == ASSUMED_HOST, "no run is a repeat"
    assert found.host < ASSUMED_RESIDUAL, "all hosts were alike"


def test_repeats_show_what_card_and_host_differ_by():
    served = [Served(samples(0.98, 0.9), "a"), Served(samples(1.02, 1.1), "a"), Served(samples(1.5), "b")]
    found = uncertainty_of(MODEL, refit, served, [])
    for value, apart, assumed in (
        (found.card, math.log(1.02 / 0.98), ASSUMED_CARD),
        (found.host_drift, math.log(1.1 / 0.9), ASSUMED_HOST),
    ):
        assert value == pytest.approx(math.sqrt((apart**2 / 2 + assumed**2) / 2), rel=0.01)


def test_a_profile_alone_is_trusted_no_more_than_what_is_assumed():
    even = uncertainty_of(MODEL, refit, [], samples() * 5)
    assert set(even.device.values()) == {even.host} == {ASSUMED_RESIDUAL}
    wild = [replace(sample, device_ns=sample.device_ns * (1 + sample.features.seqs % 4)) for sample in samples()]
    assert uncertainty_of(refit(wild), refit, [], wild).device["decode"] > 2 * ASSUMED_RESIDUAL
