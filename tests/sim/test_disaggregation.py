"""Prefill and decode on separate replicas: when KV is where, and what both sides' records say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from busy_traces import conversations
from latencies import Constant, Uneven

from twinserve.settings.build_core import Settings
from twinserve.sim.clients import Clients
from twinserve.sim.disaggregation import Disaggregation
from twinserve.sim.fleet import Outage, Restart
from twinserve.sim.links import Link
from twinserve.sim.routers import LeastOutstanding, RoundRobin
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.fleet_record import load_fleet, load_replicas
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.waits import waits_of
from twinserve.worlds.run import ReplicaSpec, run_fleet
from twinserve.worlds.workload import Workload

MS = 10**6
LINK = Link(1e6, 5 * MS)
"""A token of 1,000 bytes takes a millisecond, and 5 ms until it is there."""


def run(
    folder: Path,
    requests: list[Request],
    roles: str,
    *,
    latencies: list[Any] | None = None,
    link: Link = LINK,
    num_layers: int | None = None,
    values: dict[str, Any] | None = None,
    own: dict[int, dict[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs requests on replicas of these roles: p, d, or b for both; `own` are settings of single ones."""
    names = tuple({"p": "prefill", "d": "decode", "b": "both"}[role] for role in roles)
    split = Disaggregation(names, (1000.0,) * len(names), link, LeastOutstanding(), num_layers)
    common = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "num_gpu_blocks": 60} | (values or {})
    specs = [
        ReplicaSpec(Settings.load(common | (own or {}).get(index, {})), latency, {"name": "test"})
        for index, latency in enumerate(latencies or [Constant()] * len(names))
    ]
    workload = Workload(requests, {"sha256": "0", "transforms": []}, 0, 0)
    return run_fleet(workload, specs, RoundRobin(), router_facts={"name": "test"}, split=split, out=folder, **options)


def prompt(number: int, arrival_ms: int, prompt_tokens: int, max_tokens: int) -> Request:
    return Request(number, arrival_ms * MS, (Part(number, 0, prompt_tokens),), max_tokens)


def times_ms(folder: Path) -> dict[int, tuple[float, float]]:
    """Of each request, when its first and its last token came."""
    return {row["id"]: (row["first_token_ns"] / MS, row["finish_ns"] / MS) for row in load_fleet(folder).requests}


def test_the_first_token_comes_from_the_prefill_and_the_next_when_the_kv_is_there(tmp_path):
    summary = run(tmp_path / "run", [prompt(0, 0, 32, 3)], "pd")
    # 10 ms of prefill; 32 ms for 32 tokens, 5 ms of latency; two steps of 10 ms.
    assert times_ms(tmp_path / "run") == {0: (10, 67)}
    assert summary["ttft_s"]["mean"] == 0.010 and summary["tpot_s"]["mean"] == 0.0285
    assert summary["itl_s"] == {"mean": 0.0285, "p50": 0.0285, "p90": 0.0433, "p95": 0.04515, "p99": 0.04663}
    assert (summary["requests"], summary["finished"], summary["handed_over"], summary["output_tokens"]) == (1, 1, 1, 3)
    assert (summary["transfers"], summary["transfer_bytes"]) == (1, 32_000)
    prefill = load_replicas(tmp_path / "run")[0].run["summary"]
    assert (prefill["duration_s"], prefill["device_wait_share"]) == (0.010, 0.0)


def test_two_transfers_of_one_port_queue(tmp_path):
    """Both prompts are computed in one step; the second's KV is sent when the first's has left."""
    run(tmp_path / "run", [prompt(0, 0, 32, 3), prompt(1, 0, 16, 2)], "pd")
    # The first arrives at 47, and its second token is there at 57. The second's KV leaves from 42 to 58 and is there at
    # 63, while a step of the first runs from 57 to 67; so it decodes from 67 to 77.
    assert times_ms(tmp_path / "run") == {0: (10, 67), 1: (10, 77)}


def test_ports_of_two_prefills_are_their_own_and_that_of_the_decode_is_shared(tmp_path):
    requests = [prompt(0, 0, 32, 2), prompt(1, 0, 32, 2)]
    run(tmp_path / "apart", requests, "ppdd")
    assert times_ms(tmp_path / "apart") == {0: (10, 57), 1: (10, 57)}
    run(tmp_path / "one", requests, "ppd")
    assert times_ms(tmp_path / "one") == {0: (10, 57), 1: (10, 89)}


