"""The page about vLLM says what its results file says, and the file what was promised."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "fidelity-vllm.json").read_text())


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("fidelity_vllm")


@pytest.fixture(scope="module")
def runs():
    return importlib.import_module("fidelity_runs")


def test_the_page_is_written_from_the_results(script):
    assert (ROOT / "docs" / "fidelity-vllm.md").read_text() == script.page(RESULTS)


def test_every_decision_of_every_run_was_made_again():
    assert len(RESULTS["runs"]) == 17
    assert all(run["replay"]["exact"] for run in RESULTS["runs"].values())


def test_a_window_served_five_times_is_predicted_within_their_spread(runs):
    repeats = [RESULTS["runs"][name]["real"] for name in runs.REPEATS]
    sim = RESULTS["runs"][runs.REPEATS[0]]["sim"]
    for latency in runs.LATENCIES:
        for statistic in runs.STATISTICS:
            values = [repeat[latency][statistic] for repeat in repeats]
            assert min(values) <= sim[latency][statistic] <= max(values), (latency, statistic)


def test_the_windows_that_the_fit_is_from_were_not_fitted_on_what_is_predicted(script):
    assert set(RESULTS["fitted_on"]) == {"profile-launch", "azure-0.80-launch"}


@pytest.mark.parametrize(("factor", "bias"), [(1.1, -1 / 11), (1 / 1.1, 0.1)])
def test_the_equivalent_bias_is_the_factor_that_explains_the_error(script, monkeypatch, factor, bias):
    monkeypatch.setattr(script, "simulated", lambda record, latency: {"seconds": 5.0 * latency._factor})
    found = script.equivalent_bias(
        None, [None], {1.0: {"seconds": 5.0}}, lambda values: values["seconds"], {"seconds": 5.0 * factor}
    )
    assert found == pytest.approx(bias, abs=0.004)


def test_an_error_that_no_factor_in_reach_explains_has_no_bias(script, monkeypatch):
    monkeypatch.setattr(script, "simulated", lambda record, latency: {"seconds": 5.0 * latency._factor})
    assert (
        script.equivalent_bias(None, [None], {1.0: {"seconds": 5.0}}, lambda v: v["seconds"], {"seconds": 9.0}) is None
    )


def test_with_the_hosts_own_speed_every_window_is_simulated_to_a_few_percent():
    for name, run in RESULTS["runs"].items():
        if "real" in run and not run["is_overload"]:
            measured = run["real"]["e2e_s"]["mean"]
            assert run["own_host"]["e2e_s"]["mean"] == pytest.approx(measured, rel=0.04), name


def test_an_order_is_judged_by_the_pairs_that_the_repeats_can_tell_apart(script):
    real = [["a", 10.0], ["b", 10.2], ["c", 15.0]]
    assert script.verdict(real, [["a", 1.0], ["b", 2.0], ["c", 3.0]], 0.0) == "the same order"
    assert script.verdict(real, [["b", 1.0], ["a", 2.0], ["c", 3.0]], 0.03).startswith("the same order but for")
    assert script.verdict(real, [["b", 1.0], ["a", 2.0], ["c", 3.0]], 0.01) == "another order"
    assert script.verdict(real, [["c", 1.0], ["a", 2.0], ["b", 3.0]], 0.03) == "another order"
