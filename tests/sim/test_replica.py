"""The simulated replica: times that can be worked out by hand, and the order of what happens at one instant."""

import pytest

from twinserve.policies import CoreListener
from twinserve.settings.build_core import Settings
from twinserve.sim.latency import StepCost, StepFeatures
from twinserve.sim.replica import simulate
from twinserve.traces.request import Part, Request, answer_text

MS = 1_000_000


class Fixed:
    """Every step costs the same."""

    def __init__(self, host_ms: int, device_ms: int, lead_ms: int = 0):
        self.cost = StepCost(host_ms * MS, device_ms * MS, lead_ms * MS)
        self.arrived: list[int] = []

    def step_cost(self, features: StepFeatures) -> StepCost:
        self.arrived.append(features.arrived)
        return self.cost


class Journal(CoreListener):
    """Keeps what a run did."""

    def __init__(self) -> None:
        self.times: dict[int, tuple[int, int, int]] = {}
        self.seen: list[int] = []
        self.batches: list = []
        self.ended: dict = {}
        self.arrived: list[int] = []

    def ingested(self, seq, number):
        pass

    def decided(self, batch):
        self.seen.append(batch.seen)
        self.batches.append(batch)

    def repeated(self, batch, spans, grown, num_committed, latest):
        self.committed(batch)
        for number, span in enumerate(spans, batch.decision + 1):
            self.seen.append(batch.seen)
            self.times[number] = span

    def committed(self, batch):
        self.times[batch.decision] = (batch.decided_ns, batch.start_ns, batch.end_ns)

    @property
    def steps(self) -> list[tuple[int, ...]]:
        """When each step was decided, started and ended, in milliseconds."""
        return [tuple(ns // MS for ns in times) for _, times in sorted(self.times.items())]

    def finished(self, seq):
        self.ended[seq.seq_id] = seq


def request(number: int, at_ms: int, prompt: int = 8, max_tokens: int = 3, **more) -> Request:
    return Request(number, at_ms * MS, more.pop("parts", (Part(number, 0, prompt),)), max_tokens, **more)


def run(requests: list[Request], host_ms: int, device_ms: int, *, lead_ms: int = 0, **settings) -> Journal:
    journal = Journal()
    core = Settings.load({"num_gpu_blocks": 64, **settings}).build_core(listener=journal)
    latency = Fixed(host_ms, device_ms, lead_ms)
    simulate(requests, core, latency)
    journal.arrived = latency.arrived
    return journal


def test_without_overlap_a_step_is_decided_when_the_one_before_has_ended():
    journal = run([request(0, 0)], host_ms=2, device_ms=10)
    assert journal.steps == [(0, 2, 12), (12, 14, 24), (24, 26, 36)]


def test_one_step_ahead_host_work_hides_behind_the_device():
    journal = run([request(0, 0)], host_ms=2, device_ms=10, pipeline_depth=1)
    assert journal.steps[:3] == [(0, 2, 12), (2, 12, 22), (12, 22, 32)]
    assert journal.ended[0].finish_ns == 32 * MS


def test_one_step_ahead_a_host_slower_than_the_device_sets_the_pace():
    journal = run([request(0, 0)], host_ms=10, device_ms=2, pipeline_depth=1)
    assert journal.steps[:3] == [(0, 10, 12), (10, 20, 22), (20, 30, 32)]


def test_a_device_that_works_during_the_launch_begins_before_its_end_and_ends_no_sooner():
    assert run([request(0, 0)], host_ms=10, device_ms=15, lead_ms=8).steps[:2] == [(0, 2, 17), (17, 19, 34)]
    assert run([request(0, 0)], host_ms=10, device_ms=3, lead_ms=8).steps[:2] == [(0, 2, 10), (10, 12, 20)]
    ahead = run([request(0, 0)], host_ms=10, device_ms=15, lead_ms=8, pipeline_depth=1)
    assert ahead.steps[:3] == [(0, 2, 17), (10, 17, 32), (20, 32, 47)]


def test_a_steps_features_count_what_came_in_since_the_decision_before():
    journal = run([request(0, 0), request(1, 5), request(2, 6), request(3, 11)], host_ms=2, device_ms=10)
    assert journal.arrived[:3] == [1, 3, 0]


def test_a_request_that_arrives_during_a_step_is_seen_by_the_next_decision():
    journal = run([request(0, 0), request(1, 5)], host_ms=2, device_ms=10)
    assert journal.seen[:2] == [1, 2]


def test_a_request_that_arrives_at_the_instant_of_a_decision_is_seen_by_it():
    journal = run([request(0, 0), request(1, 12), request(2, 12)], host_ms=2, device_ms=10)
    assert journal.seen[:2] == [1, 3]
    assert [row.seq.seq_id for row in journal.batches[1].admitted] == [1, 2], "equal instants go by trace row"


def test_an_idle_replica_wakes_at_the_arrival():
    journal = run([request(0, 0, max_tokens=1), request(1, 100, max_tokens=1)], host_ms=2, device_ms=10)
    assert journal.steps == [(0, 2, 12), (100, 102, 112)]


def test_the_next_turn_of_a_session_arrives_when_the_answer_is_complete_and_hits_it():
    first = request(0, 0, prompt=32, max_tokens=17)
    parts = (Part(0, 0, 32), Part(answer_text(0), 0, 17), Part(9, 0, 10))
    journal = run([first, request(1, 5, parts=parts, after=0)], host_ms=0, device_ms=10)
    second = journal.ended[1]
    assert second.arrival_ns == journal.ended[0].finish_ns == 170 * MS
    assert second.num_cached_tokens == 48, "prompt and answer of the turn before, whole blocks of 16"


def test_a_later_arrival_of_the_next_turn_is_kept():
    parts = (Part(0, 0, 8), Part(answer_text(0), 0, 3))
    journal = run([request(0, 0), request(1, 500, parts=parts, after=0)], host_ms=0, device_ms=10)
    assert journal.ended[1].arrival_ns == 500 * MS


def test_an_answer_cut_short_shortens_the_next_turns_prompt():
    parts = (Part(0, 0, 8), Part(answer_text(0), 0, 9), Part(5, 0, 2))
    requests = [request(0, 0, max_tokens=9), request(1, 0, parts=parts, after=0, max_tokens=1)]
    journal = run(requests, host_ms=0, device_ms=10, max_model_len=14)
    assert journal.ended[0].num_completion_tokens == 6
    assert journal.ended[1].finish_reason == "refused", "its prompt is 8 + 6 + 2 tokens"
    assert journal.ended[1].num_prompt_tokens == 16


@pytest.mark.parametrize("depth", [0, 1])
def test_refused_requests_end_and_the_rest_is_served(depth):
    requests = [request(0, 0), request(1, 0, prompt=5000), request(2, 0)]
    journal = run(requests, host_ms=1, device_ms=1, pipeline_depth=depth)
    assert {i: seq.finish_reason for i, seq in journal.ended.items()} == {0: "length", 1: "refused", 2: "length"}
