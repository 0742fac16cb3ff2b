"""Tiers behind a prefix cache: what goes down, what comes back, and when."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simpy
from busy_traces import conversations
from hypothesis import given, settings
from hypothesis import strategies as st
from latencies import Constant, Uneven

from twinserve.policies import BlockManager, Sequence
from twinserve.settings.build_core import Settings
from twinserve.sim.disaggregation import Disaggregation
from twinserve.sim.fleet import Outage
from twinserve.sim.links import Link
from twinserve.sim.routers import LeastOutstanding, RoundRobin
from twinserve.sim.tiers import Store, Tier, TierCounts, TierPlan, Tiers
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.fleet_record import load_fleet, load_replicas
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import ReplicaSpec, run_fleet
from twinserve.worlds.workload import Workload

MS = 10**6
BLOCK = 16_000
"""Bytes of a block: a token has 1,000."""
CPU = Tier("cpu", 100 * BLOCK, Link(1e6, 5 * MS))
"""16 ms a block, and 5 ms until the last one is there."""


def run(
    folder: Path, requests: list[Request], *tiers: Tier, replicas: int = 1, latency: Any = None, values: Any = None,
    block_bytes: tuple[float, ...] = (), **options: Any,
) -> dict[str, Any]:  # fmt: skip
    chosen = Settings.load({"max_num_seqs": 8, "max_num_batched_tokens": 128, "num_gpu_blocks": 4} | (values or {}))
    specs = [ReplicaSpec(chosen, latency or Constant(), {"name": "test"}) for _ in range(replicas)]
    plan = TierPlan(tiers, block_bytes or (float(BLOCK),) * replicas) if tiers else None
    workload = Workload(requests, {"sha256": "0", "transforms": []}, 0, 0)
    facts = {"name": "test"}
    return run_fleet(workload, specs, RoundRobin(), router_facts=facts, tiers=plan, out=folder, **options)


def prompt(number: int, arrival_ms: int, text: int, prompt_tokens: int = 48, max_tokens: int = 1) -> Request:
    return Request(number, arrival_ms * MS, (Part(text, 0, prompt_tokens),), max_tokens)


def first_ms(folder: Path) -> dict[int, float]:
    return {row["id"]: row["first_token_ns"] / MS for row in load_fleet(folder).requests}


AGAIN = [prompt(0, 0, 7), prompt(1, 100, 8, 64), prompt(2, 200, 7)]
"""The second takes the whole pool of 4 blocks, so that nothing is left there for the third, which is the first's."""


def test_a_hit_costs_its_load_before_its_step(tmp_path):
    assert run(tmp_path / "none", AGAIN)["cached_tokens"] == 0
    assert first_ms(tmp_path / "none")[2] == 210
    summary = run(tmp_path / "cpu", AGAIN, CPU)
    # Of 48 tokens two blocks may be hits: 32 ms, 5 ms, and a step.
    assert first_ms(tmp_path / "cpu") == {0: 10, 1: 110, 2: 247}
    assert summary["cached_tokens"] == 32
    # The second took three blocks of the first, the third three of the second.
    expected = {"name": "cpu", "loads": 1, "hit_blocks": 2, "load_bytes": 2 * BLOCK, "stored_blocks": 6}
    assert summary["tiers"] == [expected]
    [record] = load_replicas(tmp_path / "cpu")
    assert [step["loads"] for step in record.steps if "loads" in step] == [[[2, 0, 32]]]
    assert replay(record).is_exact


def test_loads_of_one_tier_queue_and_others_go_on_meanwhile(tmp_path):
    requests = [prompt(0, 0, 7), prompt(1, 0, 8), prompt(2, 100, 9, 128), prompt(3, 200, 7), prompt(4, 200, 8),
                prompt(5, 201, 10, 16)]  # fmt: skip
    run(tmp_path / "run", requests, CPU, values={"num_gpu_blocks": 8})
    first = first_ms(tmp_path / "run")
    assert first[3] == 247 and first[4] == 200 + 64 + 5 + 10 and first[5] == 211


def test_what_a_tier_has_no_room_for_goes_to_the_next_and_both_are_loaded_at_once(tmp_path):
    """The tail goes down first, so that the head, which goes last, is what the near tier has."""
    near, far = Tier("cpu", 1.5 * BLOCK, Link(1e6, 5 * MS)), Tier("ssd", 100 * BLOCK, Link(0.5e6, 10 * MS))
    summary = run(tmp_path / "run", AGAIN, near, far)
    assert first_ms(tmp_path / "run")[2] == 200 + max(16 + 5, 32 + 10) + 10
    assert [(one["name"], one["hit_blocks"]) for one in summary["tiers"]] == [("cpu", 1), ("ssd", 1)]
    assert [one["stored_blocks"] for one in summary["tiers"]] == [6, 5], "the near one keeps the last"
    turned = [replace(near, link=far.link), replace(far, link=near.link)]
    run(tmp_path / "turned", AGAIN, *turned)
    assert first_ms(tmp_path / "turned")[2] == first_ms(tmp_path / "run")[2], "whichever of them takes longer"
    only = run(tmp_path / "only", AGAIN, near)
    assert only["tiers"][0]["hit_blocks"] == 1 and first_ms(tmp_path / "only")[2] == 200 + 21 + 10


