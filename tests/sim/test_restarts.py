"""Replicas that are drained and restarted, and such as are slow: by hand, and as laws of every fleet."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latencies import Constant
from random_fleets import fleets
from shell import latency, trace, twinserve

from twinserve.planning.fleets import FleetOptions
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.fleet import Restart
from twinserve.sim.routers import LeastOutstanding, RoundRobin
from twinserve.sim.slowness import Slowdown, SlowLatency
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.fleet_record import load_replicas
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import ReplicaSpec, run_fleet
from twinserve.worlds.workload import Workload

__all__ = ["latency", "trace", "twinserve"]
MS = 10**6


def fleet(out, requests, latencies, router, chosen=None, **options):
    """The summary, the ends by request, and the records of the replicas, by their folders' names."""
    ends = {}
    core = chosen or Settings.load({"max_num_seqs": 4, "enable_prefix_caching": False})
    summary = run_fleet(
        Workload(requests, {"sha256": "0", "transforms": []}, 0, 0),
        [ReplicaSpec(core, one, {"name": "made up"}) for one in latencies],
        router,
        router_facts={},
        out=out,
        progress=lambda seq: ends.update({seq.seq_id: seq.finish_ns}),
        **options,
    )
    records = {record.path.name: record for record in load_replicas(out)}
    assert all(replay(record).is_exact for record in records.values())
    return summary, ends, records


def every(ms: int, count: int, answer: int) -> list[Request]:
    return [Request(n, ms * n * MS, (Part(n, 0, 8),), answer) for n in range(count)]


def test_a_drained_replica_ends_what_it_has_gets_nothing_more_and_comes_back_empty(tmp_path):
    restart = Restart((0,), 25 * MS, 100 * MS)
    summary, ends, records = fleet(
        tmp_path / "run", every(10, 30, 6), [Constant(), Constant()], RoundRobin(), restarts=[restart]
    )
    assert summary["finished"] == 30 and summary["retries"] == 0 and set(records) == {"0", "0.1", "1"}
    before = [row for row in records["0"].requests]
    assert [row["id"] for row in before] == [0, 2] and all(row["finish_reason"] == "length" for row in before)
    emptied_ns = max(row["finish_ns"] for row in before)
    assert emptied_ns == 80 * MS, "the latter came at 20 ms and takes six steps"
    back = min(row["arrival_ns"] for row in records["0.1"].requests)
    assert back == 180 * MS, "it is down for 100 ms from when it is empty"
    assert {row["id"] for row in records["1"].requests} >= set(range(3, 18))


def test_all_are_restarted_one_after_another_and_a_fleet_of_one_keeps_its_clients_waiting(tmp_path):
    rolling = Restart((0, 1, 2), 0, 50 * MS)
    _, _, records = fleet(tmp_path / "all", every(10, 40, 3), [Constant()] * 3, LeastOutstanding(), restarts=[rolling])
    assert set(records) == {"0", "0.1", "1", "1.1", "2", "2.1"}
    begins = [min(row["ingested_ns"] for row in records[f"{index}.1"].requests) for index in range(3)]
    assert begins == sorted(begins) and begins[1] - begins[0] >= 50 * MS and begins[2] - begins[1] >= 50 * MS
    alone = Restart((0,), 15 * MS, 100 * MS)
    _, ends, records = fleet(tmp_path / "one", every(10, 4, 3), [Constant()], RoundRobin(), restarts=[alone])
    # The first two end after 40 ms; the others wait before the router until 140 ms.
    assert [ends[number] for number in range(4)] == [30 * MS, 40 * MS, 170 * MS, 170 * MS]


@pytest.mark.parametrize("router", [LeastOutstanding, RoundRobin])
def test_a_slow_replica_takes_longer_in_its_time_and_routers_that_look_at_queues_send_it_less(tmp_path, router):
    slow = Slowdown(0, 0, 400 * MS, 5.0)
    options = {"slowdowns": [slow]}
    _, _, records = fleet(tmp_path / "run", every(8, 50, 4), [Constant(), Constant()], router(), **options)
    for row in records["0"].steps:
        assert row["end_ns"] - row["start_ns"] == (50 * MS if row["decided_ns"] < 400 * MS else 10 * MS)
    assert {row["end_ns"] - row["start_ns"] for row in records["1"].steps} == {10 * MS}
    share = len(records["0"].requests) / 50
    assert share == 0.5 if router is RoundRobin else share < 0.35


