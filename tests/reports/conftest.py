"""Records to draw: small runs of the simulator, and the same with other step times as the runs they predict."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.sim.latency import StepFeatures
from twinserve.sim.replica import simulate
from twinserve.sim.speculation import Acceptance, AcceptanceLaw
from twinserve.traces.generator import LengthSpec, generate
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


@pytest.fixture
def make_record(tmp_path: Path) -> Callable[..., RunRecord]:
    """Simulate and load a record: `make_record(name, facts=..., device=..., noise=..., dropped=..., **settings)`."""

    def make(
        name: str = "sim",
        *,
        facts: dict[str, Any] | None = None,
        device: str | None = None,
        noise: float = 0.0,
        dropped: int = 0,
        num_requests: int = 80,
        acceptance: Acceptance | None = None,
        **values: Any,
    ) -> RunRecord:
        settings = Settings.load(
            {"max_num_seqs": 16, "max_num_batched_tokens": 128, "num_gpu_blocks": 90, "pipeline_depth": 1} | values
        )
        requests = generate(
            seed=3,
            num_requests=num_requests,
            rate=40,
            prompt_tokens=LengthSpec.parse("lognormal:60:1.0:1:300"),
            output_tokens=LengthSpec.parse("lognormal:25:1.0:1:100"),
            num_system_prompts=2,
            system_prompt_tokens=40,
            turns=2,
            think_time_s=0.2,
        )
        facts = {"trace": TRACE, "latency": {"name": "a line", "identity": "4f"}} if facts is None else facts
        params = SamplingParams(ignore_eos=True)
        path = tmp_path / name
        with RunRecorder(path, world="sim", settings=settings.model_dump(), facts=facts, device=device) as recorder:
            core = settings.build_core(listener=recorder)
            simulate(
                requests,
                core,
                Latency(noise),
                announce=lambda request: recorder.expect(request, params),
                acceptance=acceptance,
            )
            recorder.close({"dropped": dropped})
        return load_record(path)

    return make


@pytest.fixture
def sim(make_record) -> RunRecord:
    """A simulation that preempts."""
    record = make_record()
    assert record.run["summary"]["preemptions"]
    return record


DRAFTS = {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 4}}


@pytest.fixture
def drafted(make_record) -> RunRecord:
    """A simulation with drafts."""
    return make_record("drafted", acceptance=AcceptanceLaw((0.8, 0.7, 0.6, 0.5), found_share=0.7), **DRAFTS)


@pytest.fixture
def real(make_record) -> RunRecord:
    """The run that `sim` predicts."""
    record = make_record("real", noise=0.2, facts={"trace": TRACE, "model": "tiny"}, device="a card")
    assert record.run["summary"]["preemptions"]
    return replace(record, run=record.run | {"world": "real"})