def test_blocks_of_replicas_of_unequal_models_are_loaded_as_large_as_they_are(tmp_path):
    requests = [
        prompt(2 * number + other, request.arrival_ns // MS, 10 * other + text, request.prompt_tokens)
        for number, (request, text) in enumerate(zip(AGAIN, (7, 8, 7), strict=True))
        for other in range(2)
    ]
    [tier] = run(tmp_path / "run", requests, CPU, replicas=2, block_bytes=(BLOCK, 3 * BLOCK))["tiers"]
    first = first_ms(tmp_path / "run")
    assert (first[4], first[5]) == (247, 200 + 3 * 32 + 5 + 10)
    assert (tier["loads"], tier["hit_blocks"], tier["load_bytes"]) == (2, 4, 2 * BLOCK + 2 * 3 * BLOCK)


def test_a_shared_tier_has_what_another_replica_put_there_and_an_own_one_has_not(tmp_path):
    """Requests go to replicas in turns: the first's prompt comes again on the other one."""
    requests = [prompt(0, 0, 7), prompt(1, 50, 11), prompt(2, 100, 8, 64), prompt(3, 200, 7)]
    summary = run(tmp_path / "own", requests, CPU, replicas=2)
    assert summary["tiers"][0]["loads"] == 0 and first_ms(tmp_path / "own")[3] == 210
    shared = Tier("store", 100 * BLOCK, CPU.link, is_shared=True)
    summary = run(tmp_path / "shared", requests, shared, replicas=2)
    assert summary["tiers"][0]["loads"] == 1 and first_ms(tmp_path / "shared")[3] == 247


def test_a_replica_that_died_has_lost_its_own_tier_and_not_the_shared_one(tmp_path):
    requests = [prompt(0, 0, 7), prompt(1, 100, 8, 64), prompt(2, 300, 7)]
    outage = [Outage(0, 150 * MS, 200 * MS)]
    assert run(tmp_path / "own", requests, CPU, outages=outage)["tiers"][0]["loads"] == 0
    shared = Tier("store", 100 * BLOCK, CPU.link, is_shared=True)
    assert run(tmp_path / "shared", requests, shared, outages=outage)["tiers"][0]["loads"] == 1


def test_a_store_forgets_what_was_used_least_recently():
    store = Store(Tier("cpu", 2.5 * BLOCK, CPU.link), BLOCK)
    assert [store.put([block]) for block in (1, 2, 1, 3)] == [[], [], [], [2]]
    assert 1 in store and 2 not in store and len(store) == 2


@settings(max_examples=200)
@given(st.integers(0, 6), st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=12))
def test_blocks_that_come_together_go_as_if_they_had_come_one_by_one(most, batches):
    """However few fit, and whichever of them are there already, come twice, or give way to one another."""
    store = Store(Tier("cpu", most * BLOCK, CPU.link), BLOCK)
    expected: OrderedDict[int, None] = OrderedDict()
    for batch in batches:
        gone = []
        for block in batch:
            expected[block] = None
            expected.move_to_end(block)
            if len(expected) > most:
                gone.append(expected.popitem(last=False)[0])
        assert store.put(batch) == gone
        assert [block for block in range(10) if block in store] == sorted(expected) and len(store) == len(expected)
    assert len(store._uses) <= 2 * len(store), "what is noted of uses does not grow with their number"


def test_a_hit_is_a_use():
    store = Store(Tier("cpu", 2 * BLOCK, CPU.link), BLOCK)
    store.put([1, 2])
    tiers = Tiers(simpy.Environment(), BlockManager(4, 16), [store], [TierCounts()], lambda: None)
    seq = Sequence(list(range(17)))
    seq.block_hashes = [1]
    assert tiers.find(seq, 0) == 16 and store.put([3]) == [2]
    longer = Sequence(list(range(49)))
    longer.block_hashes = [1, 2, 3]
    assert tiers.find(longer, 0) == 16, "behind a gap nothing is a hit"


def test_a_preempted_block_that_no_step_has_computed_does_not_go_down(tmp_path):
    """Whatever is preempted: the next replay of the same prompts finds only what its own cache would have found."""
    requests = conversations(4)
    summary = run(tmp_path / "tiers", requests, CPU, values={"num_gpu_blocks": 40}, latency=Uneven())
    endless = run(tmp_path / "endless", requests, values={"num_gpu_blocks": 4000}, latency=Uneven())
    assert summary["preemptions"] > 0 and summary["tiers"][0]["loads"] > 0
    assert summary["finished"] == endless["finished"] == len(requests)
    assert summary["cached_tokens"] <= endless["cached_tokens"] * 1.05


@pytest.mark.parametrize("depth", [0, 1])
def test_records_are_decided_again_exactly_and_leaps_change_nothing(tmp_path, depth):
    shared = Tier("store", 500 * BLOCK, Link(2e7, 3 * MS), is_shared=True)
    near = Tier("cpu", 20 * BLOCK, Link(1e8, MS))
    how: dict[str, Any] = {"replicas": 3, "latency": Uneven()}
    how |= {"values": {"num_gpu_blocks": 40, "pipeline_depth": depth}}
    split = Disaggregation(("prefill", "both", "decode"), (1000.0,) * 3, Link(1e7, MS), LeastOutstanding())
    found = [
        run(tmp_path / str(single), conversations(2), near, shared, step_by_step=single, split=split, **how)
        for single in (True, False)
    ]
    assert found[0]["tiers"] == found[1]["tiers"] and all(one["loads"] > 0 for one in found[0]["tiers"])
    for one, other in zip(load_replicas(tmp_path / "True"), load_replicas(tmp_path / "False"), strict=True):
        assert one.requests == other.requests and len(one.steps) == len(other.steps) > 0
        assert replay(one).is_exact and replay(other).is_exact
