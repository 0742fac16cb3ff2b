"""Requests that are turned away at the door, and clients that give up: by hand, and as laws of every fleet."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latencies import Constant
from random_fleets import CLIENTS, fleets
from shell import latency, twinserve

from twinserve.settings.build_core import Settings
from twinserve.sim.clients import REJECTED, Clients
from twinserve.sim.routers import LeastOutstanding, RoundRobin
from twinserve.traces.readers import write_trace
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.fleet_record import load_replicas
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import ReplicaSpec, run_fleet, run_sim
from twinserve.worlds.workload import Workload

__all__ = ["latency", "twinserve"]
MS = 10**6


def workload_of(rows: list[Request]) -> Workload:
    return Workload(rows, {"sha256": "0", "transforms": []}, 0, 0)


def served(rows, clients, out, **values):
    """Reasons by request, and the summary, of a replica whose steps take 10 ms; its record is decided again."""
    reasons = {}
    chosen = Settings.load({"max_num_seqs": 2, "enable_prefix_caching": False} | values)
    summary = run_sim(
        workload_of(rows),
        chosen,
        Constant(),
        latency_facts={"name": "made up"},
        out=out,
        progress=lambda seq: reasons.update({seq.seq_id: seq.finish_reason}),
        clients=clients,
    )
    assert replay(load_record(out)).is_exact
    return reasons, summary


def at(*rows: tuple[int, int, int], **values) -> list[Request]:
    return [Request(n, ms * MS, (Part(n, 0, prompt),), answer) for n, (ms, prompt, answer) in enumerate(rows)]


def test_who_finds_as_many_inside_as_may_be_is_turned_away(tmp_path):
    """Running ones count, as in vLLM 0.33."""
    rows = at(*[(0, 8, 3)] * 6, (35, 8, 3))
    reasons, summary = served(rows, Clients(max_num_queued_reqs=3), tmp_path / "run")
    assert reasons == {n: REJECTED if 3 <= n < 6 else "length" for n in range(7)}
    assert (summary["requests"], summary["finished"], summary["rejected"], summary["timed_out"]) == (4, 4, 3, 0)


def test_prompts_without_a_first_token_fill_the_door_whole_and_the_last_that_fits_passes_it(tmp_path):
    rows = at(*[(0, 30, 9)] * 4, (15, 30, 9))
    reasons, _ = served(rows, Clients(max_num_queued_tokens=60), tmp_path / "run", max_num_batched_tokens=16)
    # Two prompts are 60 tokens; after 15 ms the first has not computed all of its 30, which still count.
    assert reasons == {0: "length", 1: "length", 2: REJECTED, 3: REJECTED, 4: REJECTED}
    reasons, _ = served(at(*[(0, 30, 9)] * 2, (15, 30, 9)), Clients(max_num_queued_tokens=61), tmp_path / "more")
    assert set(reasons.values()) == {"length"}
    reasons, _ = served(at(*[(0, 30, 9)] * 4), Clients(max_num_queued_tokens=61), tmp_path / "one more")
    assert reasons == {0: "length", 1: "length", 2: "length", 3: REJECTED}


def test_a_client_that_gives_up_has_its_request_aborted_at_the_next_decision(tmp_path):
    rows = at((0, 8, 30), (5, 8, 10), (5, 8, 1))
    reasons, summary = served(rows, Clients(timeout_ns=105 * MS), tmp_path / "run")
    assert reasons == {0: "abort", 1: "length", 2: "abort"} and summary["timed_out"] == summary["aborted"] == 2
    finish = {row["id"]: row["finish_ns"] for row in load_record(tmp_path / "run").requests}
    assert finish == {0: 110 * MS, 1: 110 * MS, 2: 110 * MS}, "the last waited for a place until its client left"


def test_an_answer_that_is_complete_as_the_client_gives_up_counts(tmp_path):
    reasons, summary = served(at((0, 8, 3)), Clients(timeout_ns=30 * MS), tmp_path / "run")
    assert reasons == {0: "length"} and summary["timed_out"] == 0
    # An abort takes effect at the next decision: what the step gives that runs as the client leaves ends it before.
    assert served(at((0, 8, 3)), Clients(timeout_ns=21 * MS), tmp_path / "last")[0] == {0: "length"}
    assert served(at((0, 8, 3)), Clients(timeout_ns=19 * MS), tmp_path / "before")[0] == {0: "abort"}


def test_the_next_turn_of_who_was_turned_away_comes_all_the_same(tmp_path):
    rows = [*at((0, 8, 9), (0, 8, 9)), Request(2, 0, (Part(1, 0, 8),), 2, after=1, think_ns=200 * MS)]
    assert served(rows, Clients(max_num_queued_reqs=1), tmp_path / "run")[0] == {0: "length", 1: REJECTED, 2: "length"}


@settings(max_examples=25, deadline=None)
@given(fleets(), st.sampled_from([LeastOutstanding, RoundRobin]), CLIENTS)
def test_every_request_ends_once_and_every_life_is_decided_again(tmp_path_factory, fleet, router, clients):
    requests, core, latencies, how = fleet
    told = {}
    for step_by_step in (False, True):
        reasons: Counter = Counter()
        ends = []
        folder = tmp_path_factory.mktemp("doors") / "run"

        def progress(seq, reasons=reasons, ends=ends):
            reasons[seq.finish_reason] += 1
            ends.append((seq.seq_id, seq.finish_reason, seq.finish_ns))

        summary = run_fleet(
            workload_of(requests),
            [ReplicaSpec(core, one, {"name": "made up"}) for one in latencies],
            router(),
            router_facts={},
            **how,
            out=folder,
            progress=progress,
            step_by_step=step_by_step,
            clients=clients,
        )
        assert sorted(number for number, _, _ in ends) == [request.id for request in requests]
        counts = {name: summary.get(name, 0) for name in ("finished", "refused", "aborted", "rejected", "timed_out")}
        assert counts["finished"] == reasons["length"] and counts["refused"] == reasons["refused"]
        assert counts["rejected"] == reasons[REJECTED] and counts["timed_out"] == counts["aborted"] == reasons["abort"]
        assert summary["requests"] + counts["rejected"] == len(requests)
        assert all(replay(record).is_exact for record in load_replicas(folder))
        told[step_by_step] = sorted(ends, key=str)
    assert told[False] == told[True]


def test_the_command_and_a_capacity_count_them_apart(twinserve, latency, tmp_path):
    path = tmp_path / "trace.jsonl"
    write_trace(path, [Request(n, 20 * n * MS, (Part(n, 0, 24),), 6) for n in range(60)], {})
    common = (path, "--latency", latency, "--max-num-seqs", 4)
    fast = (*common, "--rate-scale", 50)
    result = twinserve("sim", *fast, "--max-num-queued-reqs", 8, "--json", "--within", "E2E <= 1 s")
    found = json.loads(result.out)
    assert result.code == 3 and "turned away or given up" in result.err
    assert found["rejected"] > 20 and found["requests"] + found["rejected"] == 60
    assert found["attainment"]["share"] == pytest.approx(found["finished"] / 60)
    shown = twinserve("sim", *fast, "--client-timeout-s", 0.05).out
    assert "timed out" in shown and "0 rejected" in shown
    search = ("--objective", "p99 TTFT <= 100 s", "--jobs", 1, "--tolerance", 0.2, "--json")
    limited = json.loads(twinserve("capacity", *common, *search, "--max-num-queued-reqs", 2).out)
    assert limited["value"] is not None and limited["missed"][0].endswith("requests not served")
    refused = twinserve("sim", *common, "--client-timeout-s", 0)
    assert refused.code == 2 and "client_timeout_s is 0.0, expected" in refused.err
