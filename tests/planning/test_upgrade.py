"""`upgrade`: what each changed rule of vLLM moves by itself, and `tune`: which of its flags suit a trace."""

from __future__ import annotations

import json
import re

import pytest

from twinserve.planning.objectives import Objective
from twinserve.planning.parallel import Workers
from twinserve.planning.sweep import load_plan
from twinserve.planning.tune import KNOBS, Tuning, tune
from twinserve.planning.upgrade import find_changes

SMALL = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "num_gpu_blocks": 40}


def test_a_changed_rule_moves_what_it_moves_in_the_whole_upgrade_and_others_nothing(trace, latency):
    values = {"trace": str(trace), "latency": str(latency), "long_prefill_token_threshold": 8, "limit": 1}
    changes = find_changes(values | SMALL, "0.24", "0.33", Workers())
    names = [change.name for change in changes]
    assert names == [
        "self_preemption_ends_pass",
        "victim_before_skips",
        "long_prefill_token_threshold_binds_alone",
        "vLLM 0.33",
    ]
    assert not changes[0].moved and not changes[1].moved
    alone, both = changes[2:]
    assert alone.moved == both.moved, "a request that is alone, so the threshold alone differs"
    (ttft,) = [row for row in both.moved if row.metric == "ttft_s.mean"]
    assert ttft.difference is not None and ttft.difference < 0 and ttft.interval is None
    assert [row.metric for row in both.moved if row.metric == "steps"] == ["steps"]


def test_the_defaults_of_the_machine_are_a_change_where_they_differ(trace):
    values = {"trace": str(trace), "latency": "roofline:smollm2-135m@mi300x", "num_gpu_blocks": 4000}
    changes = {change.name: change for change in find_changes(values, "0.24", "0.33", Workers())}
    assert changes["defaults"].values == {"max_num_batched_tokens": 16384}
    assert changes["vLLM 0.33"].values == {"max_num_batched_tokens": 16384, "vllm_version": "0.33"}
    back = {change.name: change for change in find_changes(values, "0.33", "0.24", Workers())}
    assert back["defaults"].values == {"max_num_batched_tokens": 8192}
    values = values | {"max_num_batched_tokens": 2048}
    assert "defaults" not in {change.name for change in find_changes(values, "0.24", "0.33", Workers())}


def test_with_seeds_a_difference_has_an_interval(trace, latency):
    values = {"trace": str(trace), "latency": str(latency), "long_prefill_token_threshold": 8}
    values |= {"rate": 2.0, "arrivals": "poisson", "seeds": 3}
    whole = find_changes(values | SMALL, "0.24", "0.33", Workers())[-1]
    (ttft,) = [row for row in whole.moved if row.metric == "ttft_s.mean"]
    assert ttft.interval is not None and ttft.interval[0] <= ttft.difference <= ttft.interval[1]


def test_the_command_shows_what_moves_and_says_where_nothing_does(twinserve, trace, latency):
    common = ("upgrade", trace, "--latency", latency, "--num-gpu-blocks", 40)
    found = twinserve(*common, "--long-prefill-token-threshold", 8, "--limit", 1, "--jobs", 1)
    assert found.code == 0 and re.search(r"binds_alone.*ttft_s\.mean", found.out), found.out
    nothing = twinserve(*common, "--jobs", 1)
    assert nothing.code == 0 and "nothing moves: vLLM 0.33 serves this trace as 0.24 does" in nothing.err
    rows = [json.loads(line) for line in twinserve(*common, "--json", "--jobs", 1).out.splitlines()]
    assert [row["name"] for row in rows][-1] == "vLLM 0.33" and rows[0]["values"] == {
        "self_preemption_ends_pass": False
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--to", "0.24"), "expected another version than 0.24"),
        (("--from", "0.30"), "expected one of 0.24, 0.33"),
        (("--like", "vllm-9@h100"), "expected vllm-0.24 or vllm-0.33"),
    ],
)
def test_an_upgrade_that_means_nothing_is_refused(twinserve, trace, arguments, expected):
    result = twinserve("upgrade", trace, *arguments)
    assert result.code == 2 and expected in result.err.splitlines()[-1]