def test_what_looks_at_steps_is_told_of_them_on_a_slow_replica_too():
    class Watching(Constant):
        def watch(self, features, count=1):
            told.append(count)

    told = []
    slow = SlowLatency(Watching(), [])
    slow.watch(None, 3)
    assert told == [3] and not hasattr(SlowLatency(Constant(), []), "watch")


@settings(max_examples=30, deadline=None)
@given(fleets(), st.integers(0, 1500), st.integers(0, 800), st.floats(0.5, 6), st.booleans())
def test_every_request_ends_once_as_replicas_are_restarted_and_slow(
    tmp_path_factory, drawn, from_ms, down_ms, factor, step_by_step
):
    requests, core, latencies, _ = drawn
    told = []
    for singly in (step_by_step, not step_by_step):
        summary, ends, _ = fleet(
            tmp_path_factory.mktemp("laws") / "run",
            requests,
            latencies,
            LeastOutstanding(),
            core,
            restarts=[Restart(tuple(range(len(latencies))), from_ms * MS, down_ms * MS)],
            slowdowns=[Slowdown(0, from_ms * MS, None, factor)],
            step_by_step=singly,
        )
        assert sorted(ends) == [request.id for request in requests]
        assert summary["finished"] + summary["refused"] == len(requests) and summary["retries"] == 0
        told.append(ends)
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"restart": ["5:1:1"], "replicas": 2}, "restart of 5, expected a replica from 0 to 1"),
        ({"restart": ["0:1:1"], "die": ["0:2:3"], "replicas": 2}, "expected one that neither dies nor is restarted"),
        ({"restart": ["all:1:1", "1:9:1"], "replicas": 2}, "restart of 1, expected one that neither"),
        ({"restart": ["x:1:1"]}, "REPLICA:FROM:DOWN in seconds"),
        ({"restart": ["0:-1:1"]}, "REPLICA:FROM:DOWN in seconds"),
        ({"slow": ["2:0:1:2"], "replicas": 2}, "slow is 2, expected a replica from 0 to 1"),
        ({"slow": ["0:5:1:2"]}, "REPLICA:FROM:TO:FACTOR in seconds"),
        ({"slow": ["0:0::0"]}, "REPLICA:FROM:TO:FACTOR in seconds"),
        ({"slow": ["0:0::nan"]}, "REPLICA:FROM:TO:FACTOR in seconds"),
    ],
)
def test_what_cannot_be_restarted_or_slow_is_refused_in_one_line(values, words):
    with pytest.raises(InputError) as refused:
        FleetOptions.load(values)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_the_command_and_a_plan_take_both(twinserve, trace, latency, tmp_path):
    fast = ("--replicas", 2, "--restart", "all:0.05:0.2", "--slow", "1:0::3")
    result = twinserve("sim", trace, "--latency", latency, *fast, "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["finished"] == 12
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]["fleet"]
    assert facts["restarts"] == [{"replicas": [0, 1], "from_ns": 50 * MS, "down_ns": 200 * MS}]
    assert facts["slowdowns"] == [{"replica": 1, "from_ns": 0, "to_ns": None, "factor": 3.0}]
    path = tmp_path / "plan.toml"
    path.write_text(
        f'trace = "{trace}"\nlatency = "{latency}"\nreplicas = 2\nrouter = "least-outstanding"\n'
        "[[list]]\n[[list]]\nslow = ['0:0::4']\n[[list]]\nrestart = ['all:0.1:0.3']\n"
    )
    swept = twinserve("sweep", path, "--out", tmp_path / "out", "--json", "--jobs", 1)
    assert swept.code == 0, swept.err
    e2e = [json.loads(line)["summary"]["e2e_s"]["mean"] for line in swept.out.splitlines()]
    assert e2e[1] > e2e[0] and len(set(e2e)) == 3
