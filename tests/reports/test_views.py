"""What the page shows beyond a run's own numbers: names, verdicts, load, requests, fleets, residuals."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinserve.commands.records import _asked
from twinserve.planning.attainment import Attainment, Limits
from twinserve.policies import SamplingParams
from twinserve.reports.finder import BLOCKS, BUDGET, LOST, SEQUENCES, STEP, _packed, waited_for
from twinserve.reports.fleets import replica_figure, replica_table
from twinserve.reports.kv import kv_figure
from twinserve.reports.load import load_figure, rate_of
from twinserve.reports.page import differences
from twinserve.reports.replayed import replayed
from twinserve.reports.residuals import KINDS, residual_figure
from twinserve.reports.runs import COLORS, STORED, runs_of, style_of
from twinserve.reports.thin import binned
from twinserve.reports.timelines import batch_figure
from twinserve.settings.build_core import Settings
from twinserve.sim.fleet import Outage
from twinserve.sim.routers import LeastOutstanding
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.runs.vllm_records import load_run
from twinserve.worlds.run import ReplicaSpec, run_fleet
from twinserve.worlds.workload import Workload

TWO_TERMS = "p99 TTFT <= 400 ms and p99 TPOT <= 30 ms"


# --- names and styles ---


def test_runs_have_the_names_of_their_folders_and_as_much_of_the_path_as_tells_them_apart(tmp_path, sim):
    def at(*names):
        return [run.label for run in runs_of([replace(sim, path=tmp_path / name) for name in names])]

    assert at("fcfs", "fair") == ["fcfs", "fair"]
    assert at("a/sim", "b/sim") == ["a/sim", "b/sim"]
    assert at("sim", "sim") == ["sim (1)", "sim (2)"]
    long = at("x" * 80 + "1", "x" * 80 + "2")
    assert len(set(long)) == 2 and all(len(label) <= 36 for label in long)


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_eight_runs_tell_themselves_apart_on_white_and_on_black():
    styles = [style_of(number, is_real=False) for number in range(8)]
    assert len({style.full for style in styles}) == len({style.dash for style in styles}) == 8
    assert len({style.symbol for style in styles}) == 8
    for color in COLORS:
        assert contrast(color, "#ffffff") >= 3 and contrast(color, "#14181d") >= 3, color
    for one, other in combinations(COLORS, 2):
        steps = [abs(int(one[at : at + 2], 16) - int(other[at : at + 2], 16)) for at in (1, 3, 5)]
        assert sum(steps) >= 75, (one, other)


def test_real_runs_are_solid_and_simulations_are_not():
    assert {style_of(number, is_real=True).dash for number in range(8)} == {"solid"}
    assert "solid" not in {style_of(number, is_real=False).dash for number in range(8)}


# --- what was asked, and load ---


@pytest.mark.parametrize(
    "form", ["90% of requests with TTFT <= {} s and TPOT <= {} s", "p99 TTFT <= {} s and p99 TPOT <= {} s"]
)
def test_attainment_on_the_page_is_that_of_the_planner(make_record, form):
    record = make_record()
    (run,) = runs_of([record])
    asked = _asked(form.format(*(f"{run.summary[name]['p50']:.6f}" for name in ("ttft_s", "tpot_s"))))
    limits = Limits(tuple((name.removesuffix("_s"), limit) for name, limit in asked.limits_s.items()))
    kept = [row for row, is_kept in zip(record.requests, asked.kept(run), strict=True) if is_kept]
    for row in record.requests:
        took = {"ttft": row["first_token_ns"] - row["arrival_ns"], "e2e": row["finish_ns"] - row["arrival_ns"]}
        gaps = row["output_tokens"] - 1
        took["tpot"] = (row["finish_ns"] - row["first_token_ns"]) / gaps if gaps else 0
        assert (row in kept) == all(took[name] <= limit * 1e9 for name, limit in limits.of)
    counter = Attainment(limits)
    counter._kept, counter._tokens = len(kept), sum(row["output_tokens"] for row in kept)
    assert 0 < len(kept) < len(record.requests)
    assert {"limits": str(limits)} | asked.attainment(run) == counter.of(record.run["summary"])


def test_a_verdict_names_what_is_missed(make_record):
    (run,) = runs_of([make_record()])
    p99 = run.summary["ttft_s"]["p99"]
    assert _asked(f"p99 TTFT <= {p99 * 1.01:.6f} s").missed_by(run) == []
    missed = _asked(f"p99 TTFT <= {p99 * 0.5:.6f} s and p99 TPOT <= 60 s").missed_by(run)
    assert len(missed) == 1 and missed[0].startswith("p99 TTFT <= ")


def test_goodput_and_attainment_over_time_add_up_to_the_runs(sim):
    (run,) = runs_of([sim])
    asked = _asked("90% of requests with TTFT <= 300 ms")
    arrivals, goodput, share = load_figure([run], asked).data
    width = arrivals["x"][1] - arrivals["x"][0]
    assert sum(arrivals["y"]) * width == pytest.approx(len(sim.requests))
    assert sum(goodput["y"]) * width == pytest.approx(asked.kept(run).sum())
    for came, good, part in zip(arrivals["y"], goodput["y"], share["y"], strict=True):
        assert part is None if came == 0 else part == pytest.approx(good / came * 100)
    assert load_figure([run], asked).layout["shapes"][0]["y0"] == pytest.approx(90)


def test_a_rate_is_said_with_that_of_its_busiest_minute(sim):
    rows = [
        row | {"id": number, "arrival_ns": round(second * 1e9)}
        for number, (row, second) in enumerate(
            zip(sim.requests[:40], [*range(0, 300, 10), *range(301, 311)], strict=True)
        )
    ]
    (run,) = runs_of([replace(sim, requests=rows)])
    assert rate_of(run) == f"{39 / 310:.4g} requests/s, {14 / 60:.4g} in the busiest minute"
    (run,) = runs_of([replace(sim, requests=[row | {"arrival_ns": 5} for row in sim.requests])])
    assert rate_of(run) == "80 requests at once"


def test_what_runs_differ_in_holds_trace_load_and_latency(make_record, sim):
    trace = sim.run["facts"]["trace"] | {"path": "other.csv", "sha256": "77" * 32, "transforms": []}
    facts = {"trace": trace, "latency": {"name": "another line", "identity": "5a"}}
    told = differences(runs_of([sim, make_record("other", facts=facts, num_requests=40)]))
    assert told["trace"] == ["chat.jsonl", "other.csv"]
    assert told["transforms"] == ["limit (num_requests 80)", "none"]
    assert told["latency"] == ["a line", "another line"]
    assert "requests/s" in told["load"][0] and told["content of the trace"][1] == "77" * 6
    assert differences(runs_of([sim, sim])) == {}


# --- lines of long runs ---


@given(
    st.lists(st.tuples(st.floats(0.001, 5), st.integers(0, 9)), min_size=1, max_size=60),
    st.integers(1, 12),
    st.integers(1, 7),
)
def test_bins_hold_the_lowest_mean_and_highest_of_a_step_line(points, bins, groups):
    x = np.cumsum([gap for gap, _ in points])
    y = np.array([value for _, value in points])
    end = float(x[-1]) + 1.0
    fine = binned(x, y, 0.0, end, bins)
    whole = float(np.sum(y * np.diff(np.append(x, end))))
    assert fine.mean.sum() * fine.width_s == pytest.approx(whole, abs=1e-6)
    edges = np.linspace(0.0, end, bins + 1)
    for number in range(bins):
        inside = (x > edges[number]) & (x < edges[number + 1])
        held = y[np.searchsorted(x, edges[number], "right") - 1] if edges[number] >= x[0] else 0
        values = [held, *y[inside]]
        assert (fine.low[number], fine.high[number]) == (min(values), max(values))
    coarse = fine.grouped(groups)
    assert len(coarse.low) <= groups
    assert coarse.low.min() == fine.low.min() and coarse.high.max() == fine.high.max()


# --- requests ---


def test_every_request_is_packed_as_the_record_has_it(sim):
    (run,) = runs_of([sim])
    columns = {name: column["values"] for name, column in _packed(run, 0, _asked(TWO_TERMS))["columns"].items()}
    for at, row in enumerate(sim.requests):
        assert columns["id"][at] == row["id"] and columns["reason"][at] == row["finish_reason"]
        for name, end in (("wait", "first_scheduled_ns"), ("ttft", "first_token_ns"), ("e2e", "finish_ns")):
            assert columns[name][at] == round((row[end] - row["arrival_ns"]) / 1e3)
        for name, field in (("prompt", "prompt_tokens"), ("cached", "cached_tokens"), ("output", "output_tokens")):
            assert columns[name][at] == row[field]
    assert sum(columns["preemptions"]) == sim.run["summary"]["preemptions"] == len(_packed(run, 0, None)["preempted"])
    assert set(columns["kept"]) <= {"yes", "no"}


def test_what_a_request_waited_for_is_what_was_at_its_limit(make_record):
    def reasons(name, **settings):
        (run,) = runs_of([make_record(name, **settings)])
        return set(waited_for(run))

    roomy = {"num_gpu_blocks": 4000, "max_num_batched_tokens": 100_000, "max_num_seqs": 500}
    assert reasons("roomy", **roomy) == {STEP}
    assert reasons("seqs", **roomy | {"max_num_seqs": 2}) == {STEP, SEQUENCES}
    assert reasons("budget", **roomy | {"max_num_batched_tokens": 510, "max_num_seqs": 500}) <= {STEP, BUDGET}
    assert BUDGET in reasons("small", **roomy | {"max_num_batched_tokens": 64, "max_num_seqs": 64})
    assert reasons("blocks", **roomy | {"num_gpu_blocks": 30}) == {STEP, BLOCKS}


def test_what_a_record_without_decisions_waited_for_is_not_known(sim):
    bare = replace(sim, steps=[{key: row[key] for key in ("start_ns", "end_ns", "count")} for row in sim.steps])
    assert set(waited_for(runs_of([bare])[0])) == {None}


# --- fleets ---


class Flat:
    """Steps that cost by their tokens."""

    name = "flat"

    def step_cost(self, features):
        return 100_000, 12_000_000 + 40_000 * features.tokens


@pytest.fixture
def fleet(tmp_path):
    """The record of three replicas of which one was down for a second, and one for good."""
    requests = generate(
        seed=1,
        num_requests=90,
        rate=40,
        prompt_tokens=LengthSpec.parse("lognormal:80:0.8:1:300"),
        output_tokens=LengthSpec.parse("lognormal:30:0.6:2:90"),
    )
    spec = ReplicaSpec(Settings(max_num_seqs=8, num_gpu_blocks=200), Flat(), {"name": "flat", "identity": "00"})
    facts = {"path": "made", "sha256": "0" * 64, "transforms": []}
    outages = [Outage(1, 500_000_000, 1_500_000_000), Outage(2, 1_200_000_000)]
    run_fleet(
        Workload(requests, facts, 0, 0),
        [spec] * 3,
        LeastOutstanding(),
        router_facts={"name": "least-outstanding"},
        outages=outages,
        out=tmp_path / "fleet",
        params=SamplingParams(ignore_eos=True),
    )
    return load_run(tmp_path / "fleet")


def test_a_fleets_lines_are_the_sums_of_its_replicas(fleet):
    (run,) = runs_of([fleet])
    assert run.has_decisions and len(run.parts) == 4
    figure = batch_figure([run])
    running = next(trace for trace in figure.data if trace.get("yaxis") == "y")
    at = np.linspace(0.05, float(running["x"][-1]), 40)
    total = running["y"][np.searchsorted(running["x"], at, "right") - 1]
    expected = np.zeros(len(at), dtype=np.int64)
    for part in run.parts:
        x, y = part.over_time("running")
        place = np.searchsorted(x, at, "right") - 1
        expected += np.where(place >= 0, y[np.maximum(place, 0)], 0)
    assert total.tolist() == expected.tolist() and running["y"][-1] == 0 and total.max() > 8
    notes = kv_figure([run]).notes
    assert "of 600" in notes[0] and "The blocks of a replica count as free while it is down." in notes


def test_what_a_fleet_has_cached_is_the_sum_of_its_replicas_and_is_lost_with_one_that_dies(fleet):
    (run,) = runs_of([fleet])
    run = replace(run, cached=replayed(run).cached)
    (x, held), (same, stored) = run.over_time("used_blocks"), run.over_time(STORED)
    assert x.tolist() == same.tolist() and (held <= stored).all() and held[-1] == 0 < stored[-1] < stored.max() <= 600
    lasts = [part.over_time(STORED) for part in run.parts]
    assert [x[-1] for (x, _), part in zip(lasts, run.parts, strict=True) if part.died_s] == [0.5, 1.2]
    died = [part.died_s is not None for part in run.parts]
    assert [counts[-1] == 0 for _, counts in lasts] == died and sum(died) == 2
    assert sum(counts[-1] for _, counts in lasts) == stored[-1]


def test_what_was_lost_with_a_replica_waited_for_another(fleet):
    (run,) = runs_of([fleet])
    reasons = waited_for(run)
    assert reasons.count(LOST) == run.summary["retried"] > 0 and reasons.count(None) == 0


def test_a_fleets_gaps_between_tokens_are_those_of_its_summary(fleet):
    (run,) = runs_of([fleet])
    values, counts = run.latencies_s("itl_s")
    assert np.average(values, weights=counts) == pytest.approx(run.summary["itl_s"]["mean"])


def test_replicas_are_drawn_by_lane_and_outages_are_crossed_out(fleet):
    (run,) = runs_of([fleet])
    figure = replica_figure(run, 0)
    assert [trace["y"] for trace in figure.data] == [[0, 1, 2]] * 3
    assert len(figure.layout["shapes"]) == 6
    assert "replica 1 from 0.5 s to 1.5 s, replica 2 from 1.2 s on" in figure.notes[0]
    running = figure.data[0]
    down = (running["x"] > 1.25) & (running["x"] < 60)
    assert not np.array(running["z"][2])[down].any() and np.array(running["z"][0])[down].any()
    assert replica_figure(replace(run, replicas=()), 0) is None


def test_the_table_of_replicas_counts_every_request_once(fleet):
    (run,) = runs_of([fleet])
    rows = re.findall(r'<tr><th scope="row" data-value="(\d)">\d</th>(.*?)</tr>', replica_table(run))
    assert [replica for replica, _ in rows] == ["0", "1", "2"]
    counts = [float(re.findall(r'data-value="([\d.]+)"', cells)[0]) for _, cells in rows]
    assert sum(counts) == run.summary["finished"] == 90
    for (replica, _), found in zip(rows, counts, strict=True):
        assert found == sum(row["replica"] == int(replica) for row in fleet.requests if row["finish_reason"])


# --- residuals ---


def test_a_run_against_itself_has_no_residuals_and_one_that_is_slower_has_its_factor(sim, real):
    same = replace(real, run=real.run | {"world": "sim"})
    truth, copy = runs_of([real, same])
    figure = residual_figure(truth, [copy], 0)
    assert {trace["name"] for trace in figure.data} <= set(KINDS)
    assert all(value == pytest.approx(0, abs=1e-9) for trace in figure.data for value in trace["y"])
    slower = [row | {"end_ns": row["end_ns"] + (row["end_ns"] - row["start_ns"]) // 4} for row in real.steps]
    truth, slow = runs_of([real, replace(same, steps=slower)])
    figure = residual_figure(truth, [slow], 0)
    assert all(value == pytest.approx(25, abs=0.01) for trace in figure.data for value in trace["y"])
    assert all("+25.0% weighted by time" in note for note in figure.notes)