# --- tune ---


def points_of(trace, latency, **values):
    plan = {"trace": str(trace), "latency": str(latency)} | SMALL | values
    return load_plan(None, plan).points


def test_a_budget_that_is_too_small_is_found_and_the_gain_is_that_of_the_runs(trace, latency):
    points = points_of(trace, latency, max_num_batched_tokens=8)
    found = tune(points, Objective.parse("mean TTFT <= 1 s"), Workers())
    assert "max_num_batched_tokens" in found.changed and found.helps
    assert set(found.changed) <= set(KNOBS) and found.interval is None
    assert found.gain == pytest.approx(1 - found.after / found.before) and found.after < found.before
    assert f"--max-num-batched-tokens {found.changed['max_num_batched_tokens']}" in found.flags


def test_where_nothing_is_better_nothing_is_changed(trace, latency):
    points = points_of(trace, latency, max_num_batched_tokens=2048, max_num_seqs=64, limit=1)
    found = tune(points, Objective.parse("mean TPOT <= 1 s"), Workers())
    assert (found.changed, found.gain, found.flags, found.helps) == ({}, 0.0, "", False)


def test_what_is_found_is_judged_on_seeds_that_the_search_has_not_seen(trace, latency):
    points = points_of(trace, latency, max_num_batched_tokens=8, rate=4.0, arrivals="poisson", seeds=2)
    found = tune(points, Objective.parse("mean TTFT <= 1 s"), Workers())
    assert found.interval is not None and found.interval[0] <= found.gain <= found.interval[1]
    judged = points_of(trace, latency, max_num_batched_tokens=8, rate=4.0, arrivals="poisson", seeds=2, seed=2)
    alone = tune(judged, Objective.parse("mean TTFT <= 1 s"), Workers())
    assert alone.num_runs and found.before != alone.before, "these are judged on seeds 4 and 5"


@pytest.mark.parametrize(
    ("changed", "gain", "interval", "helps"),
    [
        ({"max_num_seqs": 8}, 0.2, (0.1, 0.3), True),
        ({"max_num_seqs": 8}, 0.2, (-0.1, 0.5), False),
        ({"max_num_seqs": 8}, 0.2, None, True),
        ({"max_num_seqs": 8}, -0.1, None, False),
        ({}, 0.0, None, False),
    ],
)
def test_a_change_helps_if_its_gain_is_surely_above_zero(changed, gain, interval, helps):
    assert Tuning(changed, 1.0, 0.8, gain, interval, 9).helps is helps


def test_a_run_that_does_not_serve_every_request_is_the_worst():
    terms = {statistic: 0.5 for statistic in ("mean", "p50", "p90", "p95", "p99")}
    summary = {"requests": 3, "finished": 2, "ttft_s": terms, "tpot_s": terms}
    objective = Objective.parse("p99 TTFT <= 2 s and mean TPOT <= 1 s")
    assert objective.load_of(summary) == float("inf")
    assert objective.load_of(summary | {"finished": 3}) == 0.5


def test_the_command_prints_flags_or_that_none_helps(twinserve, trace, latency):
    common = ("tune", trace, "--latency", latency, "--objective", "mean TTFT <= 1 s", "--jobs", 1)
    found = twinserve(*common, "--max-num-batched-tokens", 8, "--max-num-seqs", 8)
    assert found.code == 0 and found.out.startswith("--max-num-batched-tokens "), found.out
    assert "one seed, so no interval" in found.out
    nothing = twinserve(*common[:4], "--objective", "mean TPOT <= 1 s", "--jobs", 1, "--limit", 1)
    assert nothing.code == 0 and nothing.out.startswith("none helps: "), nothing.out
    refused = twinserve("tune", trace, "--objective", "mean TTFT <= 1 s")
    assert refused.code == 2 and "expected a latency of the machine" in refused.err
