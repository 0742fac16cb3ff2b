"""The record of a real run, written, read back and decided again from its facts, makes every decision of that run."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from equivalence.real_run import RealRun, run_engine
from torch import nn

from twinserve.policies import Core, Sequence
from twinserve.policies.scheduler import FirstCome
from twinserve.settings.build_core import Settings
from twinserve.traces import transforms
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.traces.runs.replay import Difference, replay
from twinserve.worlds.workload import load_workload

AZURE = Path("azure", "AzureLLMInferenceTrace_conv.csv")
MOONCAKE = Path("mooncake", "conversation_trace.jsonl.gz")
FACTS = ("decision", "seen", "aborted", "committed", "decided_ns", "start_ns", "end_ns", "count")


def private(request_id: int, prompt_tokens: int, max_tokens: int, after: int | None = None) -> Request:
    """A request with a prompt of its own that comes in at once, or as soon as another one is answered."""
    return Request(request_id, 0, (Part(1000 + request_id, 0, prompt_tokens),), max_tokens, after=after)


def conversations(num_requests: int) -> list[Request]:
    """Conversations of three turns that begin at once with one of two system prompts of four blocks."""
    requests = generate(
        seed=1,
        num_requests=num_requests,
        rate=1000,
        prompt_tokens=LengthSpec.parse("lognormal:16:0.5:4:40"),
        output_tokens=LengthSpec.parse("lognormal:24:0.5:8:60"),
        num_system_prompts=2,
        system_prompt_tokens=64,
        turns=3,
    )
    return transforms.all_at_zero(requests, [])


# --- what a run is made for happens in it, and is decided again ---


def test_bursts_are_decided_again(serve, assert_replayed):
    """A burst waits for the shortest answer of the one before it: no two become one, and the engine is busy."""
    size = 6
    requests = [
        private(i, 10 + 5 * (i % size), 4 + 3 * (i % size), after=(i // size - 1) * size if i >= size else None)
        for i in range(16 * size)
    ]
    run = serve(requests, max_num_seqs=16, num_gpu_blocks=200)
    assert run.counts["bursts"] >= 5
    assert_replayed(run, "bursts", f"{run.counts['bursts']} saw >= 2 new requests")


def test_shared_prefixes_and_sessions_are_decided_again(serve, assert_replayed):
    run = serve(conversations(60), max_num_seqs=16, num_gpu_blocks=1000)
    hit = run.summary["cached_tokens"] / sum(row["prompt_tokens"] for row in run.record.requests)
    assert hit >= 0.3
    assert run.counts["hits_on_running"] >= 10
    happened = f"{hit:.0%} of prompt tokens hit, {run.counts['hits_on_running']} hits on a running request's blocks"
    assert_replayed(run, "shared prefixes", happened)


def test_preemptions_in_a_tiny_pool_are_decided_again(serve, assert_replayed):
    requests = [private(i, 40, 300 if i in (3, 9) else 60) for i in range(26)]
    run = serve(requests, max_num_seqs=8, block_size=8, num_gpu_blocks=24)
    resumed = run.counts["resumed_with_own"]
    assert run.counts["preemptions"] == run.summary["preemptions"] >= 20
    assert resumed >= 5
    assert run.ends["refused"] == 2
    happened = f"{run.counts['preemptions']} preemptions, {resumed} resumed with a hit on their own blocks, 2 refused"
    assert_replayed(run, "tiny pool", happened)


def test_stops_are_decided_again(serve, assert_replayed, depth):
    run = serve([private(i, 20, 250) for i in range(48)], ignore_eos=False, max_num_seqs=16, num_gpu_blocks=400)
    stops, late = run.counts["stops"], run.counts["late_decisions"]
    assert stops == run.ends["stop"] >= 20
    assert late >= 20 if depth else late == 0
    assert_replayed(run, "stops", f"{stops} requests stopped, {late} held a row of one that had stopped")


def test_aborts_from_another_thread_are_decided_again(serve, assert_replayed, depth):
    """Requests that would go on for long are aborted one by one; every sixth request ends by itself."""
    requests = [private(i, 20, 10 if i % 6 == 5 else 1500) for i in range(60)]
    long = [request.id for request in requests if request.max_tokens > 10]
    run = serve(requests, abort=long, abort_from=8, max_num_seqs=8, num_gpu_blocks=800)
    running, waiting, in_flight = (run.counts[f"aborted_{what}"] for what in ("running", "waiting", "in_flight"))
    assert running + waiting == sum(len(step["aborted"]) for step in run.record.steps) >= 20
    assert running >= 5 and waiting >= 5
    assert in_flight >= 5 if depth else in_flight == 0
    happened = f"{waiting} waiting and {running} running aborted, {in_flight} with a token in flight"
    assert_replayed(run, "aborts", happened)


@pytest.mark.parametrize(("trace", "rate_scale"), [(AZURE, 30), (MOONCAKE, 20)], ids=["azure", "mooncake"])
def test_an_excerpt_of_a_public_trace_is_decided_again(serve, assert_replayed, public_traces, trace, rate_scale):
    limits = {"limit": 40, "rate_scale": rate_scale, "max_prompt_tokens": 200, "max_output_tokens": 24}
    workload = load_workload(public_traces / trace, limits)
    run = serve(workload.requests, max_num_seqs=16, num_gpu_blocks=400)
    assert (run.summary["finished"], workload.capped > 0) == (40, True)
    assert (run.summary["cached_tokens"] > 0) == (trace == MOONCAKE)
    assert_replayed(run, trace.parent.name, f"40 requests, {workload.capped} cut to a cap")


def everything_at_once(model: nn.Module, out: Path, **settings: Any) -> RealRun:
    """A run with sessions, shared prefixes, a refusal, and a pool too small; some requests stop, some are aborted."""
    talks, long, refused = conversations(48), [private(i, 40, 200) for i in range(48, 64)], private(64, 480, 20)
    openings = [request.id for request in talks if request.after is None]
    abort = [*openings[::3], *(request.id for request in long[::4])]
    settings = {"max_num_seqs": 6, "num_gpu_blocks": 24} | settings
    run = run_engine(model, out, [*talks, *long, refused], ignore_eos=False, abort=abort, **settings)
    assert run.ends["stop"] and run.ends["length"] and run.ends["abort"] and run.ends["refused"], run.ends
    assert run.counts["preemptions"] > 0
    return run


VARIANTS = {
    "default": {},
    "no cache": {"enable_prefix_caching": False},
    "other hash": {
        "prefix_caching_hash_algo": "xxh3_128",
        "prefix_caching_seed": 5,
        "block_size": 5,
        "num_gpu_blocks": 77,
    },
    "no chunks": {"enable_chunked_prefill": False, "max_num_batched_tokens": 480, "max_model_len": 480},
    "no reserve": {"long_prefill_token_threshold": 24, "watermark": 0.1, "scheduler_reserve_full_isl": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_at_once_is_decided_again(tiny_model, tmp_path, assert_replayed, composition, depth, variant):
    settings = VARIANTS[variant] | {"composition": composition, "pipeline_depth": depth}
    run = everything_at_once(tiny_model, tmp_path / "run", **settings)
    ends = ", ".join(f"{number} by {reason}" for reason, number in sorted(run.ends.items()))
    happened = f"{run.counts['preemptions']} preemptions, ends: {ends}"
    assert_replayed(run, f"everything ({variant})", happened)


# --- what the facts do not say so, or the policies do not decide so, is noticed ---


@pytest.fixture(scope="module", params=[0, 1], ids=["depth0", "depth1"])
def kept(request, tiny_model, tmp_path_factory) -> RunRecord:
    """The record of a real run, which is replayed exactly."""
    run = everything_at_once(tiny_model, tmp_path_factory.mktemp("kept") / "run", pipeline_depth=request.param)
    assert replay(run.record).is_exact
    return run.record


@pytest.fixture
def record(kept: RunRecord) -> RunRecord:
    """A copy of it in memory, to be changed."""
    return copy.deepcopy(kept)


def first_difference(record: RunRecord, build_core: Callable[..., Core] | None = None) -> Difference:
    """Where a replay that has to fail does so: at a decision it names, all those before it being equal."""
    result = replay(record, build_core=build_core)
    assert not result.is_exact
    assert result.difference is not None
    assert result.equal == result.difference.decision < result.recorded == len(record.steps)
    assert str(result.difference).startswith(f"decision {result.equal}: {result.difference.field} is ")
    return result.difference


def span(record: RunRecord, request_id: int) -> range:
    """The decisions from a request's first admission to the one that sees it gone."""
    steps = record.steps
    first = next(step["decision"] for step in steps if request_id in [row[0] for row in step["admitted"]])
    last = max((step["decision"] for step in steps if request_id in step["left"]), default=len(steps) - 1)
    return range(first, last + 1)