def test_layer_by_layer_only_what_the_prompts_compute_does_not_hide_is_waited_for(tmp_path):
    """Of 4 layers, sending begins at a quarter of the 10 ms that the prompt takes."""
    run(tmp_path / "bound", [prompt(0, 0, 32, 2)], "pd", num_layers=4)
    assert times_ms(tmp_path / "bound") == {0: (10, 2.5 + 32 + 5 + 10)}
    # A link that is fast enough hides all but the last layer: 2 of 8 ms.
    run(tmp_path / "hidden", [prompt(0, 0, 32, 2)], "pd", num_layers=4, latencies=[Constant(100 * MS), Constant()],
        link=Link(4e6, 5 * MS))  # fmt: skip
    assert times_ms(tmp_path / "hidden") == {0: (100, 100 + 2 + 5 + 10)}


def test_a_decode_replica_that_is_full_makes_it_wait_and_the_prefill_keeps_its_blocks(tmp_path):
    """The decode side has 4 blocks. The first request holds 3 of them until its 12 tokens are there."""
    requests = [prompt(0, 0, 32, 12), prompt(1, 0, 32, 2), prompt(2, 60, 32, 2)]
    own = {0: {"num_gpu_blocks": 5}, 1: {"num_gpu_blocks": 4}}
    run(tmp_path / "run", requests, "pd", own=own)
    times = times_ms(tmp_path / "run")
    # The first is there at 47 and ends 11 steps later, at 157. Then the second gets blocks: 157 + 37 + 10.
    assert times[0] == (10, 157) and times[1] == (10, 204)
    # The prefill has 5 blocks, of which the second keeps 2, so the third's prompt, of 2, is computed at once;
    # it goes over when the second has blocks, behind it over the same port.
    assert times[2][0] == 70 and times[2][1] > 204
    prefill, decode = load_replicas(tmp_path / "run")
    assert [step["released"] for step in prefill.steps if "released" in step]
    loads = {load[0]: step["decided_ns"] / MS for step in decode.steps for load in step.get("loads", ())}
    loaded = {one: step["decided_ns"] / MS for step in decode.steps for one in step.get("loaded", ())}
    assert loads[0] == 10 and loaded[0] == 47 and loads[1] == 157 and loaded[1] == 194


def test_a_prefill_that_is_restarted_has_given_the_kv_away_that_it_keeps_before_it_goes(tmp_path):
    """As before, the second's KV is there at 194; then it is down for 10 ms, and the third waits for it."""
    requests = [prompt(0, 0, 32, 12), prompt(1, 0, 32, 2), prompt(2, 100, 32, 1)]
    own = {0: {"num_gpu_blocks": 5}, 1: {"num_gpu_blocks": 4}}
    run(tmp_path / "run", requests, "pd", own=own, restarts=[Restart((0,), 60 * MS, 10 * MS)])
    times = times_ms(tmp_path / "run")
    assert times[1] == (10, 204) and times[2] == (214, 214)


def test_blocks_that_a_transfer_still_reads_are_not_given_to_another_prompt(tmp_path):
    """A prefill of 2 blocks: the second prompt is computed once the first's KV has gone."""
    run(tmp_path / "run", [prompt(0, 0, 32, 2), prompt(1, 0, 32, 2)], "pd", own={0: {"num_gpu_blocks": 2}})
    assert times_ms(tmp_path / "run") == {0: (10, 57), 1: (57, 104)}


def test_blocks_that_wait_for_kv_that_is_lost_are_given_back_as_who_computes_it_again_may_wait_for_them(tmp_path):
    """The prefill dies while it sends the first prompt's KV; back again, it has room for one prompt, and computes the
    second one first, whose KV goes to the blocks that the first had on the decode side."""
    requests, own = [prompt(0, 0, 48, 3), prompt(1, 25, 48, 3)], {0: {"num_gpu_blocks": 4}, 1: {"num_gpu_blocks": 4}}
    summary = run(tmp_path / "run", requests, "pd", own=own, outages=[Outage(0, 20 * MS, 40 * MS)])
    assert summary["finished"] == 2 and summary["transfers"] == 3
    records = load_replicas(tmp_path / "run")
    assert [step["lost"] for record in records for step in record.steps if "lost" in step] == [[0]]
    assert all(replay(record).is_exact for record in records)
    # The second is computed from 40 to 50; its KV leaves at 58, behind what was lost of the first's, and is there at
    # 111. Only then the first's prompt has room, and its KV when the second has ended: 48 ms, 5 of latency, two steps.
    ends = times_ms(tmp_path / "run")
    assert ends[1] == (50, 131) and ends[0][1] == 131 + 48 + 5 + 20


