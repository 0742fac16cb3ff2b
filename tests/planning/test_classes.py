"""Requests by class: what they took, held by hand and by laws, and how even that is."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from latencies import Constant, Uneven

from twinserve.planning.classes import BATCHES, by_class, jain
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.record import load_record
from twinserve.worlds.run import run_sim
from twinserve.worlds.workload import Workload

MS = 10**6


def recorded(folder, requests, latency, **values):
    chosen = Settings.load({"enable_prefix_caching": False, "max_num_seqs": 8} | values)
    workload = Workload(requests, {"sha256": "0", "transforms": []}, 0, 0)
    run_sim(workload, chosen, latency, latency_facts={"name": "made up"}, out=folder)
    return load_record(folder)


@pytest.fixture
def record(tmp_path):
    """Two tenants, one of which asks for long answers; a pool in which somebody has to give way."""
    rows = [
        Request(n, n * MS, (Part(n, 0, 15),), 20 if n % 2 else 4, tenant="ab"[n % 2], priority=n % 3, session=n // 4)
        for n in range(120)
    ]
    return recorded(tmp_path / "run", rows, Constant(), block_size=8, num_gpu_blocks=16, max_num_batched_tokens=64)


def test_what_is_computed_again_is_what_preemptions_took(tmp_path):
    """As worked out in tests/traces/runs/test_waits.py: of two with 3 blocks of 6 each, one gives way after ten steps,
    with 24 tokens computed, and computes its 25 known ones."""
    rows = [Request(n, 0, (Part(n, 0, 15),), 20, tenant="ab"[n]) for n in range(2)]
    record = recorded(tmp_path / "run", rows, Constant(), block_size=8, num_gpu_blocks=6, max_num_batched_tokens=64)
    found = by_class([record], "tenant")["classes"]
    assert [found[name]["recomputed_tokens"] for name in "ab"] == [0, 24]
    assert [found[name]["computed_tokens"] for name in "ab"] == [15 + 19, 15 + 9 + 25 + 9]
    # A step lasts 10 ms: 15 tokens are held in the first, one more in each that follows.
    assert found["a"]["kv_token_s"] == pytest.approx(sum(range(15, 35)) * 0.01)
    assert found["b"]["kv_token_s"] == pytest.approx((sum(range(15, 25)) + sum(range(25, 35))) * 0.01)


def test_the_classes_add_up_to_all_and_to_what_the_steps_say(record):
    found = by_class([record], "tenant")
    assert list(found["classes"]) == ["a", "b"] and record.run["summary"]["preemptions"] > 0
    for name in ("requests", "served", "prompt_tokens", "output_tokens", "computed_tokens", "recomputed_tokens"):
        assert sum(one[name] for one in found["classes"].values()) == found["all"][name]
    assert found["all"]["computed_tokens"] == sum(step["tokens"] for step in record.steps)
    needed = sum(row["prompt_tokens"] + row["output_tokens"] - 1 for row in record.requests)
    assert found["all"]["computed_tokens"] - found["all"]["recomputed_tokens"] == needed
    summary = record.run["summary"]
    for metric in ("ttft", "tpot", "e2e"):
        for statistic in ("p50", "p90", "p99"):
            assert found["all"][metric][statistic] == summary[f"{metric}_s"][statistic]
        assert found["all"][metric]["mean"] == pytest.approx(summary[f"{metric}_s"]["mean"], rel=1e-12)
        low, high = found["all"]["intervals"][f"{metric}.mean"]
        assert low < found["all"][metric]["mean"] < high
    assert "ttft.mean" not in found["classes"]["a"]["intervals"], f"60 requests are too few for {BATCHES} batches"


@pytest.mark.parametrize(("by", "number"), [("priority", 3), ("session", 30), ("prompt", 1)])
def test_other_classes_are_told_apart(record, by, number):
    found = by_class([record], by)["classes"]
    assert len(found) == number and sum(one["requests"] for one in found.values()) == 120
    if by == "prompt":
        assert list(found) == ["< 16"]


def test_a_tenant_that_takes_all_is_seen_in_jains_index():
    assert jain([1.0, 1.0, 1.0]) == 1 and jain([1.0, 0.0, 0.0]) == pytest.approx(1 / 3) and jain([0.0]) is None


def test_batch_means_hold_the_mean_of_a_queue_whose_mean_is_known(tmp_path):
    """One token a request, one at a time, evenly: each takes its one step and waits for nobody."""
    rows = [Request(n, 20 * n * MS, (Part(n, 0, 1),), 1) for n in range(300)]
    found = by_class([recorded(tmp_path / "run", rows, Constant())], "tenant")["all"]
    assert found["intervals"]["ttft.mean"] == pytest.approx((0.01, 0.01)) and found["queue"]["max"] == 0


def test_requests_that_come_first_and_last_are_left_out(record):
    found = by_class([record], "tenant", warm_up_s=0.0295, drain_s=0.02)
    assert found["all"]["requests"] == 70
    with pytest.raises(InputError, match="expected less than the arrivals last"):
        by_class([record], "tenant", warm_up_s=1.0)


def test_the_command_prints_classes_and_fairness(twinserve, tmp_path):
    rows = [Request(n, n * MS, (Part(n, 0, 40),), 3, tenant="ab"[n % 2]) for n in range(200)]
    recorded(tmp_path / "run", rows, Uneven())
    shown = twinserve("record", "stat", tmp_path / "run", "--by", "tenant")
    assert shown.code == 0, shown.err
    assert "95% by batch means, all: ttft mean" in shown.out and "Jain's index between classes: tokens 1" in shown.out
    found = json.loads(twinserve("record", "stat", tmp_path / "run", "--json").out)
    assert Counter(one["requests"] for one in found["classes"].values()) == {100: 2}
    refused = twinserve("record", "stat", tmp_path / "run", "--warm-up-s", 10)
    assert refused.code == 2 and "warm_up_s + drain_s is 10" in refused.err
