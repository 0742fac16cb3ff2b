"""Why requests waited: parts that add up to the nanosecond, causes worked out by hand, and culprits taken out."""

from __future__ import annotations

import json
import re
from collections import Counter
from html import unescape
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latencies import Constant, Uneven
from shell import twinserve

from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.fleet import Outage
from twinserve.sim.routers import LeastOutstanding
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.fleet_record import load_replicas
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.traces.runs.waits import CAUSES, OTHERS, Waited, joined, waits_of
from twinserve.worlds.run import ReplicaSpec, run_fleet, run_sim
from twinserve.worlds.workload import Workload

__all__ = ["twinserve"]
MS = 10**6
STEP = 10 * MS


def requests_of(*rows: tuple[int, int, int]) -> list[Request]:
    """Requests that arrive at so many milliseconds, with so long prompts and answers, none like another."""
    return [Request(n, ms * MS, (Part(n, 0, prompt),), answer) for n, (ms, prompt, answer) in enumerate(rows)]


def recorded(folder: Path, requests: list[Request], latency=None, **values) -> RunRecord:
    chosen = Settings.load({"enable_prefix_caching": False, "max_num_seqs": 8} | values)
    workload = Workload(requests, {"sha256": "0", "transforms": []}, 0, 0)
    run_sim(workload, chosen, latency or Constant(), latency_facts={"name": "made up"}, out=folder)
    return load_record(folder)


def check_sums(waits: list[Waited], rows: list[dict]) -> None:
    """Nothing is charged twice, nothing is left out, and nobody is to blame for his own prompt."""
    assert [one.row["id"] for one in waits] == sorted(row["id"] for row in rows if row["finish_ns"] is not None)
    for one in waits:
        row = one.row
        ttft_ns = 0 if row["first_token_ns"] is None else row["first_token_ns"] - row["arrival_ns"]
        assert one.ttft_ns.total() == ttft_ns
        assert one.e2e_ns.total() == row["finish_ns"] - row["arrival_ns"]
        assert one.culprits.total() == one.e2e_ns[OTHERS] and row["id"] not in one.culprits
        for parts in (one.ttft_ns, one.e2e_ns):
            assert set(parts) <= set(CAUSES) and all(ns > 0 for ns in parts.values())
        assert all(one.ttft_ns[cause] <= one.e2e_ns[cause] for cause in CAUSES)


def fleet_waits(folder: Path, rows: list[Request], values: dict, latency, outage: Outage, failover_ms: int) -> list:
    """Those of two replicas of which one dies; they add up."""
    run_fleet(
        Workload(rows, {"sha256": "0", "transforms": []}, 0, 0),
        [ReplicaSpec(Settings.load(values), latency, {"name": "made up"})] * 2,
        LeastOutstanding(),
        router_facts={},
        outages=[outage],
        failover_ns=failover_ms * MS,
        out=folder,
    )
    records = load_replicas(folder)
    waits = waits_of(records)
    check_sums(waits, [row for record in records for row in record.requests])
    return waits


# --- by hand ---


def parts(record: RunRecord, seq_id: int) -> tuple[dict[str, float], dict[str, float]]:
    """Those of a request's TTFT and of its whole time, in steps."""
    waits = waits_of([record])
    check_sums(waits, record.requests)
    one = waits[seq_id]
    return tuple({cause: ns / STEP for cause, ns in of.items()} for of in (one.ttft_ns, one.e2e_ns))


def test_a_request_alone_spends_all_its_time_in_its_own_steps(tmp_path):
    record = recorded(tmp_path / "run", requests_of((5, 8, 4)))
    assert parts(record, 0) == ({"own compute": 1}, {"own compute": 4})


def test_who_finds_all_places_taken_waits_for_sequences_and_first_for_the_step_that_runs(tmp_path):
    record = recorded(tmp_path / "run", requests_of((0, 8, 4), (5, 8, 2)), max_num_seqs=1)
    # The first step is the other's prompt; three more pass before there is a place.
    assert parts(record, 1)[0] == {OTHERS: 0.5, "sequences": 3, "own compute": 1}


def test_a_prompt_behind_another_one_waits_for_tokens_of_the_budget(tmp_path):
    record = recorded(tmp_path / "run", requests_of((0, 64, 1), (0, 8, 1)), max_num_batched_tokens=16)
    assert parts(record, 1)[0] == {"token budget": 4, "own compute": 1}


