"""What came of requests by class: each statistic beside numpy's, and requests left out by rule."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shell import latency, twinserve

from twinserve.traces.readers import write_trace
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.outcomes import Class, Measure, Outcome, judged, statistic_of
from twinserve.traces.runs.record import load_record

__all__ = ["latency", "twinserve"]
S = 10**9


def outcome(number: int, **values) -> Outcome:
    """A request that arrives at so many seconds, waits for one, has its first token after two and ends after five."""
    at = number * S
    times = {"arrival_ns": at, "first_scheduled_ns": at + S, "first_token_ns": at + 2 * S, "finish_ns": at + 5 * S}
    told = {"seq_id": number, "num_prompt_tokens": 10 * number, "num_completion_tokens": 4, "finish_reason": "length"}
    return Outcome(**(times | told | {"tenant": "ab"[number % 2], "priority": number, "session": number // 2} | values))


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=50), st.sampled_from(["p0", "p50", "p95", "p99.9"]))
def test_percentiles_are_numpys(values, statistic):
    assert statistic_of(values, statistic) == np.percentile(values, float(statistic[1:])) / 1e9


def test_what_a_request_took_is_defined_once():
    one = outcome(3)
    assert [one.took_ns(metric) for metric in ("ttft", "tpot", "e2e", "queue")] == [2 * S, S, 5 * S, S]
    assert outcome(3, num_completion_tokens=1).took_ns("tpot") is None
    assert outcome(3, finish_reason="abort").took_ns("ttft") is None
    assert Measure("max", "ttft").value([outcome(3, finish_reason="refused")]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("tenant=a", [0, 2, 4]), ("priority=3", [3]), ("session=1", [2, 3]), ("prompt>=30", [3, 4]), ("prompt<10", [0])],
)
def test_classes_hold_who_has_something_in_common(text, expected):
    assert [one.seq_id for one in map(outcome, range(5)) if Class(text).has(one)] == expected


@pytest.mark.parametrize("text", ["priority=1_0", "priority=\u0661", "session=+1", "prompt<\u0669"])
def test_a_class_of_numbers_that_python_alone_reads_is_none(text):
    with pytest.raises(ValueError, match="expected a number of at most 18 digits"):
        Class(text)


def test_a_measure_of_a_class_that_is_none_is_refused_as_it_is_named():
    with pytest.raises(ValueError, match="expected tenant=NAME"):
        Measure("p99", "ttft", "colour=red")


def test_nor_is_a_percentile():
    for statistic in ("p\u0669", "p9_9"):
        with pytest.raises(ValueError, match=statistic):
            Measure(statistic, "ttft")


def test_the_first_and_the_last_seconds_are_left_out():
    everything = [outcome(number) for number in range(11)]
    assert [one.seq_id for one in judged(reversed(everything), 2.0, 3.5)] == [2, 3, 4, 5, 6]
    assert judged([], 1.0) == [] and judged(everything) == everything and judged(everything, 6, 6) == []


@pytest.fixture
def labelled(tmp_path):
    """Forty requests of two tenants, the second of which comes in a burst."""
    rows = [
        Request(n, (n if n < 20 else 20) * S // 50, (Part(n, 0, 24),), 6, tenant="steady" if n < 20 else "burst")
        for n in range(40)
    ]
    path = tmp_path / "labelled.jsonl"
    write_trace(path, rows, {})
    return path


def test_a_simulation_measures_what_its_record_says_by_hand(twinserve, labelled, latency, tmp_path):
    run, text = tmp_path / "run", "p99.9 TTFT and max queue of tenant=burst and mean E2E of prompt<25"
    common = (labelled, "--latency", latency, "--max-num-seqs", 2)
    result = twinserve("sim", *common, "--measured", text, "--out", run, "--json")
    assert result.code in (0, 3), result.err
    measured, rows = json.loads(result.out)["measured"], load_record(run).requests
    ttft = [row["first_token_ns"] - row["arrival_ns"] for row in rows]
    queue = [row["first_scheduled_ns"] - row["arrival_ns"] for row in rows if row["tenant"] == "burst"]
    e2e = [row["finish_ns"] - row["arrival_ns"] for row in rows]
    assert measured == {
        "p99.9 TTFT": np.percentile(ttft, 99.9) / 1e9,
        "max queue of tenant=burst": max(queue) / 1e9,
        "mean E2E of prompt<25": pytest.approx(np.mean(e2e) / 1e9, rel=1e-12),
    }
    cut = twinserve("sim", *common, "--measured", "max TTFT", "--within", "TTFT <= 20 ms", "--warm-up-s", 0.1,
                    "--drain-s", 0.05, "--json")  # fmt: skip
    found = json.loads(cut.out)
    left = [row for row in rows if 0.1 * S <= row["arrival_ns"] <= 0.35 * S]
    assert found["judged"] == {"requests": len(left), "finished": len(left), "duration_s": pytest.approx(0.25)}
    took = [row["first_token_ns"] - row["arrival_ns"] for row in left]
    assert 0 < len(left) < 20 and found["measured"] == {"max TTFT": max(took) / 1e9}
    assert found["attainment"]["share"] == sum(ns <= 0.02 * S for ns in took) / len(left)
    shown = twinserve("sim", *common, "--measured", "max TTFT", "--drain-s", 0.05)
    assert "max TTFT" in shown.out and "judged by these: 18 requests" in shown.out


def test_a_capacity_is_found_for_the_tail_of_a_tenant_with_warm_up_left_out(twinserve, labelled, latency):
    objective = "p99.9 TTFT of tenant=steady <= 40 ms and max queue <= 10 s"
    common = (labelled, "--latency", latency, "--max-num-seqs", 2, "--jobs", 1, "--json", "--tolerance", 0.1)
    result = twinserve("capacity", *common, "--objective", objective, "--warm-up-s", 0.01)
    assert result.code == 0, result.err
    (row,) = map(json.loads, result.out.splitlines())
    (found,) = row["results"]
    assert row["value"] and row["missed"] == ["p99.9 TTFT of tenant=steady <= 40 ms"]
    assert set(found["summary"]["measured"]) == {"p99.9 TTFT of tenant=steady", "max queue"}
    assert found["summary"]["measured"]["p99.9 TTFT of tenant=steady"] <= 0.04
    assert found["summary"]["judged"]["requests"] < 40
    nobody = twinserve("capacity", *common, "--objective", "p99 TTFT <= 1 s", "--warm-up-s", 10**8)
    assert nobody.code == 0 and json.loads(nobody.out)["missed"] == ["no request is left to be judged"]
    refused = twinserve("capacity", *common, "--objective", "p99 TTFT <= 1 s", "--measured", "p99.9 speed")
    assert refused.code == 2 and "'speed', expected one of ttft, tpot, e2e, queue" in refused.err