def test_who_waits_for_blocks_gets_none_while_its_kv_is_lost_as_who_computes_it_again_may_wait_for_them(tmp_path):
    """The decode side is full until 157 ms. The prefill, which dies with the second prompt's KV, has room for one
    prompt when it is back, and computes the third first, whose KV goes to the blocks that the second waited for."""
    requests = [prompt(0, 0, 32, 12), prompt(1, 0, 48, 3), prompt(2, 70, 48, 3)]
    own = {0: {"num_gpu_blocks": 5}, 1: {"num_gpu_blocks": 4}}
    summary = run(tmp_path / "run", requests, "pd", own=own, outages=[Outage(0, 60 * MS, 80 * MS)])
    assert summary["finished"] == 3 and summary["transfers"] == 3
    _, decode, again = sorted(load_replicas(tmp_path / "run"), key=lambda record: record.path.name == "0.1")
    assert [step["lost"] for step in decode.steps if step.get("lost")] == [[1]]
    assert [step["found"] for step in decode.steps if step.get("found")] == [[1]]
    assert replay(decode).is_exact and replay(again).is_exact
    ends = times_ms(tmp_path / "run")
    assert ends[0][1] == 157 and ends[2][1] < ends[1][1]
    waited = waits_of(load_replicas(tmp_path / "run"))[1]
    assert waited.e2e_ns.total() == waited.row["finish_ns"] and waited.e2e_ns["transfer"] > 100 * MS


def test_a_client_that_gives_up_is_heard_by_a_decode_replica_that_has_nothing_to_do_but_wait_for_kv(tmp_path):
    summary = run(
        tmp_path / "run", [prompt(0, 0, 32, 3)], "pd", link=Link(1e5, 0), clients=Clients(timeout_ns=100 * MS)
    )
    assert (summary["requests"], summary["finished"], summary["aborted"], summary["timed_out"]) == (1, 0, 1, 1)
    (row,) = load_fleet(tmp_path / "run").requests
    assert (row["replica"], row["finish_reason"], row["finish_ns"]) == (1, "abort", 100 * MS)


@pytest.mark.parametrize("timeout_ms", [25, 35, 45, 60, 100])
def test_a_client_that_gives_up_while_its_prompt_is_computed_again_ends_one_request_once(tmp_path, timeout_ms):
    """As above, the prefill dies as it sends, from 20 to 40 ms; the first prompt is computed again from then on."""
    own = {0: {"num_gpu_blocks": 4}, 1: {"num_gpu_blocks": 4}}
    clients = Clients(timeout_ns=timeout_ms * MS)
    summary = run(
        tmp_path / "run", [prompt(0, 0, 48, 3)], "pd", own=own, outages=[Outage(0, 20 * MS, 40 * MS)], clients=clients
    )
    counts = [summary[name] for name in ("requests", "finished", "aborted", "timed_out")]
    assert counts == [1, 0, 1, 1]
    (row,) = load_fleet(tmp_path / "run").requests
    assert (row["replica"], row["finish_ns"]) == (1, timeout_ms * MS)
    assert all(replay(record).is_exact for record in load_replicas(tmp_path / "run"))


def test_what_the_decode_side_has_cached_is_not_sent(tmp_path):
    """The second turn begins with the first's 48 tokens, of which the decode side has two blocks full."""
    first = Request(0, 0, (Part(0, 0, 32),), 16)
    second = Request(1, 10**9, (Part(0, 0, 32), Part(7, 0, 16)), 2)
    summary = run(tmp_path / "run", [first, second], "pd")
    assert summary["transfer_bytes"] == (32 + 16) * 1000
    assert times_ms(tmp_path / "run")[1] == (1010, 1010 + 16 + 5 + 10)
    assert summary["cached_tokens"] == 32, "those that the prefill found"


def test_an_answer_of_one_token_and_a_request_that_can_never_be_served_go_nowhere_else(tmp_path):
    requests = [prompt(0, 0, 32, 1), prompt(1, 0, 32, 900), prompt(2, 0, 700, 5)]
    own = {0: {"num_gpu_blocks": 40}, 1: {"num_gpu_blocks": 50}}
    summary = run(tmp_path / "run", requests, "pd", own=own)
    assert (summary["finished"], summary["refused"], summary["transfers"]) == (1, 2, 0)
    rows = {row["id"]: row for row in load_fleet(tmp_path / "run").requests}
    assert rows[0]["finish_ns"] == 10 * MS
    assert (rows[1]["replica"], rows[2]["replica"]) == (1, 0), "each by the side that cannot"


def test_an_answer_of_one_token_needs_nobody_who_could_go_on_with_it(tmp_path):
    requests = [prompt(0, 0, 48, 1), prompt(1, 0, 48, 2)]
    summary = run(tmp_path / "run", requests, "pd", own={1: {"num_gpu_blocks": 2}})
    assert (summary["finished"], summary["refused"], summary["transfers"]) == (1, 1, 0)