def test_blocks_that_lack_for_the_next_tokens_are_told_from_those_kept_for_the_whole_prompt(tmp_path):
    common = {"block_size": 8, "max_num_batched_tokens": 16}
    # The first has 4 to 6 blocks of 8 until it ends after 33 steps: the next piece of 16 fits beside, not all 40.
    rows = requests_of((0, 15, 33), (105, 40, 1))
    record = recorded(tmp_path / "reserve", rows, **common, num_gpu_blocks=8)
    assert parts(record, 1)[0] == {"step in flight": 0.5, "reserve": 22, "own compute": 3}
    record = recorded(tmp_path / "chunks", rows, **common, num_gpu_blocks=8, scheduler_reserve_full_isl=False)
    assert "reserve" not in parts(record, 1)[0]
    rows = requests_of((0, 15, 33), (305, 15, 1))  # it has 6 of 7, and the next piece needs two
    record = recorded(tmp_path / "blocks", rows, **common, num_gpu_blocks=7)
    assert parts(record, 1)[0] == {"step in flight": 0.5, "blocks": 2, "own compute": 1}


def test_what_was_taken_from_a_request_is_charged_until_it_is_computed_again(tmp_path):
    rows = requests_of((0, 15, 20), (0, 15, 20))
    record = recorded(tmp_path / "run", rows, block_size=8, num_gpu_blocks=6, max_num_batched_tokens=64)
    assert record.requests[1]["preemptions"] == 1
    # Both have 3 blocks of 6 when ten steps are done; the other one's last ten come first, then one that computes anew.
    ttft, whole = parts(record, 1)
    assert ttft == {"own compute": 0.5, OTHERS: 0.5} and whole["preemption"] == 11


def test_decodes_held_up_by_a_prompt_are_charged_to_it_beyond_what_they_take_alone(tmp_path):
    rows = requests_of((0, 8, 30), (40, 500, 2))
    record = recorded(tmp_path / "run", rows, Uneven(), max_num_batched_tokens=1000)
    waits = waits_of([record])
    check_sums(waits, record.requests)
    victim, culprit = waits
    assert set(victim.culprits) == {1} and culprit.culprits == {}
    took_ns = [row["end_ns"] - row["start_ns"] for row in record.steps if row["prompt_tokens"] == 500]
    plain_ns = [row["end_ns"] - row["start_ns"] for row in record.steps if row["tokens"] == 1 and row["running"] == 1]
    assert victim.culprits[1] == pytest.approx(took_ns[0] - plain_ns[-1], rel=0.02)


def test_decodes_between_prompts_are_charged_to_the_prompts_in_their_stead(tmp_path):
    rows = requests_of((0, 8, 10), (25, 8, 1), (26, 8, 1))
    record = recorded(tmp_path / "run", rows, composition="prefill-first")
    assert parts(record, 0)[1] == {"own compute": 10, OTHERS: 1}


def test_prompts_kept_back_by_the_interval_are_charged_to_it(tmp_path):
    rows = requests_of((0, 8, 40), (15, 8, 20), (55, 8, 1))
    record = recorded(tmp_path / "run", rows, prefill_schedule_interval=4)
    assert any(parts(record, number)[0].get("interval", 0) >= 1 for number in (1, 2))


def test_with_one_token_of_the_budget_left_it_is_the_blocks_that_lack(tmp_path):
    rows = requests_of((0, 15, 33), (305, 15, 1))
    record = recorded(tmp_path / "run", rows, block_size=8, num_gpu_blocks=6, max_num_batched_tokens=2, max_num_seqs=2)
    assert parts(record, 1)[0] == {"step in flight": 0.5, "reserve": 2, "blocks": 7, "own compute": 8}


def test_what_is_cached_of_a_prompt_takes_nothing_of_the_budget_that_is_left(tmp_path):
    first, one, other, last = requests_of((0, 16, 1), (20, 8, 8), (20, 8, 8), (35, 31, 1))
    rows = [first, one, other, last._replace(parts=(Part(0, 0, 16), Part(9, 0, 15)))]
    values = {"enable_prefix_caching": True, "enable_chunked_prefill": False, "max_num_batched_tokens": 32}
    record = recorded(tmp_path / "run", rows, **values, max_model_len=32, block_size=8, num_gpu_blocks=7)
    assert record.requests[-1]["cached_tokens"] == 16
    # Two decode until 100 ms, so that 30 tokens are left for a prompt of 31, of which 15 are to be computed.
    assert parts(record, 3)[0] == {"step in flight": 0.5, "blocks": 6, "own compute": 1}


