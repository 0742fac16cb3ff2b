"""Limits of a prediction: on the command line, in the record, and of a capacity; the same whoever simulates."""

import json
import math

import pytest

from twinserve.planning.parallel import Workers
from twinserve.planning.prediction import prediction_intervals
from twinserve.settings.build_core import Settings
from twinserve.sim.fit import REGIMES, FittedLatency
from twinserve.sim.intervals import METRICS, NUM_DRAWS, Uncertainty, with_uncertainty
from twinserve.sim.latency import ScaledLatency
from twinserve.traces.runs.compare import value_of
from twinserve.worlds.run import run_sim
from twinserve.worlds.workload import load_workload, load_workloads

SURE = Uncertainty({"decode": 0.02, "prompt": 0.02}, 0.02, 0.01, 0.05)


@pytest.fixture
def model(latency) -> FittedLatency:
    return with_uncertainty(FittedLatency.load(latency), SURE)


def test_limits_hold_what_is_somewhat_slower_or_faster_and_not_what_is_far_off(trace, model):
    workload, settings = load_workload(trace, {"rate_scale": 5.0}), Settings()
    found = prediction_intervals(workload, settings, model)
    assert set(found) == set(METRICS)
    for factor, is_inside in ((0.7, False), (0.98, True), (1.0, True), (1.02, True), (1.4, False)):
        scaled = ScaledLatency(model, factor)
        summary = run_sim(workload, settings, scaled, latency_facts={"name": "scaled", "identity": ""})
        for metric in ("ttft_s.mean", "tpot_s.mean", "e2e_s.mean"):
            low, high = found[metric]
            assert (low <= value_of(summary, metric) <= high) == is_inside, (factor, metric)


def test_less_is_known_the_wider_the_limits_and_who_simulates_is_the_same(trace, model):
    workload, settings = load_workload(trace, {}), Settings()
    found = prediction_intervals(workload, settings, model)
    assert prediction_intervals(workload, settings, model, workers=Workers(2)) == found
    assert prediction_intervals(workload, settings, model, seed=1) != found
    vague = prediction_intervals(workload, settings, with_uncertainty(model, Uncertainty(dict.fromkeys(REGIMES, 0.06))))
    for metric in ("tpot_s.mean", "e2e_s.p99"):
        assert math.log(vague[metric][1] / vague[metric][0]) > 1.2 * math.log(found[metric][1] / found[metric][0])


def test_a_random_workload_is_drawn_anew_each_time(trace, model):
    drawn = load_workloads(trace, {"shuffle_seed": 4}, {}, NUM_DRAWS)
    arrivals = [tuple(request.parts for request in workload.requests) for workload in drawn]
    assert len(set(arrivals)) == NUM_DRAWS
    assert drawn[3].requests == load_workload(trace, {"shuffle_seed": 7}).requests
    sure = with_uncertainty(model, Uncertainty(dict.fromkeys(("decode", "prompt", "eager"), 0.0), 0.0, 0.0, 0.0))
    one, other = (prediction_intervals(given, Settings(), sure)["e2e_s.mean"] for given in (drawn[0], drawn))
    assert one[0] == pytest.approx(one[1]) and other[0] < other[1]


def test_the_command_says_the_limits_in_its_answer_and_in_the_record(twinserve, trace, latency, tmp_path):
    out = tmp_path / "run"
    result = twinserve("sim", trace, "--latency", latency, "--intervals", "--json", "--out", out)
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert set(summary["intervals"]) == set(METRICS)
    assert json.loads((out / "run.json").read_text())["summary"]["intervals"] == summary["intervals"]
    low, high = summary["intervals"]["tpot_s.mean"]
    assert low < summary["tpot_s"]["mean"] < high
    printed = twinserve("sim", trace, "--latency", latency, "--intervals").out
    assert "90% limits" in printed and f"{1e3 * low:.3g} to {1e3 * high:.3g}" in printed
    plain = json.loads(twinserve("sim", trace, "--latency", latency, "--json").out)
    assert {name: value for name, value in summary.items() if name not in ("intervals", "wall_s")} == {
        name: value for name, value in plain.items() if name != "wall_s"
    }


def test_a_fleet_has_limits(twinserve, trace, latency):
    result = twinserve(
        "sim", trace, "--latency", latency, "--replicas", 2, "--router", "random", "--intervals", "--json"
    )
    assert result.code == 0, result.err
    assert set(json.loads(result.out)["intervals"]) == set(METRICS)


def test_a_latency_of_unknown_error_has_no_limits(twinserve, trace, latency, tmp_path):
    result = twinserve("sim", trace, "--latency", "roofline:llama-3-8b@h100", "--intervals")
    assert result.code == 2 and "expected a fitted one, for intervals" in result.err
    out = tmp_path / "run"
    twinserve("sim", trace, "--latency", latency, "--out", out)
    result = twinserve("sim", trace, "--latency-from", out, "--intervals")
    assert result.code == 2 and "step times of run" in result.err
    found = twinserve(
        "capacity", trace, "--latency", "roofline:llama-3-8b@h100", "--objective", "p99 TTFT <= 1 s", "--json"
    )
    assert found.code == 0 and json.loads(found.out)["intervals"] == {}


def test_a_capacity_says_the_limits_of_each_metric_there(twinserve, trace, latency, tmp_path):
    asked = ("capacity", trace, "--latency", latency, "--shuffle-seed", 0, "--objective", "p99 TTFT <= 40 ms")
    result = twinserve(*asked, "--jobs", 1, "--json")
    assert result.code == 0, result.err
    row = json.loads(result.out)
    assert set(row["intervals"]) == set(METRICS)
    low, high = row["intervals"]["ttft_s.p99"]
    assert low < row["results"][0]["summary"]["ttft_s"]["p99"] < high
    again = twinserve(*asked, "--jobs", 2, "--json", "--out", tmp_path / "found")
    assert again.out == result.out
    printed = " ".join(twinserve(*asked, "--jobs", 1).out.split())
    assert "90% limits" in printed