def ended_by(record: RunRecord, reason: str) -> list[dict[str, Any]]:
    """Some of the requests that ended so, with more tokens than one, and if they stopped, fewer than they asked for."""
    most = {"length": 0, "stop": 1}[reason]
    rows = [row for row in record.requests if row["finish_reason"] == reason]
    return some(row for row in rows if 1 < row["output_tokens"] <= row["max_tokens"] - most)


def some(items: Iterable[Any], number: int = 5) -> list[Any]:
    """So many of the items, of which there must be as many, from all over them."""
    found = list(items)
    assert len(found) >= number
    return found[:: len(found) // number][:number]


def test_the_digest_is_the_only_decision_that_a_replay_needs(kept, tmp_path):
    stripped = tmp_path / "run"
    shutil.copytree(kept.path, stripped)
    rows = [{name: step[name] for name in (*FACTS, "digest")} for step in kept.steps]
    (stripped / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = load_record(stripped)
    assert record.steps == rows
    assert replay(record).is_exact
    record.steps[7]["digest"] = f"{int(record.steps[7]['digest'], 16) ^ 1:016x}"
    assert (first_difference(record).decision, first_difference(record).field) == (7, "digest")


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 0.9])
def test_two_requests_that_came_in_the_other_way_round_are_noticed(record, place):
    admitted = {row[0] for step in record.steps for row in step["admitted"]}
    rows = [row for row in record.requests if row["id"] in admitted]
    one, other = rows[int(place * len(rows)) :][:2]
    one["ingest"], other["ingest"] = other["ingest"], one["ingest"]
    assert first_difference(record).decision <= span(record, one["id"])[0]


