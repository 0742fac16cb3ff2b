"""The search for a capacity: against oracles that know the answer, and on a small trace."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinserve.planning.answers import sentences_of
from twinserve.planning.capacity import Found, Scale, find_capacities, largest, rows_of
from twinserve.planning.parallel import Workers
from twinserve.planning.point import Job
from twinserve.planning.sweep import Store, load_plan
from twinserve.settings.errors import InputError

OBJECTIVE = "p99 TTFT <= 1 s"


def answer(search, keeps):
    """Run a search against an oracle; what it found, and what it asked."""
    asked = [next(search)]
    try:
        while True:
            asked.append(search.send(keeps(asked[-1])))
    except StopIteration as end:
        return end.value, asked


@given(
    lowest=st.integers(-300, 0),
    span=st.integers(0, 600),
    place=st.floats(0, 1),
    edge=st.integers(-320, 320),
    stride=st.integers(1, 40),
)
def test_a_search_finds_the_edge_of_any_monotone_oracle_and_asks_nothing_twice(lowest, span, place, edge, stride):
    highest = lowest + span
    start = lowest + round(place * span)
    found, asked = answer(largest(start, lowest, highest, stride), lambda number: number <= edge)
    assert found == Found(
        None if edge < lowest else min(edge, highest), None if edge >= highest else max(edge + 1, lowest)
    )
    assert len(asked) == len(set(asked)) and all(lowest <= number <= highest for number in asked)
    assert len(asked) <= 3 + 3 * math.log2(span + 2)


def test_neighbouring_rates_are_a_tolerance_apart_and_the_same_for_every_search():
    scale = Scale("rate", 0.05)
    rates = [scale.value(number) for number in range(-100, 100)]
    assert all(high / low == pytest.approx(1.05, rel=1e-5) for low, high in zip(rates, rates[1:], strict=False))
    assert scale.value(0) == 1.0


class Oracle:
    """Computes points in no time: TTFT is over the limit beyond a load that depends on the seed.

    Of replicas it is the less the more there are, unless there is a `floor` in seconds.
    """

    def __init__(self, limits, sought="rate", misses=(), floor=0.0):
        self.limits, self.sought, self.misses, self.floor = limits, sought, set(misses), floor
        self.asked = []

    def __call__(self, job: Job):
        point = job.point
        value = point.rate if self.sought == "rate" else point.fleet.num_replicas
        limit = self.limits[point.seed]
        keeps = (value <= limit if self.sought == "rate" else value >= limit) and value not in self.misses
        self.asked.append((point.seed, value))
        summary = {"requests": 1, "finished": 1, "output_tok_s": 10.0, "total_tok_s": 100.0}
        missed_s = 2.0 if self.sought == "rate" else max(1.0 + limit / value, self.floor)
        return {"inputs": job.inputs, "summary": summary | {"ttft_s": {"p99": 0.5 if keeps else missed_s}}}


def plan_of(trace, latency, **values):
    fields = {"trace": str(trace), "latency": str(latency), "shuffle_seed": 0, "objective": OBJECTIVE}
    return load_plan(None, fields | values)


def found_by(oracle, plan, sought="rate", **options):
    return find_capacities(plan, sought, Store(), Workers(), compute=oracle, **options)


def test_the_rate_is_what_every_seed_keeps_and_the_next_rate_is_not(trace, latency):
    oracle = Oracle([10.0, 9.0, 12.0])
    (capacity,) = found_by(oracle, plan_of(trace, latency, seeds=3), tolerance=0.02)
    assert 9.0 / 1.02 < capacity.value <= 9.0 < capacity.failed
    assert capacity.failed == pytest.approx(capacity.value * 1.02, rel=1e-5)
    assert capacity.missed == ["p99 TTFT <= 1 s"]
    for found, limit in zip(capacity.by_seed, oracle.limits, strict=True):
        assert limit / 1.02 < found <= limit
    assert capacity.mean == pytest.approx(sum(capacity.by_seed) / 3)
    low, high = capacity.interval
    assert low < capacity.mean < high
    assert {(seed, capacity.value) for seed in range(3)} <= set(oracle.asked), "it was run with every seed"
    assert len(oracle.asked) == len(set(oracle.asked)), "nothing was computed twice"


def test_one_seed_has_no_interval(trace, latency):
    (capacity,) = found_by(Oracle([10.0]), plan_of(trace, latency))
    assert capacity.interval is None and capacity.mean == capacity.value


def test_where_a_seed_misses_what_all_should_keep_the_next_lower_rate_is_tried(trace, latency):
    scale = Scale("rate", 0.02)
    edge = next(number for number in range(300) if scale.value(number) > 9.0) - 1
    oracle = Oracle([9.0, 12.0])
    oracle.limits[1] = 12.0
    (first,) = found_by(oracle, plan_of(trace, latency, seeds=2))
    assert first.value == scale.value(edge)

    class Uneven(Oracle):
        def __call__(self, job):
            result = super().__call__(job)
            if job.point.seed == 1 and job.point.rate == scale.value(edge):
                result["summary"]["ttft_s"]["p99"] = 2.0
            return result

    (second,) = found_by(Uneven([9.0, 12.0]), plan_of(trace, latency, seeds=2))
    assert (second.value, second.failed) == (scale.value(edge - 1), scale.value(edge))


def test_no_rate_is_an_answer_that_a_seed_by_itself_has_missed(trace, latency):
    """Though it may keep it the next time, where more load happens to be better than less."""
    oracle = Oracle([9.0, 12.0])

    class Lucky(Oracle):
        def __call__(self, job):
            result = super().__call__(job)
            if job.point.rate > 11.0 and self.asked.count((1, job.point.rate)):
                result["summary"]["ttft_s"]["p99"] = 0.5 if job.point.rate < 12.0 else 2.0
            return result

    (capacity,) = found_by(Lucky([9.0, 12.0]), plan_of(trace, latency, seeds=2))
    (usual,) = found_by(oracle, plan_of(trace, latency, seeds=2))
    assert capacity.value == usual.value <= 9.0
    searched = len({rate for seed, rate in oracle.asked if seed == 0}) + len({r for s, r in oracle.asked if s == 1})
    assert len(oracle.asked) == searched and usual.num_runs <= searched + 2, "no rate above it was run with every seed"


def test_the_fewest_replicas_are_found(trace, latency):
    oracle = Oracle([11, 13], "replicas")
    (capacity,) = found_by(oracle, plan_of(trace, latency, seeds=2, price_per_gpu_hour=2.0), "replicas")
    assert (capacity.value, capacity.failed, capacity.by_seed) == (13, 12, [11, 13])
    (row,) = rows_of(plan_of(trace, latency, seeds=2, price_per_gpu_hour=2.0), [capacity])
    assert row["cost"] == {"output": pytest.approx(13 * 2 / 3600 / 10 * 1e6), "total": pytest.approx(13 * 2 / 0.36)}
    (alone,) = found_by(Oracle([1], "replicas"), plan_of(trace, latency, replicas=6), "replicas")
    assert (alone.value, alone.failed) == (1, None)
    near = Oracle([11], "replicas")
    found_by(near, plan_of(trace, latency, replicas=12), "replicas")
    assert [value for _, value in near.asked] == [12, 11, 9, 10], "the search begins where the plan says"


def test_a_floor_that_no_number_of_replicas_lowers_ends_the_search(trace, latency):
    oracle = Oracle([1.5], "replicas", misses=range(2000), floor=3.0)
    plan = plan_of(trace, latency)
    (capacity,) = found_by(oracle, plan, "replicas")
    assert capacity.value is None and capacity.has_floor and capacity.missed == [OBJECTIVE]
    assert [value for _, value in oracle.asked] == [1, 2], "twice as many miss it as far"
    (sentence,) = (line for line in sentences_of(plan, capacity, {}) if OBJECTIVE in line)
    assert sentence == f"No number of replicas keeps {OBJECTIVE}: {OBJECTIVE} is missed as far with more of them."
    slow = Oracle([300], "replicas", floor=1.2)
    (found,) = found_by(slow, plan_of(trace, latency, replicas=100), "replicas")
    assert found.value == 300 and not found.has_floor, "from 100 to 101 little changes, which is no floor"


def test_what_no_rate_or_every_rate_keeps_is_said(trace, latency):
    (none,) = found_by(Oracle([0.0]), plan_of(trace, latency))
    assert none.value is None and none.mean is None and none.interval is None and none.failed > 0
    (all_,) = found_by(Oracle([math.inf]), plan_of(trace, latency))
    assert all_.failed is None and all_.value > 1000 and all_.missed == []


def test_cases_are_searched_side_by_side_in_the_order_of_the_plan(trace, latency):
    plan = plan_of(trace, latency, grid={"max_num_seqs": [2, 4, 8]})
    capacities = found_by(Oracle([10.0]), plan)
    assert [capacity.case.varied["max_num_seqs"] for capacity in capacities] == [2, 4, 8]


def test_the_rate_found_on_a_real_trace_keeps_the_objective_and_the_next_one_does_not(twinserve, trace, latency):
    objective = "p99 TTFT <= 15 ms"
    common = (trace, "--latency", latency, "--max-num-seqs", 4)
    result = twinserve("capacity", *common, "--objective", objective, "--tolerance", 0.05, "--jobs", 1, "--json")
    assert result.code == 0, result.err
    (row,) = map(json.loads, result.out.splitlines())
    assert row["failed"] == pytest.approx(row["value"] * 1.05, rel=1e-5)
    for rate, keeps in ((row["value"], True), (row["value"] * 1.05, False)):
        plan = load_plan(None, {"trace": str(trace), "latency": str(latency), "max_num_seqs": 4, "rate": rate})
        job = Job.of(plan.points[0])
        factor = job.point.workload().facts["transforms"][-1]["parameters"]["factor"]
        summary = json.loads(twinserve("sim", *common, "--rate-scale", factor, "--json").out)
        assert (summary["ttft_s"]["p99"] <= 0.015) is keeps


def test_a_page_is_written_though_nothing_keeps_the_objective(twinserve, trace, latency, tmp_path):
    out = tmp_path / "out"
    options = ("--latency", latency, "--objective", "p99 TTFT <= 1 ms", "--price", 2, "--tolerance", 0.5, "--out", out)
    result = twinserve("capacity", trace, *options, "--jobs", 1)
    assert result.code == 0, result.err
    assert json.loads((out / "results.jsonl").read_text())["value"] is None
    assert "p99 TTFT <= 1 ms" in result.out and "No case keeps the objective." in (out / "page.html").read_text()
    again = twinserve("capacity", trace, *options, "--jobs", 1)
    assert again.out == result.out


@pytest.mark.parametrize(
    ("values", "words"),
    [({"objective": None}, "objective is missing"), ({}, "tolerance is 0.0, expected a share")],
)
def test_bad_requests_are_refused(trace, latency, values, words):
    plan = load_plan(None, {"trace": str(trace), "latency": str(latency), "objective": OBJECTIVE} | values)
    with pytest.raises(InputError, match=words):
        find_capacities(plan, "rate", Store(), Workers(), tolerance=0.0)
