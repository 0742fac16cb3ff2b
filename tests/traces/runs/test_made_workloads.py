"""Requests that no file holds: their runs are recorded, compared, fitted and served again like any others."""

from __future__ import annotations

import pytest

from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.runs.compare import METRICS, compare, value_of
from twinserve.traces.runs.record import load_record
from twinserve.worlds.run import about_runs, choose_latency, run_sim
from twinserve.worlds.workload import Workload, load_workload


def requests_of(seed: int):
    return generate(
        seed=seed, num_requests=30, rate=20.0, prompt_tokens=LengthSpec(60, 0.5), output_tokens=LengthSpec(20, 0.5)
    )


def recorded(folder, name: str, seed: int):
    latency, facts = choose_latency("roofline:qwen3-0.6b@h100")
    run_sim(Workload(requests_of(seed)), Settings(num_gpu_blocks=500), latency, latency_facts=facts, out=folder / name)
    return load_record(folder / name)


def test_runs_of_the_same_requests_are_known_to_be(tmp_path):
    one, again, other = (recorded(tmp_path, name, seed) for name, seed in (("one", 1), ("again", 1), ("other", 2)))
    assert all(each.sim == each.real for each in compare(one, again))
    with pytest.raises(InputError, match="facts.trace.sha256"):
        compare(one, other)


def test_a_record_of_them_is_served_again_and_says_what_a_fit_was_made_of(tmp_path):
    record = recorded(tmp_path, "one", 1)
    latency, facts = choose_latency("roofline:qwen3-0.6b@h100")
    workload = load_workload(tmp_path / "one", {})
    again = run_sim(workload, Settings(num_gpu_blocks=500), latency, latency_facts=facts)
    assert all(value_of(again, metric) == value_of(record.run["summary"], metric) for metric in METRICS)
    assert about_runs([record])["runs"] == [{"name": "one", "trace": Workload(requests_of(1)).facts["sha256"]}]


def test_denser_they_are_others():
    requests = requests_of(1)
    twice = Workload(requests).at_rate_scale(2.0)
    assert twice.facts["sha256"] == Workload(requests).facts["sha256"] and twice.facts["transforms"]
    assert twice.requests[-1].arrival_ns == pytest.approx(requests[-1].arrival_ns / 2, abs=1)
