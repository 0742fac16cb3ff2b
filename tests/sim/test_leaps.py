"""Repeated steps simulated at once give the record of a simulation step by step, but for how its rows are grouped."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import own_rules
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from latencies import Uneven

import twinserve.sim
import twinserve.traces.runs
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.sim.fit import FittedLatency
from twinserve.sim.latency import LatencyModel
from twinserve.sim.replica import simulate
from twinserve.sim.roofline import RooflineLatency
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.request import Request
from twinserve.traces.runs.record import RunRecord, RunRecorder, load_record
from twinserve.traces.runs.replay import replay

SETTINGS = {
    "roomy": {"num_gpu_blocks": 400},
    "tight": {"num_gpu_blocks": 40, "max_num_seqs": 8},
    "chunks": {"num_gpu_blocks": 60, "long_prefill_token_threshold": 20, "max_num_partial_prefills": 2},
    "priority": {"num_gpu_blocks": 40, "scheduling_policy": "priority", "watermark": 0.05},
    "aged": {"num_gpu_blocks": 40, "scheduling_policy": "shortest", "scheduling_ageing": 2},
    "one's own": {
        "num_gpu_blocks": 40,
        "scheduling_policy": f"{own_rules.__file__}:LastCome(window=3)",
        "admission": f"{own_rules.__file__}:Roomy(spare=4)",
        "victim": f"{own_rules.__file__}:FirstAdmitted",
    },
    "cache-aware": {"num_gpu_blocks": 60, "scheduling_policy": "cache-aware"},
}


def requests_of(seed: int, **values: Any) -> list[Request]:
    """Conversations of two turns with shared system prompts, priorities and salts."""
    usual = {
        "num_requests": 40,
        "rate": 8,
        "prompt_tokens": LengthSpec.parse("lognormal:60:1.0:1:200"),
        "output_tokens": LengthSpec.parse("lognormal:60:1.0:1:300"),
        "num_system_prompts": 2,
        "system_prompt_tokens": 40,
        "turns": 2,
        "think_time_s": 0.5,
    }
    requests = generate(seed=seed, **usual | values)
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
    folder: Path,
    requests: list[Request],
    settings: Settings,
    *,
    step_by_step: bool,
    latency: LatencyModel = UNEVEN,
) -> RunRecord:
    params = SamplingParams(ignore_eos=True)
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


WAYS = [("mixed", 1, latency) for latency in LATENCIES]
WAYS += [(composition, depth, "columns of costs") for composition, depth in product(("mixed", "prefill-first"), (0, 1))]
"""Every latency, and every composition and depth; all of them together are drawn below."""


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("composition", "depth", "latency"), dict.fromkeys(WAYS))
def test_a_record_is_that_of_a_simulation_step_by_step(tmp_path, name, composition, depth, latency):
    values = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "max_model_len": 600} | SETTINGS[name]
    settings = Settings.load(values | {"composition": composition, "pipeline_depth": depth})
    single, leaping = both(tmp_path, requests_of(3), settings, LATENCIES[latency])
    events = leaping.run["summary"]["events"]
    assert events < len(single.steps) / (1.2 if name == "cache-aware" else 2), "most steps repeat the one before"
    assert replay(leaping).is_exact


def both(
    folder: Path, requests: list[Request], settings: Settings, latency: LatencyModel
) -> tuple[RunRecord, RunRecord]:
    """The records of a simulation step by step and of one at once, which are the same but for how rows are grouped."""
    single = run(folder / "single", requests, settings, step_by_step=True, latency=latency)
    leaping = run(folder / "leaping", requests, settings, step_by_step=False, latency=latency)
    assert (single.path / "requests.jsonl").read_bytes() == (leaping.path / "requests.jsonl").read_bytes()
    runs = [one.run | {"summary": one.run["summary"] | {"events": 0}} for one in (single, leaping)]
    assert runs[0] == runs[1]
    assert single.run["summary"]["events"] == len(single.steps) == len(leaping.steps)
    for one, other in zip(single.steps, leaping.steps, strict=True):
        assert other == {field: value for field, value in one.items() if field in other}
        assert one.keys() - other.keys() <= {"digest"}
    return single, leaping


TRACES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1 << 20),
        "num_requests": st.integers(5, 24),
        "rate": st.sampled_from([1, 8, 50]),
        "prompt_tokens": st.sampled_from(["lognormal:60:1.0:1:200", "lognormal:15:1.0:1:100"]).map(LengthSpec.parse),
        "output_tokens": st.sampled_from(["lognormal:60:1.0:1:300", "lognormal:150:0.5:1:350"]).map(LengthSpec.parse),
        "num_system_prompts": st.integers(1, 3),
        "system_prompt_tokens": st.sampled_from([8, 40, 90]),
        "turns": st.integers(1, 4),
        "think_time_s": st.sampled_from([0.05, 0.5, 3.0]),
    }
)
VALUES = st.fixed_dictionaries(
    {
        "max_num_seqs": st.sampled_from([2, 8, 16]),
        "max_num_batched_tokens": st.sampled_from([64, 128, 512]),
        "block_size": st.sampled_from([1, 2, 4, 8, 16]),
        "composition": st.sampled_from(["mixed", "prefill-first"]),
        "pipeline_depth": st.integers(0, 1),
        "enable_prefix_caching": st.booleans(),
    }
)


@given(TRACES, VALUES, st.sampled_from(list(SETTINGS)), st.sampled_from(list(LATENCIES)))
def test_any_record_is_that_of_a_simulation_step_by_step(trace, values, name, latency):
    """Pools are as tight as the longest request lets them be, or roomy."""
    own = SETTINGS[name]
    num_blocks = max(own["num_gpu_blocks"] * 16 // values["block_size"], 600 // values["block_size"] + 2)
    settings = Settings.load({"max_model_len": 600} | own | values | {"num_gpu_blocks": num_blocks})
    with tempfile.TemporaryDirectory() as folder:
        both(Path(folder), requests_of(**trace), settings, LATENCIES[latency])


def test_rows_of_several_steps_keep_to_the_schema(tmp_path):
    record = run(tmp_path / "run", requests_of(5), Settings.load({"num_gpu_blocks": 400}), step_by_step=False)
    schema = json.loads((Path(twinserve.traces.runs.__file__).parent / "record.schema.json").read_text())
    validator = Draft202012Validator({"$ref": "#/$defs/step", "$defs": schema["$defs"]})
    rows = [json.loads(line) for line in (record.path / "steps.jsonl").read_text().splitlines()]
    assert [error.message for row in rows for error in validator.iter_errors(row)] == []
    assert max(row["count"] for row in rows) > 10
    assert sum(row["count"] for row in rows) == len(record.steps) == record.run["summary"]["steps"]


def test_a_replay_finds_a_difference_inside_a_row_of_several_steps(tmp_path):
    record = run(tmp_path / "run", requests_of(5), Settings.load({"num_gpu_blocks": 400}), step_by_step=False)
    inner = next(step for step in record.steps if "digest" not in step and step["grown"])
    inner["grown"] = [[seq_id, [block_id + 1 for block_id in ids]] for seq_id, ids in inner["grown"]]
    difference = replay(record).difference
    assert difference is not None
    assert (difference.decision, difference.field) == (inner["decision"], "grown")