@pytest.mark.parametrize("more", [-1, 1])
def test_another_limit_of_one_request_is_noticed(record, more):
    for row in ended_by(record, "length"):
        row["max_tokens"] += more
        assert first_difference(record).decision in span(record, row["id"])
        row["max_tokens"] -= more


class LastCome(FirstCome):
    """A waiting queue whose latest arrival is admitted first."""

    def push(self, seq: Sequence) -> None:
        self.push_preempted(seq)


def test_another_order_of_the_waiting_queue_is_noticed(record):
    def build_core(**keywords: Any) -> Core:
        core = Settings.load(record.run["settings"]).build_core(**keywords)
        core.scheduler.waiting = LastCome()
        return core

    assert first_difference(record, build_core).field == "admitted"


def test_a_step_taken_for_in_flight_though_it_had_ended_is_noticed(record):
    for step in some(now for before, now in pairwise(record.steps) if now["committed"] > before["committed"]):
        step["committed"] -= 1
        difference = first_difference(record)
        assert (difference.decision, difference.field) == (step["decision"], "facts")
        step["committed"] += 1


def test_a_step_taken_for_ended_though_it_was_in_flight_is_noticed(record):
    """One step ahead, its result is not missed unless it ends something."""
    for step in some(before for before, now in pairwise(record.steps) if set(now["left"]) - set(now["aborted"])):
        step["committed"] += 1
        assert first_difference(record).decision == step["decision"]
        step["committed"] -= 1


def test_a_stop_that_was_another_token_is_noticed(record):
    for row in ended_by(record, "stop"):
        tokens = record.outputs[row["id"]]
        stop, tokens[-1] = tokens[-1], 5
        assert stop == record.run["facts"]["eos_token_id"]
        assert first_difference(record).decision in span(record, row["id"])
        tokens[-1] = stop


def test_an_answer_that_goes_on_behind_the_last_decision_is_noticed(record):
    row = max((row for row in record.requests if row["finish_reason"] == "length"), key=lambda row: row["finish_ns"])
    assert replay(record).is_exact
    row["max_tokens"] += 1
    difference = replay(record).difference
    row["max_tokens"] -= 1
    assert difference is not None and difference.decision in span(record, row["id"])


def test_a_token_that_was_a_stop_is_noticed(record):
    for row in ended_by(record, "length"):
        tokens = record.outputs[row["id"]]
        middle = len(tokens) // 2
        token, tokens[middle] = tokens[middle], record.run["facts"]["eos_token_id"]
        assert first_difference(record).decision in span(record, row["id"])
        tokens[middle] = token


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("block_size", 32),
        ("max_num_seqs", 5),
        ("max_num_seqs", 7),
        ("num_gpu_blocks", 23),
        ("max_num_batched_tokens", 63),
        ("composition", "prefill-first"),
        ("enable_prefix_caching", False),
    ],
)
def test_another_setting_is_noticed(record, setting, value):
    assert record.run["settings"][setting] != value
    record.run["settings"][setting] = value
    first_difference(record)


def test_a_request_that_came_in_later_than_it_was_seen_is_noticed(record):
    refused = {row["ingest"] for row in record.requests if row["finish_reason"] == "refused"}
    growing = [now for before, now in pairwise(record.steps) if now["seen"] > before["seen"]]
    for step in some(step for step in growing if step["seen"] - 1 not in refused):
        step["seen"] -= 1
        assert first_difference(record).decision == step["decision"]
        step["seen"] += 1


def test_an_abort_left_out_is_noticed(record):
    step = next(step for step in record.steps if step["aborted"])
    step["aborted"].pop()
    assert first_difference(record).decision == step["decision"]


def test_an_abort_of_a_request_that_is_not_being_served_is_noticed(record):
    step = record.steps[len(record.steps) // 2]
    step["aborted"].append(10_000)
    assert (first_difference(record).decision, first_difference(record).field) == (step["decision"], "aborted")


def test_a_decision_that_saw_fewer_requests_than_the_one_before_is_noticed(record):
    step = record.steps[len(record.steps) // 2]
    step["seen"] = 0
    assert (first_difference(record).decision, first_difference(record).field) == (step["decision"], "seen")
