"""The Scheduler decides what vLLM's own scheduler decided, step by step, on recorded scenarios."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import oracle_vllm
import pytest

ORACLES = os.environ.get("TWINSERVE_ORACLES")
PATHS = sorted(Path(ORACLES).glob("*.jsonl.gz")) if ORACLES else []
UNCOMPUTED = "g_priority_uncomputed"

pytestmark = pytest.mark.skipif(not PATHS, reason="TWINSERVE_ORACLES does not name a folder of recorded scenarios")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name.removesuffix(".jsonl.gz"))
def test_every_step_of_a_recorded_scenario_is_decided_as_vllm_decided_it(path):
    steps, difference = oracle_vllm.decide_again(path)
    if path.name.startswith(UNCOMPUTED):
        pytest.skip("has a test of its own")
    assert difference is None, f"{path.name}: {difference}"
    assert steps > 10


def test_blocks_that_no_step_computed_are_not_hit_though_vllm_hits_them():
    """Request 0 is preempted in step 2 by a request behind it, after 64 of its tokens were scheduled in that step."""
    steps, difference = oracle_vllm.decide_again(Path(ORACLES or "") / f"{UNCOMPUTED}.jsonl.gz")
    assert steps == 21 and difference is not None
    assert (difference.step, difference.field) == (21, "sched")
    assert difference.recorded == [[0, 45, 160]], "of these 160 tokens, 128 ... 159 were never computed"
    assert difference.ours == [[0, 64, 128]]
    assert difference.is_right


def changed(source: Path, folder: Path, step: int, **fields) -> None:
    """A copy of a scenario in which a step is recorded otherwise."""
    with gzip.open(source, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    rows[1 + rows[0]["requests"] + step] |= fields
    with gzip.open(folder / source.name, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def run_script(folder: Path) -> subprocess.CompletedProcess:
    script = Path(oracle_vllm.__file__)
    return subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)


def test_the_script_names_step_field_and_both_values_where_a_scenario_parts(tmp_path):
    changed(Path(ORACLES or "") / "h_model_len.jsonl.gz", tmp_path, 3, wait=17)
    result = run_script(tmp_path)
    assert result.returncode == 1
    assert "step 3: wait is " in result.stdout and "vLLM's is 17" in result.stdout


def test_a_scenario_that_parts_rightly_is_no_failure_of_the_script_and_parting_elsewhere_is(tmp_path):
    source = Path(ORACLES or "") / f"{UNCOMPUTED}.jsonl.gz"
    changed(source, tmp_path, 0)
    result = run_script(tmp_path)
    assert (result.returncode, result.stdout.count("parts rightly at step 21")) == (0, 1), result.stdout
    changed(source, tmp_path, 5, free=3)
    assert run_script(tmp_path).returncode == 1
