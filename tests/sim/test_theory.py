"""Runs obey the laws of queues: M/D/1 in the limit, Little's law and conservation in every run, to the nanosecond."""

from __future__ import annotations

import math
import random
import statistics
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import pytest
from latencies import Constant

from twinserve.policies import CoreListener
from twinserve.settings.build_core import Settings
from twinserve.sim.latency import StepFeatures
from twinserve.sim.replica import simulate
from twinserve.sim.routers import LeastOutstanding
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.fleet_record import load_replicas
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.worlds.run import ReplicaSpec, run_fleet, run_sim
from twinserve.worlds.workload import Workload

SERVICE_NS = 10_000_000
UTILISATION = 0.3
NUM_REQUESTS = 48_000
BATCHES = 60
BACK = 5


class Linear:
    """A step costs what it computes and reads."""

    def step_cost(self, features: StepFeatures) -> tuple[int, int]:
        return 500_003, 4_000_037 + 30_011 * features.tokens + 503 * features.kv_tokens


# --- M/D/1 ---


class Waits(CoreListener):
    """How long each request waited, from its arrival to its first step, and when it arrived."""

    def __init__(self) -> None:
        self.waits_ns: list[int] = []
        self.arrivals_ns: list[int] = []

    def finished(self, seq) -> None:
        self.waits_ns.append(seq.first_scheduled_ns - seq.arrival_ns)
        self.arrivals_ns.append(seq.arrival_ns)


def poisson(rate: float, count: int) -> Iterator[Request]:
    """One-token prompts and answers that arrive at random."""
    draws, arrival_s = random.Random(0), 0.0
    for number in range(count):
        arrival_s += draws.expovariate(rate)
        yield Request(number, round(arrival_s * 1e9), (Part(number, 0, 1),), 1)


def waits_for_latest(arrivals_ns: list[int]) -> list[int]:
    """How long each request would wait if all but the BACK before it had never come."""
    padded = [-(10**18)] * BACK + arrivals_ns
    return [
        max(0, *(SERVICE_NS * back - padded[number] + padded[number - back] for back in range(1, BACK + 1)))
        for number in range(BACK, len(padded))
    ]


def expected_wait_for_latest(rate: float) -> float:
    """Its mean for Poisson arrivals: E max(0, S_1, ..., S_n) = sum of E max(0, S_k) / k (Spitzer, 1956).

    S_k = k service times less a sum of k gaps, which is gamma distributed.
    """

    def below(count: int, x: float) -> float:
        """The probability that a sum of so many gaps is below x."""
        load = rate * x
        return 1 - math.exp(-load) * sum(load**term / math.factorial(term) for term in range(count))

    served = [(count, count * SERVICE_NS) for count in range(1, BACK + 1)]
    return sum((x * below(count, x) - count / rate * below(count + 1, x)) / count for count, x in served)


def test_the_mean_wait_is_that_of_an_m_d_1_queue():
    """Pollaczek and Khinchine: W = rho s / (2 (1 - rho)) for service times s without variance.

    What a request waits for the latest few before it varies most and has a known mean, so it serves as a control
    variate. The standard error comes from the means of batches (Law, Simulation Modeling and Analysis, chapters 9, 11).
    """
    log, rate = Waits(), UTILISATION / SERVICE_NS
    settings = Settings(max_num_seqs=1, enable_prefix_caching=False)
    simulate(poisson(rate * 1e9, NUM_REQUESTS), settings.build_core(listener=log), Constant(SERVICE_NS))
    assert len(log.waits_ns) == NUM_REQUESTS
    expected_ns = UTILISATION * SERVICE_NS / (2 * (1 - UTILISATION))
    known_ns = expected_wait_for_latest(rate)
    waits_ns = [
        wait - latest + known_ns for wait, latest in zip(log.waits_ns, waits_for_latest(log.arrivals_ns), strict=True)
    ]
    size = NUM_REQUESTS // BATCHES
    means = [statistics.fmean(waits_ns[size * number : size * (number + 1)]) for number in range(BATCHES)]
    error = statistics.stdev(means) / math.sqrt(BATCHES) / expected_ns
    assert error < 0.005
    assert statistics.fmean(means) == pytest.approx(expected_ns, rel=0.01)
    assert statistics.fmean(log.waits_ns) == pytest.approx(expected_ns, rel=0.04), "without the control variate"


