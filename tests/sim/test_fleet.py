"""A fleet serves every request once, whoever dies, and each of its replicas is one that could run by itself."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from latencies import Constant, Uneven

from twinserve.planning.fleets import FleetOptions
from twinserve.policies import CoreListener, SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.sim.fleet import FleetListener, Outage, check_outages, simulate_fleet
from twinserve.sim.routers import (
    KvEvents,
    LeastKvUse,
    LeastOutstanding,
    LeastRemaining,
    PowerOfTwo,
    PrefixAffine,
    RandomChoice,
    RoundRobin,
    SessionSticky,
)
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.fleet_record import load_fleet, load_replicas
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import ReplicaSpec, run_fleet, run_sim
from twinserve.worlds.workload import Workload

S = 10**9
ROUTERS = {
    "round-robin": RoundRobin,
    "random": lambda: RandomChoice(3),
    "least-outstanding": LeastOutstanding,
    "power-of-two": PowerOfTwo,
    "least-kv-use": LeastKvUse,
    "kv-events": KvEvents,
    "session-sticky": SessionSticky,
    "oracle-least-remaining": LeastRemaining,
    "prefix-affine": lambda: PrefixAffine(max_lead_tokens=300, block_tokens=16),
}
OUTAGES = [Outage(1, S, 3 * S), Outage(0, 2 * S, 4 * S), Outage(1, 5 * S)]


def requests_of(seed: int, num_requests: int = 60) -> list[Request]:
    """Conversations of two turns with shared system prompts."""
    return generate(
        seed=seed,
        num_requests=num_requests,
        rate=10,
        prompt_tokens=LengthSpec.parse("lognormal:60:1.0:1:200"),
        output_tokens=LengthSpec.parse("lognormal:60:1.0:1:300"),
        num_system_prompts=2,
        system_prompt_tokens=40,
        turns=2,
        think_time_s=0.5,
    )


def settings(**values: Any) -> Settings:
    return Settings.load({"max_num_seqs": 8, "max_num_batched_tokens": 128, "num_gpu_blocks": 60} | values)


def specs(*latencies: Any, **values: Any) -> list[ReplicaSpec]:
    return [ReplicaSpec(settings(**values), latency, {"name": "test"}) for latency in latencies]


def fleet_run(
    folder: Path | None, requests: list[Request], replicas: list[ReplicaSpec], router: str, **more: Any
) -> dict:
    workload = Workload(requests, {"sha256": "0", "transforms": []}, 0, 0)
    return run_fleet(workload, replicas, ROUTERS[router](), router_facts={"name": router}, out=folder, **more)


def run_json(run: Path) -> dict:
    """The content of a run.json, but for what the summary says of the workload and of the wall clock."""
    content = json.loads((run / "run.json").read_text())
    for name in ("capped", "dropped"):
        content["summary"].pop(name, None)
    del content["summary"]["wall_s"]
    return content


def lives(folder: Path) -> list[Path]:
    return sorted((folder / "replicas").iterdir())


def test_one_replica_behind_a_router_is_a_replica_without_one(tmp_path):
    workload = Workload(requests_of(1), {"sha256": "0", "transforms": []}, 0, 0)
    [alone] = specs(Uneven())
    run_sim(workload, alone.settings, alone.latency, latency_facts=alone.latency_facts, out=tmp_path / "alone")
    fleet_run(tmp_path / "fleet", workload.requests, [alone], "least-outstanding")
    [life] = lives(tmp_path / "fleet")
    for name in ("requests.jsonl", "steps.jsonl"):
        assert (life / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert run_json(life) == run_json(tmp_path / "alone")
    summary = run_json(tmp_path / "fleet")["summary"]
    assert summary == run_json(life)["summary"] | {"retried": 0, "retries": 0}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("latency", [Uneven(), Constant()], ids=["uneven", "constant"])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_record_is_that_of_a_simulation_step_by_step(tmp_path, router, latency, depth):
    slower = Uneven(3) if isinstance(latency, Uneven) else latency
    replicas = specs(latency, latency, slower, pipeline_depth=depth)
    for name, step_by_step in (("single", True), ("leaping", False)):
        fleet_run(tmp_path / name, requests_of(2), replicas, router, outages=OUTAGES, step_by_step=step_by_step)
    singles, leapings = lives(tmp_path / "single"), lives(tmp_path / "leaping")
    assert [life.name for life in singles] == [life.name for life in leapings] == ["0", "0.1", "1", "1.1", "2"]
    for single, leaping in zip(singles, leapings, strict=True):
        assert (single / "requests.jsonl").read_bytes() == (leaping / "requests.jsonl").read_bytes()
        one, other = load_record(single), load_record(leaping)
        assert len(one.steps) == len(other.steps) > 0
        for step, leapt in zip(one.steps, other.steps, strict=True):
            assert leapt == {field: value for field, value in step.items() if field in leapt}
        one.run["summary"].pop("events"), other.run["summary"].pop("events")
        assert one.run == other.run
        assert replay(other).is_exact
    summaries = [run_json(tmp_path / name)["summary"] for name in ("single", "leaping")]
    events = [summary.pop("events") for summary in summaries]
    assert summaries[0] == summaries[1] and events[1] < events[0]


@pytest.mark.parametrize("router", ROUTERS)
def test_a_death_loses_nothing(tmp_path, router):
    requests = requests_of(5)
    summary = fleet_run(tmp_path / "fleet", requests, specs(*[Uneven()] * 3), router, outages=OUTAGES)
    assert summary["retried"] > 0
    assert summary["requests"] == summary["finished"] == len(requests)
    rows = load_fleet(tmp_path / "fleet").requests
    assert sorted(row["id"] for row in rows) == [request.id for request in requests]
    by_id = {request.id: request for request in requests}
    for row in rows:
        assert row["output_tokens"] == by_id[row["id"]].max_tokens
        assert row["arrival_ns"] <= row["ingested_ns"] <= row["first_scheduled_ns"] < row["first_token_ns"]
        if row["after"] is None:
            assert row["arrival_ns"] == by_id[row["id"]].arrival_ns, "it counts from its first arrival"


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("failover_ns", [S // 3, 2 * S, 100 * S])
def test_a_death_that_is_noticed_late_loses_nothing(tmp_path, router, failover_ns):
    requests = requests_of(5)
    replicas = specs(*[Uneven()] * 3)
    summaries = [
        fleet_run(tmp_path / str(single), requests, replicas, router, outages=OUTAGES[:2], failover_ns=failover_ns,
                  step_by_step=single)
        for single in (False, True)
    ]  # fmt: skip
    assert summaries[0]["retried"] > 0
    assert summaries[0]["requests"] == summaries[0]["finished"] == len(requests)
    assert all(replay(record).is_exact for record in load_replicas(tmp_path / "False"))
    assert summaries[0]["e2e_s"] == summaries[1]["e2e_s"]


@pytest.mark.parametrize(
    ("to_ns", "failover_ns", "noticed_ns"), [(None, 2 * S, 3 * S), (2 * S, 5 * S, 2 * S), (9 * S, 0, S)]
)
def test_until_a_death_is_noticed_requests_are_sent_to_the_dead_and_wait(to_ns, failover_ns, noticed_ns):
    """Or until the replica is back. Each of them needs ten milliseconds."""
    sent, ended = [], {}

    class Listener(FleetListener):
        def sent(self, request, replica):
            sent.append((request.id, replica))

    requests = [Request(number, number * S // 4, (Part(number, 0, 5),), 1) for number in range(40)]
    simulate_fleet(
        requests, [Constant()] * 2, RoundRobin(), Listener([Settings().build_core] * 2),
        outages=[Outage(1, S, to_ns)], failover_ns=failover_ns,
        progress=lambda seq: ended.update({seq.seq_id: seq.finish_ns}),
    )  # fmt: skip
    assert sorted(ended) == list(range(40)) and len(sent) == 40
    to_the_dead = [number for number in range(5, 40, 2) if S <= requests[number].arrival_ns < noticed_ns]
    for number in range(40):
        begun_ns = noticed_ns if number in to_the_dead else requests[number].arrival_ns
        assert ended[number] >= begun_ns and ended[number] - begun_ns < S // 4, number
    assert bool(to_the_dead) == (failover_ns > 0)


def test_what_was_lost_is_served_from_the_beginning_by_another(tmp_path):
    requests = [Request(number, 0, (Part(number, 0, 20),), 50) for number in range(4)]
    outages = [Outage(0, S // 10)]
    summary = fleet_run(tmp_path / "fleet", requests, specs(*[Constant()] * 2), "round-robin", outages=outages)
    assert (summary["retried"], summary["retries"]) == (2, 2)
    dead, other = load_replicas(tmp_path / "fleet")
    assert [(row["id"], row["finish_reason"]) for row in dead.requests] == [(0, None), (2, None)]
    assert dead.requests[0]["first_token_ns"] == S // 100, "it had begun"
    assert [row["id"] for row in other.requests] == [1, 3, 0, 2]
    again = {row["id"]: row for row in other.requests}
    assert again[0]["ingested_ns"] == S // 10 and again[0]["arrival_ns"] == 0
    assert again[0]["first_token_ns"] > S // 10
    assert dead.steps[-1]["decided_ns"] < S // 10 <= dead.steps[-1]["end_ns"], "the last step was in flight"


def test_what_replicas_had_that_die_together_is_sent_anew_in_the_order_of_the_requests(tmp_path):
    """Of five, the first and the fourth are on one of them, the second and the fifth on the other."""
    requests = [Request(number, 0, (Part(number, 0, 8),), 3) for number in range(5)]
    replicas = specs(Constant(), Constant(), Constant(), max_num_seqs=1)
    fleet_run(
        tmp_path / "fleet", requests, replicas, "round-robin", outages=[Outage(0, 5 * 10**6), Outage(1, 5 * 10**6)]
    )
    rows = load_fleet(tmp_path / "fleet").requests
    assert [row["id"] for row in sorted(rows, key=lambda row: row["finish_ns"])] == [2, 0, 1, 3, 4]


@pytest.mark.parametrize("died_ns", [S // 10, S // 10 - 1, S // 2, S // 2 - 1])
def test_times_in_the_summary_count_from_the_first_arrival_and_lost_tokens_do_not_count(tmp_path, died_ns):
    requests = [Request(number, 0, (Part(number, 0, 20),), 50) for number in range(2)]
    outages = [Outage(0, died_ns)]
    summary = fleet_run(tmp_path / "fleet", requests, specs(*[Constant()] * 2), "round-robin", outages=outages)
    rows = {row["id"]: row for row in load_fleet(tmp_path / "fleet").requests}
    mean = sum(row["finish_ns"] for row in rows.values()) / 2 / 1e9
    assert summary["e2e_s"]["mean"] == pytest.approx(mean, rel=1e-12)
    assert summary["output_tokens"] == 100
    assert {record.run["summary"]["itl_s"]["mean"] for record in load_replicas(tmp_path / "fleet")} == {None, 0.01}
    assert summary["retried"] == 1


@pytest.mark.parametrize("router", ROUTERS)
def test_requests_and_tokens_are_conserved(tmp_path, router):
    requests = requests_of(4)
    fleet_run(tmp_path / "fleet", requests, specs(*[Uneven()] * 3), router, outages=OUTAGES)
    records = load_replicas(tmp_path / "fleet")
    served = Counter(row["id"] for record in records for row in record.requests if row["finish_reason"])
    assert served == Counter(request.id for request in requests), "each is served once"
    for record in records:
        computed = sum(step["tokens"] for step in record.steps)
        sampled = sum(step["sampled"] for step in record.steps)
        if all(row["finish_reason"] for row in record.requests) and not record.run["summary"]["preemptions"]:
            assert sampled == sum(row["output_tokens"] for row in record.requests)
            assert computed == sum(
                row["prompt_tokens"] - row["cached_tokens"] + row["output_tokens"] - 1 for row in record.requests
            )


def test_requests_wait_while_nobody_is_up(tmp_path):
    requests = [Request(number, number * S, (Part(number, 0, 20),), 2) for number in range(5)]
    outages = [Outage(0, S + 1, 4 * S), Outage(1, S // 2, 4 * S)]
    fleet_run(tmp_path / "fleet", requests, specs(*[Constant()] * 2), "round-robin", outages=outages)
    rows = sorted(load_fleet(tmp_path / "fleet").requests, key=lambda row: row["id"])
    assert {row["id"]: row["ingested_ns"] for row in rows} == {0: 0, 1: 4 * S, 2: 4 * S, 3: 4 * S, 4: 4 * S}
    assert [row["arrival_ns"] for row in rows] == [0, S, 2 * S, 3 * S, 4 * S]


def test_turns_of_a_conversation_may_be_served_by_different_replicas(tmp_path):
    requests = requests_of(5)
    fleet_run(tmp_path / "fleet", requests, specs(Uneven(), Uneven()), "round-robin")
    rows = {row["id"]: row for row in load_fleet(tmp_path / "fleet").requests}
    think = {request.id: request.think_ns for request in requests}
    turns = [row for row in rows.values() if row["after"] is not None]
    assert {row["replica"] == rows[row["after"]]["replica"] for row in turns} == {True, False}
    assert all(row["arrival_ns"] >= rows[row["after"]]["finish_ns"] + think[row["id"]] for row in turns)


def test_affine_routing_hits_what_round_robin_misses(tmp_path):
    requests = requests_of(6)
    hits = {
        router: fleet_run(tmp_path / router, requests, specs(*[Uneven()] * 4), router)["cached_tokens"]
        for router in ("round-robin", "prefix-affine")
    }
    assert hits["prefix-affine"] > 1.2 * hits["round-robin"]


def test_replicas_differ_in_settings_and_latency(tmp_path):
    replicas = [*specs(Uneven(), max_num_seqs=8), *specs(Uneven(20), max_num_seqs=2)]
    fleet_run(tmp_path / "fleet", requests_of(7), replicas, "least-outstanding")
    fast, slow = load_replicas(tmp_path / "fleet")
    assert len(fast.requests) > 2 * len(slow.requests), "the slow one is sent less"
    assert max(step["running"] for step in slow.steps) == 2 < max(step["running"] for step in fast.steps)
    run = load_fleet(tmp_path / "fleet").run
    assert "max_num_seqs" not in run["settings"] and run["settings"]["num_gpu_blocks"] == 60
    assert [entry["settings"]["max_num_seqs"] for entry in run["facts"]["fleet"]["replicas"]] == [8, 2]


def test_the_router_is_told_what_is_outstanding():
    seen = []

    class Watching(RoundRobin):
        is_blind = False

        def choose(self, request, replicas):
            seen.append([(r.index, r.outstanding_requests, r.outstanding_tokens) for r in replicas])
            return super().choose(request, replicas)

    requests = [
        Request(0, 0, (Part(0, 0, 20),), 3),
        Request(1, 1, (Part(1, 0, 30),), 5),
        Request(2, S, (Part(2, 0, 1),), 1),
    ]
    listener = FleetListener([settings().build_core] * 2)
    simulate_fleet(requests, [Constant(), Constant()], Watching(), listener)
    assert seen == [[(0, 0, 0), (1, 0, 0)], [(0, 1, 21), (1, 0, 0)], [(0, 0, 0), (1, 0, 0)]]


@pytest.mark.parametrize("step_by_step", [True, False])
def test_a_router_does_not_see_how_long_answers_will_be_and_what_it_sees_counts_down(step_by_step):
    seen = []

    class Watching(RoundRobin):
        is_blind = False

        def choose(self, request, replicas):
            seen.append((replicas[0].outstanding_tokens, replicas[0].remaining_tokens))
            return super().choose(request, replicas)

    step = S // 100
    looks = [1, step + 1, 3 * step + 1, 20 * step + 1]
    probes = [Request(1 + number, at_ns, (Part(9, 0, 1),), 1) for number, at_ns in enumerate(looks)]
    for tokens in (10, 15):
        requests = [Request(0, 0, (Part(0, 0, 30),), tokens), *probes]
        router = Watching()
        router._next = 0
        listener = FleetListener([settings().build_core] * 9)
        simulate_fleet(requests, [Constant()] * 9, router, listener, step_by_step=step_by_step)
    known, true = zip(*seen, strict=True)
    assert known[:5] == known[5:] == (0, 31, 1, 1, 0), "whatever the length of the answer"
    assert true[1] == true[6] - 5 > true[2] > true[3] > true[4] == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_what_only_the_larger_half_can_serve_is_sent_there(tmp_path, router):
    small, large = specs(Constant(), max_model_len=64), specs(Constant(), max_model_len=512)
    requests = [Request(number, number * S, (Part(number, 0, 20 + 80 * (number % 2)),), 5) for number in range(8)]
    summary = fleet_run(tmp_path / "fleet", requests, [*small, *large], router)
    assert (summary["finished"], summary["refused"]) == (8, 0)
    rows = load_fleet(tmp_path / "fleet").requests
    assert {row["replica"] for row in rows if row["prompt_tokens"] == 100} == {1}


def test_an_answer_that_a_replica_would_shorten_is_not_kept_from_it(tmp_path):
    """Its pool holds all but the last of the tokens that it would make, which needs no KV."""
    small, large = specs(Constant(), max_model_len=65, num_gpu_blocks=4), specs(Constant())
    summary = fleet_run(tmp_path / "fleet", [Request(0, 0, (Part(0, 0, 32),), 100)], [*small, *large], "round-robin")
    [row] = load_fleet(tmp_path / "fleet").requests
    assert (row["replica"], row["output_tokens"], summary["shortened"]) == (0, 33, 1)


def test_what_only_a_replica_that_is_down_can_serve_waits_for_it(tmp_path):
    small, large = specs(Constant(), max_model_len=64), specs(Constant(), max_model_len=512)
    requests = [Request(0, S, (Part(0, 0, 100),), 5), Request(1, S, (Part(1, 0, 20),), 5)]
    fleet_run(tmp_path / "fleet", requests, [*small, *large], "round-robin", outages=[Outage(1, S // 2, 3 * S)])
    rows = {row["id"]: row for row in load_fleet(tmp_path / "fleet").requests}
    assert (rows[0]["replica"], rows[0]["ingested_ns"]) == (1, 3 * S)
    assert (rows[1]["replica"], rows[1]["ingested_ns"]) == (0, S)


def test_what_lies_in_the_inbox_of_a_replica_that_dies_is_counted_once(tmp_path):
    """It came in while a step was running, and the replica died before it decided again: "-1 requests not served"."""
    step = S // 100
    requests = [Request(number, number, (Part(number, 0, 20),), 50) for number in range(4)]
    outages = [Outage(0, step // 2)]
    summary = fleet_run(tmp_path / "fleet", requests, specs(Constant(), Constant()), "round-robin", outages=outages)
    assert summary["requests"] == summary["finished"] == 4
    assert (summary["retried"], summary["retries"]) == (1, 1), "one had been taken in, the other not"
    assert sorted(row["id"] for row in load_fleet(tmp_path / "fleet").requests) == [0, 1, 2, 3]


class LikeRoundRobin(RoundRobin):
    """Chooses as one that is blind, and does not say that it is."""

    is_blind = False


class LikeRandomChoice(RandomChoice):
    """Chooses as one that is blind, and does not say that it is."""

    is_blind = False


@pytest.mark.parametrize(("blind", "seeing"), [(RoundRobin, LikeRoundRobin), (RandomChoice, LikeRandomChoice)])
@pytest.mark.parametrize("depth", [0, 1])
def test_replicas_one_after_the_other_leave_the_records_of_replicas_side_by_side(tmp_path, blind, seeing, depth):
    requests = [request._replace(after=None, arrival_ns=request.arrival_ns // S * S) for request in requests_of(8)]
    workload = Workload(sorted(requests, key=lambda r: r.arrival_ns), {"sha256": "0", "transforms": []}, 0, 0)
    apart: list[Sequence] = []
    together: list[Sequence] = []
    for name, router, ends in (("apart", blind(), apart), ("together", seeing(), together)):
        replicas, facts = specs(Uneven(), Constant(), Uneven(), pipeline_depth=depth), {"name": "the same"}
        run_fleet(workload, replicas, router, router_facts=facts, out=tmp_path / name, progress=ends.append)
    assert files_of(tmp_path / "apart") == files_of(tmp_path / "together")
    assert [seq.finish_ns for seq in together] == sorted(seq.finish_ns or 0 for seq in together)
    assert [seq.seq_id for seq in apart] != [seq.seq_id for seq in together], "not in the order of time"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_router_that_chooses_nobody_is_refused():
    class Wrong:
        def choose(self, request, replicas):
            return 2

    listener = FleetListener([settings().build_core] * 2)
    with pytest.raises(ValueError, match="the router chose 2, expected a place from 0 to 1"):
        simulate_fleet(requests_of(8), [Constant(), Constant()], Wrong(), listener)


@pytest.mark.parametrize(
    ("outages", "words"),
    [
        ([Outage(2, 0, 1)], "outage 2:0:1e-09, expected a replica from 0 to 1"),
        ([Outage(0, 5 * S, 5 * S)], "outage 0:5:5, expected 0 <= from < to"),
        (
            [Outage(0, S, 3 * S), Outage(0, 3 * S, 4 * S)],
            "outage 0:3:4, expected one that begins after 0:1:3 has ended",
        ),
        ([Outage(0, S), Outage(0, 3 * S, 4 * S)], "expected one that begins after 0:1: has ended"),
        ([Outage(0, S), Outage(1, 2 * S)], "every replica dies and none comes back"),
    ],
)
def test_outages_that_cannot_be_are_refused(outages, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        check_outages(outages, 2)


@pytest.mark.parametrize(
    ("roles", "dead", "whose"), [("pdd", 0, "prefill"), ("ppd", 2, "decode"), ("bpd", 2, "decode")]
)
def test_prompts_and_what_follows_them_each_need_somebody_who_comes_back(roles, dead, whose):
    names = tuple({"p": "prefill", "d": "decode", "b": "both"}[role] for role in roles)
    with pytest.raises(ValueError, match=f"every {whose} replica dies and none comes back"):
        check_outages([Outage(dead, S)], 3, names)
    check_outages([Outage(dead, S, 2 * S)], 3, names)


def test_every_event_of_a_replica_is_heard_by_its_own_listener():
    heard: dict[tuple[int, int], list[int]] = {}

    class Listening(FleetListener):
        def begun(self, replica, life):
            ended = heard.setdefault((replica, life), [])

            class Log(CoreListener):
                def finished(self, seq):
                    ended.append(seq.seq_id)

            return settings().build_core(listener=Log())

    requests = [request._replace(after=None) for request in requests_of(9, 20)]
    requests = [Request(r.id, r.arrival_ns, (Part(r.id, 0, 9),), 30) for r in requests]
    simulate_fleet(
        requests,
        [Uneven()] * 2,
        RoundRobin(),
        Listening([]),
        params=SamplingParams(ignore_eos=True),
        outages=[Outage(0, S // 2, S)],
    )
    assert sorted(heard) == [(0, 0), (0, 1), (1, 0)]
    assert sorted(number for ended in heard.values() for number in ended) == list(range(20))


def test_a_replica_that_came_back_takes_as_long_as_it_did(tmp_path):
    requests = [Request(n, n * S, (Part(n, 0, 5),), 1) for n in range(6)]
    replicas = specs(Constant(10), Constant(1000))
    fleet_run(tmp_path / "fleet", requests, replicas, "round-robin", outages=[Outage(1, S // 2, 2 * S + 1)])
    records = {record.path.name: record for record in load_replicas(tmp_path / "fleet")}
    durations = {name: {step["end_ns"] - step["start_ns"] for step in record.steps} for name, record in records.items()}
    assert durations["1.1"] and durations["1.1"].isdisjoint(durations["0"])
    assert durations["1.1"] == {replicas[1].latency.step_cost(None)[1]}


def test_a_router_that_hears_events_sends_prompts_to_the_cache_that_holds_them():
    """Two conversations of long prompts: each stays where its blocks are, and where nothing is told, it need not."""
    requests = [
        Request(number, number * 300_000_000, (Part(number % 2, 0, 2000 + 50 * number),), 4) for number in range(12)
    ]
    specs, _ = FleetOptions(replicas=2).build_replicas({}, latency="roofline:llama-3-8b@l4")
    hits = {}
    for router in ("kv-events", "random"):
        options = FleetOptions(replicas=2, router=router)
        hits[router] = options.serve(Workload(requests), specs)["cached_tokens"]
    whole_blocks = sum((2000 + 50 * (number - 2)) // 16 * 16 for number in range(2, 12))
    assert hits["kv-events"] == whole_blocks > hits["random"]


@pytest.mark.parametrize("router", [None, *sorted(ROUTERS)])
def test_what_has_served_is_gone(router):
    """Though nobody looks for circular garbage behind it: a search simulates thousands."""
    latency, requests = Constant(), requests_of(8)
    gone = weakref.ref(latency)
    if router is None:
        workload = Workload(requests, {"sha256": "0", "transforms": []}, 0, 0)
        found = run_sim(workload, settings(), latency, latency_facts={"name": "test"})
    else:
        found = fleet_run(None, requests, specs(latency, Constant()), router)
    assert found["requests"] == len(requests)
    del latency
    assert gone() is None, "replicas hold their latency"
