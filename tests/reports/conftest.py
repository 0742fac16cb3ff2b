"""Records to draw: small runs of the simulator, and the same with other step times as the runs they predict."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from busy_traces import dense_conversations

from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.sim.latency import StepFeatures
from twinserve.sim.replica import simulate
from twinserve.sim.speculation import Acceptance, AcceptanceLaw
from twinserve.traces.request import Request
from twinserve.traces.runs.record import RunRecord, RunRecorder, load_record

TRACE = {
    "path": "chat.jsonl",
    "format": "twinserve",
    "sha256": "5e" * 32,
    "notes": {},
    "transforms": [{"transform": "limit", "parameters": {"num_requests": 80}, "changed": {"requests_dropped": 7}}],
}


class Latency:
    """Steps that cost by their tokens; `noise` makes them vary as those of a device do."""

    def __init__(self, noise: float):
        self.noise = noise

    def step_cost(self, features: StepFeatures) -> tuple[int, int]:
        factor = random.Random(features.decision).lognormvariate(0, self.noise)
        return 300_000, round((4e6 + 60e3 * features.tokens) * factor)


def simulated(
    path: Path,
    *,
    facts: dict[str, Any] | None = None,
    device: str | None = None,
    noise: float = 0.0,
    dropped: int = 0,
    num_requests: int = 80,
    acceptance: Acceptance | None = None,
    requests: list[Request] | None = None,
    **values: Any,
) -> RunRecord:
    """Simulate into a folder, and load the record."""
    settings = Settings.load(
        {"max_num_seqs": 16, "max_num_batched_tokens": 128, "num_gpu_blocks": 90, "pipeline_depth": 1} | values
    )
    requests = requests or dense_conversations(num_requests, rate=40)
    facts = {"trace": TRACE, "latency": {"name": "a line", "identity": "4f"}} if facts is None else facts
    params = SamplingParams(ignore_eos=True)
    with RunRecorder(path, world="sim", settings=settings.model_dump(), facts=facts, device=device) as recorder:
        core = settings.build_core(listener=recorder)
        announce = partial(recorder.expect, sampling=params)
        simulate(requests, core, Latency(noise), announce=announce, acceptance=acceptance)
        recorder.close({"dropped": dropped})
    return load_record(path)


@pytest.fixture
def make_record(tmp_path: Path) -> Callable[..., RunRecord]:
    """Simulate and load a record: `make_record(name, facts=..., device=..., noise=..., dropped=..., **settings)`."""

    def make(name: str = "sim", **values: Any) -> RunRecord:
        return simulated(tmp_path / name, **values)

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the records lie that no test changes."""
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="session")
def sim(folder: Path) -> RunRecord:
    """A simulation that preempts."""
    record = simulated(folder / "sim")
    assert record.run["summary"]["preemptions"]
    return record


DRAFTS = {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 4}}


@pytest.fixture(scope="session")
def drafted(folder: Path) -> RunRecord:
    """A simulation with drafts."""
    law = AcceptanceLaw((0.8, 0.7, 0.6, 0.5), found_share=0.7)
    return simulated(folder / "drafted", acceptance=law, **DRAFTS)


@pytest.fixture(scope="session")
def real(folder: Path) -> RunRecord:
    """The run that `sim` predicts."""
    record = simulated(folder / "real", noise=0.2, facts={"trace": TRACE, "model": "tiny"}, device="a card")
    assert record.run["summary"]["preemptions"]
    return replace(record, run=record.run | {"world": "real"})
