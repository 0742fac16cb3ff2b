"""Autoscaling: when replicas are asked for, when they are up, when they go, and what they cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from latencies import Constant, Uneven

from twinserve.planning.sweep import cost_of
from twinserve.reports.runs import runs_of
from twinserve.settings.build_core import Settings
from twinserve.sim.routers import LeastOutstanding, RoundRobin
from twinserve.sim.scaling import Scaling
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.fleet_record import load_fleet, load_replicas
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import ReplicaSpec, run_fleet
from twinserve.worlds.workload import Workload

MS = 10**6
RULE = Scaling("outstanding", 2.0, 1, period_ns=100 * MS, start_ns=50 * MS, settle_ns=200 * MS)


def run(folder: Path, requests: list[Request], scaling: Scaling, router: Any = None, **options: Any) -> dict[str, Any]:
    values = {"max_num_seqs": 1, "max_num_batched_tokens": 128, "num_gpu_blocks": 60} | options.pop("values", {})
    spec = ReplicaSpec(Settings.load(values), options.pop("latency", Constant()), {"name": "test"})
    workload = Workload(requests, {"sha256": "0", "transforms": []}, 0, 0)
    how: dict[str, Any] = {"router_facts": {"name": "test"}, "scaling": scaling, "out": folder}
    return run_fleet(workload, [spec] * 3, router or RoundRobin(), **how, **options)


def request(number: int, arrival_ms: int) -> Request:
    """One that takes a replica for 400 ms: 40 steps of 10."""
    return Request(number, arrival_ms * MS, (Part(number, 0, 16),), 40)


REQUESTS = [*(request(number, 0) for number in range(8)), request(8, 120), request(9, 200)]


def test_replicas_are_begun_and_gone_by_the_rule(tmp_path):
    summary = run(tmp_path / "run", REQUESTS, RULE)
    # At 100 there are 8 requests, of which 4 replicas would have 2 each: two more are begun, as many as there can be,
    # and are up at 150. The request of 120 still goes to the first, that of 200 to the second.
    rows = {row["id"]: row for row in load_fleet(tmp_path / "run").requests}
    assert (rows[8]["replica"], rows[9]["replica"]) == (0, 1)
    assert (rows[9]["ingested_ns"], rows[9]["finish_ns"]) == (200 * MS, 600 * MS)
    # 4 requests are left from 2,000 on, which is seen at 2,100, and has lasted for 200 ms at 2,300; 2 from 2,800 on.
    times = [
        tuple(lease[name] and lease[name] / MS for name in ("from_ns", "up_ns", "to_ns")) for lease in summary["leases"]
    ]
    assert times == [(0, 0, None), (100, 150, 3100), (100, 150, 2300)]
    assert summary["duration_s"] == 3.6 and summary["replica_s"] == pytest.approx(3.6 + 3.0 + 2.2)


def test_one_that_is_needed_no_more_ends_what_it_has_before_it_goes(tmp_path):
    """A request comes to the third just before it is too many."""
    late = [*REQUESTS, request(10, 2280), request(11, 2290)]
    summary = run(tmp_path / "run", late, RULE)
    rows = {row["id"]: row for row in load_fleet(tmp_path / "run").requests}
    assert summary["finished"] == 12 and {rows[10]["replica"], rows[11]["replica"]} == {2, 0}
    gone = [lease["to_ns"] for lease in summary["leases"] if lease["replica"] == 2]
    ended = max(row["finish_ns"] for row in rows.values() if row["replica"] == 2)
    assert gone[0] is None or gone[0] >= ended


def test_one_that_is_about_to_go_does_not_count_as_there(tmp_path):
    """The second has a long answer when it is too many; what comes then asks for another in its stead."""
    long = Request(3, 160 * MS, (Part(3, 0, 16),), 250)
    requests = [*(request(number, 0) for number in range(3)), long, *(request(number, 1250) for number in range(4, 8))]
    leases = run(tmp_path / "run", requests, RULE)["leases"]
    assert [(lease["replica"], lease["from_ns"] / MS) for lease in leases] == [(0, 0), (1, 100), (2, 1300)]
    assert leases[1]["to_ns"] == 2660 * MS


def test_within_the_tolerance_and_before_a_cold_start_has_ended_nobody_more_is_begun(tmp_path):
    cold = Scaling("outstanding", 4.0, 1, period_ns=100 * MS, start_ns=1000 * MS, settle_ns=10**12)
    summary = run(tmp_path / "cold", REQUESTS, cold)
    assert [lease["from_ns"] / MS for lease in summary["leases"]] == [0, 100, 200]
    near = Scaling("outstanding", 7.5, 1, period_ns=100 * MS, start_ns=0, settle_ns=10**12)
    assert len(run(tmp_path / "near", REQUESTS[:8], near)["leases"]) == 1


@pytest.mark.parametrize(
    ("outstanding", "count", "wanted"),
    [([2, 3], 2, 2), ([2, 4], 2, 2), ([3, 5], 2, 3), ([5, 9], 2, 5), ([0, 0, 1], 3, 2), ([5, 0], 3, 2), ([40], 2, 6)],
)
def test_wanted_is_what_brings_the_metric_to_its_target_between_the_least_and_the_most(outstanding, count, wanted):
    """The target is 3 of each, and a quarter off changes nothing: for 2, from 4.5 to 7.5 altogether."""
    rule = Scaling("outstanding", 3.0, least=2, tolerance=0.25)
    up = [SimpleNamespace(outstanding_requests=number) for number in outstanding]
    assert rule.wanted(up, count, 6) == wanted  # type: ignore[arg-type]


def test_just_at_the_tolerance_nothing_changes():
    up = [SimpleNamespace(outstanding_requests=5)]
    assert Scaling("outstanding", 4.0, tolerance=0.25).wanted(up, 1, 9) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("metric", "target"), [("waiting", 1.0), ("outstanding", 2.0), ("kv-use", 0.3)])
def test_nothing_is_lost_and_a_replica_that_comes_again_has_another_record(tmp_path, metric, target):
    requests = [
        *generate(seed=1, num_requests=40, rate=20, prompt_tokens=LengthSpec.parse("lognormal:60:1.0:1:200"),
                  output_tokens=LengthSpec.parse("lognormal:40:1.0:1:200"), turns=2, think_time_s=0.5),
    ]  # fmt: skip
    again = [Request(100 + r.id, r.arrival_ns + 8000 * MS, r.parts, r.max_tokens) for r in requests if r.after is None]
    rule = Scaling(metric, target, 1, period_ns=100 * MS, start_ns=200 * MS, settle_ns=300 * MS)
    found = [
        run(tmp_path / str(single), requests + again, rule, LeastOutstanding(), latency=Uneven(2), step_by_step=single,
            values={"max_num_seqs": 4})
        for single in (True, False)
    ]  # fmt: skip
    assert found[0]["finished"] == found[0]["requests"] == len(requests + again)
    assert found[0]["leases"] == found[1]["leases"] and len(found[0]["leases"]) > 3, "it scaled up twice"
    assert any(record.path.name.endswith(".1") for record in load_replicas(tmp_path / "True"))
    assert all(replay(record).is_exact for record in load_replicas(tmp_path / "False"))


def test_a_page_has_replicas_that_were_not_there_crossed_out(tmp_path):
    run(tmp_path / "run", REQUESTS, RULE)
    [page] = runs_of([load_fleet(tmp_path / "run")])
    assert page.outages == [(1, 0.0, 0.15), (1, 3.1, None), (2, 0.0, 0.15), (2, 2.3, None)]


def test_what_was_not_there_is_not_paid_for(tmp_path):
    summary = run(tmp_path / "run", REQUESTS, RULE)
    whole = {name: value for name, value in summary.items() if name != "leases"}
    paid, full = (cost_of([{"summary": one}], 3.6)["output"] for one in (summary, whole))
    assert paid is not None and full is not None and paid / full == pytest.approx(8.8 / (3 * 3.6))