def test_replicas_that_do_both_stand_beside_split_ones(tmp_path):
    run(tmp_path / "run", [prompt(0, 0, 32, 2), prompt(1, 0, 32, 2)], "pdb")
    rows = {row["id"]: row for row in load_fleet(tmp_path / "run").requests}
    assert (rows[0]["replica"], rows[1]["replica"]) == (1, 2)
    assert rows[1]["finish_ns"] == 20 * MS


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_layers", [None, 8])
def test_both_sides_are_decided_again_exactly_and_leaps_change_nothing(tmp_path, depth, num_layers):
    requests = conversations(2)
    how: dict[str, Any] = {"latencies": [Uneven(), Uneven(), Uneven(2), Uneven()], "num_layers": num_layers}
    how["values"] = {"pipeline_depth": depth, "num_gpu_blocks": 40}
    for single in (True, False):
        summary = run(tmp_path / str(single), requests, "ppdd", step_by_step=single, **how)
        assert summary["finished"] == summary["requests"] == len(requests) and summary["preemptions"] > 0
    singles, leaping = load_replicas(tmp_path / "True"), load_replicas(tmp_path / "False")
    for one, other in zip(singles, leaping, strict=True):
        assert one.requests == other.requests and len(one.steps) == len(other.steps) > 0
        assert replay(one).is_exact and replay(other).is_exact
    moved = [step for record in leaping for step in record.steps if "loads" in step or "released" in step]
    assert moved


def test_why_it_waited_is_told_over_both_sides_and_adds_up(tmp_path):
    run(tmp_path / "two", [prompt(0, 0, 32, 3), prompt(1, 0, 16, 2)], "pd")
    _, second = waits_of(load_replicas(tmp_path / "two"))
    assert second.ttft_ns == {"another's prompt": 10 * MS * 32 // 48, "own compute": 10 * MS - 10 * MS * 32 // 48}
    # Its KV is there at 63, and seen at 67, when the step of the other has ended.
    assert second.e2e_ns == second.ttft_ns + Counter({"transfer": 57 * MS, "own compute": 10 * MS})
    outages = [Outage(0, 1000 * MS, 2500 * MS), Outage(2, 1500 * MS, 3000 * MS), Outage(3, 3400 * MS, 3500 * MS)]
    for number, (layers, downs) in enumerate(((None, []), (8, []), (None, outages), (8, outages))):
        run(
            tmp_path / str(number), conversations(5), "ppdd", latencies=[Uneven()] * 4, num_layers=layers, outages=downs
        )
        waits = waits_of(load_replicas(tmp_path / str(number)))
        assert [one.row["id"] for one in waits] == list(range(60))
        for one in waits:
            assert one.ttft_ns.total() == one.row["first_token_ns"] - one.row["arrival_ns"]
            assert one.e2e_ns.total() == one.row["finish_ns"] - one.row["arrival_ns"]
        assert sum(one.e2e_ns["transfer"] for one in waits) > 0


def test_a_replay_finds_a_load_that_was_not_decided_on(tmp_path):
    run(tmp_path / "run", conversations(3), "pd")
    decode = load_replicas(tmp_path / "run")[1]
    place = next(number for number, step in enumerate(decode.steps) if step.get("loaded"))
    steps = [dict(step) for step in decode.steps]
    del steps[place]["loaded"]
    found = replay(replace(decode, steps=steps)).difference
    assert found is not None and found.decision >= place


@pytest.mark.parametrize("num_layers", [None, 8])
@pytest.mark.parametrize("failover_ms", [0, 400])
@pytest.mark.parametrize("seed", [5, 6])
def test_deaths_on_either_side_lose_nothing(tmp_path, failover_ms, num_layers, seed):
    requests = conversations(seed)
    outages = [Outage(0, 1000 * MS, 2500 * MS), Outage(2, 1500 * MS, 3000 * MS), Outage(1, 3100 * MS, 3300 * MS),
               Outage(3, 1400 * MS, 2000 * MS)]  # fmt: skip
    summary = run(
        tmp_path / "run", requests, "ppdd", latencies=[Uneven()] * 4, outages=outages, num_layers=num_layers,
        failover_ns=failover_ms * MS,
    )  # fmt: skip
    assert summary["finished"] == summary["requests"] == len(requests) and summary["retries"] > 0
    rows = load_fleet(tmp_path / "run").requests
    assert sorted(row["id"] for row in rows) == [request.id for request in requests]
    assert all(row["output_tokens"] == requests[row["id"]].max_tokens for row in rows)
    assert all(replay(record).is_exact for record in load_replicas(tmp_path / "run"))