def test_what_a_dead_replica_had_is_the_routers_until_the_last_decision_before_another_has_it(tmp_path):
    rows = requests_of((0, 8, 40), (21, 8, 40))
    waits = fleet_waits(tmp_path / "run", rows, {}, Constant(), Outage(1, 25 * MS, 1000 * MS), 50)
    # It arrived at 21 ms, was lost at 25, and is handed over at 75, in the middle of a step that was decided at 70.
    assert waits[1].ttft_ns == {"router": 49 * MS, "step in flight": 10 * MS, "decodes beside": 10 * MS}


def test_of_a_prompt_whose_record_is_not_there_the_time_is_the_routers():
    row = {
        "id": 3,
        "arrival_ns": 5,
        "first_token_ns": 25,
        "finish_ns": 90,
        "stage": "decode",
        "finish_reason": "length",
    }
    (one,) = joined([Waited(row)], is_fleet=False)
    assert one.ttft_ns == one.e2e_ns == {"router": 20}


# --- laws ---


@st.composite
def runs(draw):
    rows, arrival_ms = [], 0
    for _ in range(draw(st.integers(1, 14))):
        arrival_ms += draw(st.integers(0, 60))
        rows.append((arrival_ms, draw(st.integers(1, 90)), draw(st.integers(1, 30))))
    values = {
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.integers(16, 90)),
        "block_size": 8,
        "num_gpu_blocks": draw(st.integers(15, 30)),
        "enable_prefix_caching": draw(st.booleans()),
        "scheduler_reserve_full_isl": draw(st.booleans()),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 12])),
    }
    if draw(st.booleans()):
        values |= {"composition": "prefill-first"}
    else:
        values |= {
            "pipeline_depth": draw(st.integers(0, 1)),
            "prefill_schedule_interval": draw(st.sampled_from([1, 3])),
            "max_num_partial_prefills": draw(st.sampled_from([None, 1])),
        }
    return requests_of(*rows), values


@settings(max_examples=40, deadline=None)
@given(runs())
def test_the_parts_of_every_time_add_up_to_it(tmp_path_factory, run):
    rows, values = run
    record = recorded(tmp_path_factory.mktemp("law") / "run", rows, Uneven(), **values)
    check_sums(waits_of([record]), record.requests)


@settings(max_examples=15, deadline=None)
@given(runs(), st.integers(0, 400), st.integers(1, 300), st.integers(0, 100))
def test_they_do_in_a_fleet_in_which_a_replica_dies(tmp_path_factory, run, from_ms, lasts_ms, failover_ms):
    rows, values = run
    outage = Outage(0, from_ms * MS, (from_ms + lasts_ms) * MS)
    fleet_waits(tmp_path_factory.mktemp("fleet") / "run", rows, values, Uneven(), outage, failover_ms)


def test_without_the_prompt_that_is_to_blame_the_others_take_so_much_less(tmp_path):
    """What is charged to a prompt of 3,000 tokens is what the others gain without it, within 5%."""
    rows = requests_of(*((20 * number, 40, 60) for number in range(10)))
    culprit = Request(10, 250 * MS, (Part(10, 0, 3000),), 1)
    common = {"max_num_batched_tokens": 256, "latency": Uneven()}
    waits = waits_of([recorded(tmp_path / "with", [*rows, culprit], **common)])
    check_sums(waits, [one.row for one in waits])
    blamed_ns = sum(one.culprits[10] for one in waits)
    assert sum((one.culprits for one in waits), Counter()).most_common(1) == [(10, blamed_ns)]
    without = {one.row["id"]: one for one in waits_of([recorded(tmp_path / "without", rows, **common)])}
    gained_ns = sum(one.e2e_ns.total() - without[one.row["id"]].e2e_ns.total() for one in waits[:10])
    assert blamed_ns == pytest.approx(gained_ns, rel=0.05) and blamed_ns > 500 * MS


# --- the command ---


