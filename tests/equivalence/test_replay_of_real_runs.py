"""The record of a real run, written, read back and decided again from its facts, makes every decision of that run."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from equivalence.real_run import RealRun, run_engine

from twinserve.policies import Core, Sequence
from twinserve.policies.scheduler import FirstCome
from twinserve.traces import transforms
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.record import RunRecord, load_record
from twinserve.traces.replay import Difference, replay
from twinserve.traces.request import Part, Request
from twinserve.traces.settings import Settings
from twinserve.workload import load_workload

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
        for i in range(40 * size)
    ]
    run = serve(requests, max_num_seqs=16, num_gpu_blocks=200)
    assert run.counts["bursts"] >= 5
    assert_replayed(run, "bursts", f"{run.counts['bursts']} saw >= 2 new requests")


def test_shared_prefixes_and_sessions_are_decided_again(serve, assert_replayed):
    run = serve(conversations(120), max_num_seqs=16, num_gpu_blocks=1000)
    hit = run.summary["cached_tokens"] / sum(row["prompt_tokens"] for row in run.record.requests)
    assert hit >= 0.3
    assert run.counts["hits_on_running"] >= 10
    happened = f"{hit:.0%} of prompt tokens hit, {run.counts['hits_on_running']} hits on a running request's blocks"
    assert_replayed(run, "shared prefixes", happened)


def test_preemptions_in_a_tiny_pool_are_decided_again(serve, assert_replayed):
    requests = [private(i, 40, 300 if i in (3, 9) else 60) for i in range(50)]
    run = serve(requests, max_num_seqs=8, block_size=8, num_gpu_blocks=24)
    resumed = run.counts["resumed_with_own"]
    assert run.counts["preemptions"] == run.summary["preemptions"] >= 20
    assert resumed >= 5
    assert run.summary["refused"] == 2
    happened = f"{run.counts['preemptions']} preemptions, {resumed} resumed with a hit on their own blocks, 2 refused"
    assert_replayed(run, "tiny pool", happened)


def test_stops_are_decided_again(serve, assert_replayed, depth):
    run = serve([private(i, 20, 250) for i in range(80)], ignore_eos=False, max_num_seqs=16, num_gpu_blocks=400)
    stops, late = run.counts["stops"], run.counts["late_decisions"]
    assert stops == run.summary["stopped"] >= 20
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


@pytest.mark.parametrize(("trace", "rate_scale"), [(AZURE, 20), (MOONCAKE, 10)], ids=["azure", "mooncake"])
def test_an_excerpt_of_a_public_trace_is_decided_again(serve, assert_replayed, public_traces, trace, rate_scale):
    limits = {"limit": 40, "rate_scale": rate_scale, "max_prompt_tokens": 200, "max_output_tokens": 24}
    workload = load_workload(public_traces / trace, limits)
    run = serve(workload.requests, max_num_seqs=16, num_gpu_blocks=400)
    assert (run.summary["finished"], workload.shortened > 0) == (40, True)
    assert (run.summary["cached_tokens"] > 0) == (trace == MOONCAKE)
    assert_replayed(run, trace.parent.name, f"40 requests, {workload.shortened} lengths cut to a cap")


def everything_at_once(model, out: Path, **settings: Any) -> RealRun:
    """A run with sessions, shared prefixes, a refusal, and a pool too small; some requests stop, some are aborted."""
    requests = conversations(72)
    requests.append(private(72, 470, 20))
    settings = {"max_num_seqs": 6, "num_gpu_blocks": 30} | settings
    run = run_engine(model, out, requests, ignore_eos=False, abort=range(0, 72, 6), **settings)
    happened = ("refused", "aborted", "stopped", "preemptions")
    assert min(run.summary[what] for what in happened) > 0, {what: run.summary[what] for what in happened}
    return run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_prefix_caching": False},
        {"prefix_caching_hash_algo": "xxh3_128", "prefix_caching_seed": 5, "block_size": 5, "num_gpu_blocks": 96},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 480, "max_model_len": 480},
        {"long_prefill_token_threshold": 24, "watermark": 0.1, "scheduler_reserve_full_isl": False},
    ],
    ids=["default", "no-cache", "other-hash", "no-chunks", "no-reserve"],
)
def test_everything_at_once_is_decided_again(tiny_model, tmp_path, assert_replayed, composition, depth, settings):
    settings = settings | {"composition": composition, "pipeline_depth": depth}
    run = everything_at_once(tiny_model, tmp_path / "run", **settings)
    happened = {what: run.summary[what] for what in ("preemptions", "stopped", "aborted", "refused")}
    assert_replayed(run, "everything at once", ", ".join(f"{number} {what}" for what, number in happened.items()))