# --- every run ---


@pytest.fixture(scope="module", params=["mixed", "prefill-first", "one step ahead", "fleet"])
def records(request, tmp_path_factory) -> list[RunRecord]:
    """The records of a run, of one replica or of some."""
    kind, folder = request.param, tmp_path_factory.mktemp("theory") / "run"
    requests = generate(
        seed=11,
        num_requests=150,
        rate=12,
        prompt_tokens=LengthSpec.parse("lognormal:80:1.0:1:300"),
        output_tokens=LengthSpec.parse("lognormal:40:1.0:1:200"),
        num_system_prompts=2,
        system_prompt_tokens=40,
        turns=2,
        think_time_s=0.2,
    )
    workload = Workload(requests, {"sha256": "0", "transforms": []}, 0, 0)
    settings = Settings(
        max_num_seqs=16,
        max_num_batched_tokens=128,
        num_gpu_blocks=80,
        composition="prefill-first" if kind == "prefill-first" else "mixed",
        pipeline_depth=int(kind == "one step ahead"),
    )
    if kind != "fleet":
        run_sim(workload, settings, Linear(), latency_facts={"name": "linear"}, out=folder)
        return [load_record(folder)]
    replicas = [ReplicaSpec(settings, Linear(), {"name": "linear"})] * 3
    run_fleet(workload, replicas, LeastOutstanding(), router_facts={}, out=folder)
    return load_replicas(Path(folder))


def test_littles_law_holds_exactly(records):
    """The integral over time of the number in the system is the sum of the times in it, in whole nanoseconds.

    The number is what the decisions counted, waiting and running, from one to the next or until all had ended; the
    times are those of the requests, from the decision that saw them.
    """
    for record in records:
        finishes_ns = sorted(row["finish_ns"] for row in record.requests)
        integral = 0
        for step, following in zip(record.steps, [*record.steps[1:], None], strict=True):
            next_ns = math.inf if following is None else following["decided_ns"]
            if bisect_right(finishes_ns, next_ns) >= step["seen"]:
                next_ns = finishes_ns[step["seen"] - 1]
            integral += (step["waiting"] + step["running"]) * (next_ns - step["decided_ns"])
        assert integral == sum(row["finish_ns"] - row["ingested_ns"] for row in record.requests) > 0


def test_requests_and_tokens_are_conserved(records):
    """Everything that came in ended, and every token that was computed was asked for."""
    rows = [row for record in records for row in record.requests]
    assert sorted(row["id"] for row in rows) == list(range(150))
    assert all(row["finish_reason"] == "length" and row["output_tokens"] == row["max_tokens"] for row in rows)
    for record in records:
        computed = dict.fromkeys((row["id"] for row in record.requests), 0)
        usual: dict[int, None] = {}
        for step in record.steps:
            for seq_id in (*step["left"], *step["preempted"]):
                usual.pop(seq_id, None)
            named = {seq_id: num_tokens for seq_id, num_tokens, _ in step["rows"]}
            if step["usual"]:
                named |= dict.fromkeys((seq_id for seq_id in usual if seq_id not in named), 1)
            named |= {seq_id: num_tokens for seq_id, _, num_tokens, _ in step["admitted"]}
            for seq_id, num_tokens in named.items():
                computed[seq_id] += num_tokens
            usual |= dict.fromkeys(entry[0] for entry in step["admitted"])
            assert step["tokens"] == sum(named.values()) == step["prompt_tokens"] + step["decode_tokens"]
        for row in record.requests:
            if not row["preemptions"]:
                expected = row["prompt_tokens"] - row["cached_tokens"] + row["output_tokens"] - 1
                assert computed[row["id"]] == expected