def test_the_command_says_what_the_parts_are_of_all_of_one_and_of_the_slowest(twinserve, tmp_path):
    recorded(tmp_path / "run", requests_of((0, 8, 4), (5, 8, 2), (6, 8, 2)), max_num_seqs=1)
    whole = twinserve("explain", tmp_path / "run")
    assert whole.code == 0, whole.err
    assert "3 requests" in whole.out and "sequences" in whole.out and "as many ran as may (max_num_seqs)" in whole.out
    one = json.loads(twinserve("explain", tmp_path / "run", "--request", 1, "--json").out)
    assert one == [
        {
            "requests": [1],
            "ttft_ns": {OTHERS: 5 * MS, "sequences": 30 * MS, "own compute": 10 * MS},
            "e2e_ns": {OTHERS: 5 * MS, "sequences": 30 * MS, "own compute": 20 * MS},
            "culprits": {"0": 5 * MS},
        }
    ]
    slowest = json.loads(twinserve("explain", tmp_path / "run", "--slowest", 2, "--json").out)
    assert [row["requests"] for row in slowest] == [[2], [1]]
    assert sum(json.loads(twinserve("explain", tmp_path / "run", "--json").out)["e2e_ns"].values()) == sum(
        one.e2e_ns.total() for one in waits_of([load_record(tmp_path / "run")])
    )
    for options, words in (
        (("--request", 9), "request is 9, expected one that has ended in this run"),
        (("--request", 1, "--slowest", 1), "slowest is 1, expected none beside request"),
    ):
        refused = twinserve("explain", tmp_path / "run", *options)
        assert refused.code == 2 and words in refused.err and refused.err.count("\n") == 1


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_the_page_of_a_run_says_what_the_command_says(twinserve, tmp_path, num_replicas):
    """Sums by cause over all requests, and the parts of those that waited longest, to the nanosecond."""
    rows = requests_of(*((7 * number, 40 + 30 * (number % 3), 20) for number in range(14)))
    if num_replicas == 1:
        recorded(tmp_path / "run", rows, Uneven(), max_num_seqs=3, max_num_batched_tokens=64, num_gpu_blocks=20)
    else:
        chosen = Settings.load({"max_num_seqs": 3, "max_num_batched_tokens": 64, "num_gpu_blocks": 20})
        run_fleet(
            Workload(rows, {"sha256": "0", "transforms": []}, 0, 0),
            [ReplicaSpec(chosen, Uneven(), {"name": "made up"})] * num_replicas,
            LeastOutstanding(),
            router_facts={},
            out=tmp_path / "run",
        )
    made = twinserve("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert made.code == 0, made.err
    page = (tmp_path / "page.html").read_text()
    part = page[page.index('<section id="why-requests-waited">') :]
    of_all, of_each = (
        {row[0]: row[1:] for row in table} for table in map(_rows_of, part[: part.index("</section>")].split("<h3>"))
    )
    told = json.loads(twinserve("explain", tmp_path / "run", "--json").out)
    for place, name in ((0, "ttft_ns"), (2, "e2e_ns")):
        sums = {cause: int(cells[place]) for cause, cells in of_all.items() if int(cells[place])}
        assert sums == told[name] and len(sums) > 3
    slowest = json.loads(twinserve("explain", tmp_path / "run", "--slowest", 10, "--json").out)
    assert [int(number) for number in of_each] == [one["requests"][0] for one in slowest]
    for cells, one in zip(of_each.values(), slowest, strict=True):
        assert int(cells[0]) == sum(one["ttft_ns"].values()) == sum(map(int, cells[1:]))
        assert sorted(filter(None, map(int, cells[1:]))) == sorted(one["ttft_ns"].values())


def _rows_of(part: str) -> list[list[str]]:
    """The rows of a table of a page: the text at their heads, and of their cells the values by which they sort."""
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    rows = (
        re.findall(r"<t[hd][^>]*?(?: data-value=\"([^\"]*)\")?>([^<]*)</t[hd]>", row) for row in body.split("</tr>")
    )
    return [[unescape(row[0][1]), *(value for value, _ in row[1:] if value)] for row in rows if row]


def test_of_a_run_that_is_not_decided_again_the_page_says_that_it_is_not_known(twinserve, tmp_path):
    recorded(tmp_path / "run", requests_of((0, 8, 4), (5, 8, 2)))
    run = tmp_path / "run" / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"settings": {"max_num_seqs": 1}}))
    assert twinserve("report", tmp_path / "run", "--out", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "Does not replay" in page and "Not known: the run is not decided again exactly." in page


def test_a_run_that_cannot_be_decided_again_is_not_explained(tmp_path):
    record = recorded(tmp_path / "run", requests_of((0, 8, 4), (5, 8, 2)))
    record.run["settings"]["max_num_seqs"] = 1
    with pytest.raises(InputError, match="cannot be decided again exactly: decision"):
        waits_of([record])
