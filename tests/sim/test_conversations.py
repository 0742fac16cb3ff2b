"""Conversations with sub-agents over a fleet: turns follow answers, nothing is lost, affinity finds what was cached."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from latencies import Constant

from twinserve.cli import main
from twinserve.planning.fleets import FleetOptions
from twinserve.settings.build_core import Settings
from twinserve.traces.request import Request
from twinserve.traces.runs.fleet_record import load_fleet, load_replicas
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import ReplicaSpec, run_fleet
from twinserve.worlds.workload import Workload, load_workload

BLOCK = 64


LATENCY = "smollm2-135m-cpu-2-threads"


def turn(time_s: float, ids: list[int], tokens: int, *, api_time: float = 0.5, think: float | None = None) -> dict:
    """A request of a conversation: whole blocks, and 10 tokens beyond them."""
    row = {"t": time_s, "type": "s", "in": len(ids) * BLOCK + 10, "out": tokens, "hash_ids": ids, "api_time": api_time}
    return row if think is None else row | {"think_time": think}


def conversation(number: int) -> dict:
    """Five turns that grow by two blocks each; after the second a sub-agent of three turns begins."""
    prompts = [list(range(1, 9 + 2 * place)) for place in range(5)]
    own = [turn(2.0 * place, ids, 20 + number, think=1.9 if place else None) for place, ids in enumerate(prompts)]
    agent = {
        "t": 3.0,
        "type": "subagent",
        "agent_id": "a",
        "requests": [
            turn(0.7 * place, list(range(101, 110 + place)), 15, think=0.1 if place else None) for place in range(3)
        ],
    }
    return {
        "id": f"c{number}",
        "block_size": BLOCK,
        "hash_id_scope": "local",
        "requests": [*own[:2], agent, *own[2:]],
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "conversations"
    path.mkdir()
    for number in range(6):
        (path / f"trace_{number:04}.json").write_text(json.dumps(conversation(number)))
    return path


def run(workload: Workload, out: Path, router: str, **values: int) -> dict:
    """The summary of four replicas behind a router."""
    options = FleetOptions(replicas=4, router=router)
    settings = Settings.load({"block_size": BLOCK, "num_gpu_blocks": 400, "max_num_batched_tokens": 2048} | values)
    specs = [ReplicaSpec(settings, Constant(), {"name": "constant"})] * 4
    return run_fleet(workload, specs, options.build_router(), router_facts=options.router_facts, out=out)


def served(folder: Path, out: Path, router: str, **values: int) -> tuple[dict, list[Request]]:
    """The summary, and the requests of a folder whose conversations begin two a second."""
    workload = load_workload(folder, {"session_rate": 2.0})
    return run(workload, out, router, **values), workload.requests


@pytest.mark.parametrize("router", ["prefix-affine", "round-robin"])
def test_turns_follow_answers_and_everything_is_accounted_for(folder, tmp_path, router):
    summary, requests = served(folder, tmp_path / "run", router)
    assert (summary["requests"], summary["finished"]) == (48, 48)
    rows = {row["id"]: row for row in load_fleet(tmp_path / "run").requests}
    assert sorted(rows) == [request.id for request in requests]
    for request in requests:
        row = rows[request.id]
        assert (row["output_tokens"], row["prompt_tokens"]) == (request.max_tokens, request.prompt_tokens)
        if request.after is None:
            assert row["arrival_ns"] == request.arrival_ns
        else:
            answered = rows[request.after]["finish_ns"] + request.think_ns
            assert row["arrival_ns"] == max(request.arrival_ns, answered)
    waited = [request for request in requests if request.after is not None]
    assert len(waited) == 42, "all but the first of each conversation"
    assert any(rows[request.id]["arrival_ns"] > request.arrival_ns for request in waited), "some wait for an answer"
    assert Counter(request.after for request in waited).most_common(1)[0][1] == 2, "a turn and a sub-agent's first"
    for replica in load_replicas(tmp_path / "run"):
        assert replay(replica).is_exact


def test_affinity_keeps_every_agent_where_its_blocks_are(folder, tmp_path):
    cached = {}
    for router in ("prefix-affine", "round-robin"):
        summary, requests = served(folder, tmp_path / router, router)
        cached[router] = summary["cached_tokens"]
    assert cached["prefix-affine"] == 6 * BLOCK * sum([8, 10, 12, 14, 9, 10]), "all that each turn shares with the last"
    assert cached["round-robin"] < 0.5 * cached["prefix-affine"]
    places = {row["id"]: row["replica"] for row in load_fleet(tmp_path / "prefix-affine").requests}
    agents: dict[int, set[int]] = {}
    for request in requests:
        agents.setdefault(request.parts[0].text, set()).add(places[request.id])
    assert len(agents) == 12 and all(len(used) == 1 for used in agents.values())
    assert len(set.union(*agents.values())) > 2, "conversations are spread over the fleet"


def test_a_folder_is_served_by_a_fleet_on_the_command_line(folder, tmp_path, monkeypatch, capsys):
    arguments = ("--replicas", "4", "--router", "prefix-affine", "--session-rate", "2", "--out", str(tmp_path / "run"))
    settings = ("--block-size", "64", "--num-gpu-blocks", "400", "--latency", LATENCY, "--json")
    monkeypatch.setattr(sys, "argv", ["twinserve", "sim", str(folder), *arguments, *settings])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    summary = json.loads(capsys.readouterr().out)
    assert summary["finished"] == summary["requests"] == 48
    assert summary["cached_tokens"] > 0
    assert (load_fleet(tmp_path / "run").run["facts"]["trace"]["format"]) == "weka"


@pytest.mark.skipif("TWINSERVE_TRACES" not in os.environ, reason="TWINSERVE_TRACES names no folder of public traces")
def test_recorded_conversations_with_sub_agents_find_more_with_affinity(tmp_path):
    path = Path(os.environ["TWINSERVE_TRACES"]) / "weka"
    cached = {}
    for router in ("prefix-affine", "round-robin"):
        summary, requests = served(path, tmp_path / router, router, num_gpu_blocks=8000, max_num_batched_tokens=8192)
        assert summary["finished"] == summary["requests"] == len(requests) == 101
        rows = {row["id"]: row for row in load_fleet(tmp_path / router).requests}
        for request in requests:
            if request.after is not None:
                answered = rows[request.after]["finish_ns"] + request.think_ns
                assert rows[request.id]["arrival_ns"] == max(request.arrival_ns, answered)
        cached[router] = summary["cached_tokens"] / summary["prompt_tokens"]
    assert cached["prefix-affine"] > cached["round-robin"] + 0.1, cached


def test_chats_with_token_ids_find_more_with_affinity(tmp_path):
    """ShareGPT's rows have no turns: each comes when it came, and its ids say what it repeats."""
    rows, chats = [], [[1000 * chat + token for token in range(2500)] for chat in range(1, 8)]
    for turn_number in range(4):
        for chat, ids in enumerate(chats):
            prompt = ids[: 520 + 300 * turn_number]
            arrival_ns = (turn_number * len(chats) + chat) * 400_000_000
            rows.append(
                {
                    "arrival_time_ns": arrival_ns,
                    "input_toks": len(prompt),
                    "output_toks": 20,
                    "input_tok_ids": prompt,
                }
            )
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cached = {}
    for router in ("prefix-affine", "round-robin"):
        workload = load_workload(path, {})
        summary = run(workload, tmp_path / router, router)
        assert summary["finished"] == summary["requests"] == len(rows)
        arrived = [row["arrival_ns"] for row in load_fleet(tmp_path / router).requests]
        assert arrived == [row["arrival_time_ns"] for row in rows]
        cached[router] = summary["cached_tokens"]
    assert cached["prefix-affine"] == 7 * BLOCK * sum([520 // BLOCK, 820 // BLOCK, 1120 // BLOCK])
    assert cached["round-robin"] < 0.5 * cached["prefix-affine"]
