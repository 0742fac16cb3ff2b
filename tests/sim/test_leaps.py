"""Repeated steps simulated at once give the record of a simulation step by step, but for how its rows are grouped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from latencies import Uneven

import twinserve.sim
import twinserve.traces
from twinserve.policies import SamplingParams
from twinserve.sim.fit import FittedLatency
from twinserve.sim.latency import LatencyModel
from twinserve.sim.replica import simulate
from twinserve.sim.roofline import RooflineLatency
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.record import RunRecord, RunRecorder, load_record
from twinserve.traces.replay import replay
from twinserve.traces.request import Request
from twinserve.traces.settings import Settings

SETTINGS = {
    "roomy": {"num_gpu_blocks": 400},
    "tight": {"num_gpu_blocks": 40, "max_num_seqs": 8},
    "chunks": {"num_gpu_blocks": 60, "long_prefill_token_threshold": 20, "max_num_partial_prefills": 2},
    "priority": {"num_gpu_blocks": 40, "scheduling_policy": "priority", "watermark": 0.05},
    "aged": {"num_gpu_blocks": 40, "scheduling_policy": "shortest", "scheduling_ageing": 2},
    "cache-aware": {"num_gpu_blocks": 60, "scheduling_policy": "cache-aware"},
}


def requests_of(seed: int) -> list[Request]:
    """Conversations of two turns with shared system prompts, priorities and salts."""
    requests = generate(
        seed=seed,
        num_requests=40,
        rate=8,
        prompt_tokens=LengthSpec.parse("lognormal:60:1.0:1:200"),
        output_tokens=LengthSpec.parse("lognormal:60:1.0:1:300"),
        num_system_prompts=2,
        system_prompt_tokens=40,
        turns=2,
        think_time_s=0.5,
    )
    return [replace(request, priority=request.id % 3, salt="other" * (request.id % 5 == 4)) for request in requests]


UNEVEN = Uneven()
FITTED = FittedLatency.load(Path(twinserve.sim.__file__).parent / "data" / "qwen3-0.6b-h100.json")
LATENCIES = {
    "a step's cost": UNEVEN,
    "columns of costs": RooflineLatency.parse("qwen3-8b@a100"),
    "a fit's columns": FITTED,
    "a fit whose host drifts": FITTED.with_drift([0.7, 1.6, 1.0]),
}


def run(
    folder: Path, seed: int, settings: Settings, *, step_by_step: bool, latency: LatencyModel = UNEVEN
) -> RunRecord:
    requests, params = requests_of(seed), SamplingParams(ignore_eos=True)
    with RunRecorder(folder, world="sim", settings=settings.model_dump(), facts={}) as recorder:
        core = settings.build_core(listener=recorder)
        simulate(
            requests,
            core,
            latency,
            params=params,
            announce=lambda request: recorder.expect(request, params),
            step_by_step=step_by_step,
        )
        recorder.close()
    return load_record(folder)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("composition", ["mixed", "prefill-first"])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("latency", LATENCIES.values(), ids=LATENCIES)
def test_a_record_is_that_of_a_simulation_step_by_step(tmp_path, name, composition, depth, latency):
    values = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "max_model_len": 600} | SETTINGS[name]
    settings = Settings.load(values | {"composition": composition, "pipeline_depth": depth})
    single = run(tmp_path / "single", 3, settings, step_by_step=True, latency=latency)
    leaping = run(tmp_path / "leaping", 3, settings, step_by_step=False, latency=latency)

    assert (single.path / "requests.jsonl").read_bytes() == (leaping.path / "requests.jsonl").read_bytes()
    events = leaping.run["summary"].pop("events")
    assert single.run["summary"].pop("events") == len(single.steps)
    assert events < len(single.steps) / (1.2 if name == "cache-aware" else 2), "most steps repeat the one before"
    assert single.run == leaping.run

    assert len(single.steps) == len(leaping.steps)
    for one, other in zip(single.steps, leaping.steps, strict=True):
        assert other == {field: value for field, value in one.items() if field in other}
        assert one.keys() - other.keys() <= {"digest"}
    assert replay(leaping).is_exact


def test_rows_of_several_steps_keep_to_the_schema(tmp_path):
    record = run(tmp_path / "run", 5, Settings.load({"num_gpu_blocks": 400}), step_by_step=False)
    schema = json.loads((Path(twinserve.traces.__file__).parent / "record.schema.json").read_text())
    validator = Draft202012Validator({"$ref": "#/$defs/step", "$defs": schema["$defs"]})
    rows = [json.loads(line) for line in (record.path / "steps.jsonl").read_text().splitlines()]
    assert [error.message for row in rows for error in validator.iter_errors(row)] == []
    assert max(row["count"] for row in rows) > 10
    assert sum(row["count"] for row in rows) == len(record.steps) == record.run["summary"]["steps"]


def test_a_replay_finds_a_difference_inside_a_row_of_several_steps(tmp_path):
    record = run(tmp_path / "run", 5, Settings.load({"num_gpu_blocks": 400}), step_by_step=False)
    inner = next(step for step in record.steps if "digest" not in step and step["grown"])
    inner["grown"] = [[seq_id, [block_id + 1 for block_id in ids]] for seq_id, ids in inner["grown"]]
    difference = replay(record).difference
    assert difference is not None
    assert (difference.decision, difference.field) == (inner["decision"], "grown")
