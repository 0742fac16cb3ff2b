"""The Scheduler decides what vLLM's own scheduler decided, step by step, on recorded scenarios."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import oracle_vllm
import pytest

ORACLES = os.environ.get("TWINSERVE_ORACLES")
PATHS = [path for folder in oracle_vllm.folders() for path in sorted(folder.glob("*.jsonl.gz"))]
UNCOMPUTED = "g_priority_uncomputed"
PARTING = [("vllm", UNCOMPUTED), ("vllm-0.33", "l_priority_uncomputed")]
NEWER = Path(f"{ORACLES}-0.33")

pytestmark = pytest.mark.skipif(not PATHS, reason="TWINSERVE_ORACLES does not name a folder of recorded scenarios")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.name[:-9]}")
def test_every_step_of_a_recorded_scenario_is_decided_as_vllm_decided_it(path):
    if (path.parent.name, path.name[:-9]) in PARTING:
        pytest.skip("has a test of its own")
    steps, difference, _ = oracle_vllm.decide_again(path)
    assert difference is None, f"{path.name}: {difference}"
    assert steps > 10


def test_blocks_that_no_step_computed_are_not_hit_though_vllm_hits_them():
    """Request 0 is preempted in step 2 by a request behind it, after 64 of its tokens were scheduled in that step."""
    steps, difference, _ = oracle_vllm.decide_again(Path(ORACLES or "") / f"{UNCOMPUTED}.jsonl.gz")
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


def test_the_newer_version_hits_blocks_that_no_step_computed_as_well():
    steps, difference, _ = oracle_vllm.decide_again(NEWER / "l_priority_uncomputed.jsonl.gz")
    assert steps == 21 and difference is not None and difference.is_right
    assert (difference.recorded, difference.ours) == ([[1, 29, 176]], [[1, 77, 128]]), "48 tokens more"


def test_aborts_between_decision_and_output_are_taken_there_and_the_line_counts_them():
    _, difference, late_aborts = oracle_vllm.decide_again(NEWER / "q_async_stop_abort.jsonl.gz")
    assert (difference, late_aborts) == (None, 21)


def test_the_script_says_how_many_steps_of_a_scenario_are_equal(tmp_path):
    for name in ("s_spec_budget", "p_async_index"):
        shutil.copy(NEWER / f"{name}.jsonl.gz", tmp_path)
    result = run_script(tmp_path)
    assert result.returncode == 0, result.stdout
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["p_async_index", "38", "steps", "equal"],
        ["s_spec_budget", "299", "steps", "equal"],
    ]


def test_a_scenario_with_other_drafts_or_runs_than_recorded_parts_there(tmp_path):
    source = NEWER / "s_spec_budget.jsonl.gz"
    _, _, steps = oracle_vllm.load(source)
    place = next(number for number, step in enumerate(steps) if step["spec"])
    request, drafts = steps[place]["spec"][0]
    changed(source, tmp_path, place, spec=[[request, drafts + 1], *steps[place]["spec"][1:]])
    _, difference, _ = oracle_vllm.decide_again(tmp_path / source.name)
    assert difference is not None and (difference.step, difference.field) == (steps[place]["step"], "spec")
    place = next(number for number, step in enumerate(steps) if any(made > 1 for _, made, _ in step["got"]))
    shorter = [[request, 1, 1] for request, _, _ in steps[place]["got"]]
    changed(source, tmp_path, place, got=shorter)
    number, difference, _ = oracle_vllm.decide_again(tmp_path / source.name)
    assert difference is not None and number == place + 1, difference


PARTING_BY_OLD_RULES = {
    "g_priority", "g_priority_noapc", "g_priority_thrash", "g_priority_budget", "g_priority_uncomputed",
    "g_priority_zero",
    "i_long_threshold", "i_long_threshold_tight", "i_partial_prefills", "l_priority_index", "l_priority_interval",
    "l_priority_uncomputed", "m_threshold_alone", "p_async_index", "p_async_priority",
    "s_spec_async_priority", "s_spec_budget_ngram", "s_spec_priority",
}  # fmt: skip


@pytest.mark.parametrize("path", [path for path in PATHS if path.parent == NEWER], ids=lambda path: path.name[:-9])
def test_by_the_older_rules_the_newer_scenarios_part_where_the_versions_do(path, monkeypatch):
    """So each rule that changed is seen in some scenario; `l_priority_uncomputed` parts before it would by right."""
    monkeypatch.setattr(oracle_vllm, "nearest_version", lambda version: "0.24")
    _, difference, _ = oracle_vllm.decide_again(path)
    assert (difference is not None) == (path.name[:-9] in PARTING_BY_OLD_RULES), difference


@pytest.mark.parametrize("path", [path for path in PATHS if path.parent != NEWER], ids=lambda path: path.name[:-9])
def test_by_the_newer_rules_the_older_scenarios_part_where_the_versions_do(path, monkeypatch):
    monkeypatch.setattr(oracle_vllm, "nearest_version", lambda version: "0.33")
    _, difference, _ = oracle_vllm.decide_again(path)
    parting = {name for name in PARTING_BY_OLD_RULES if name[0] in "gi"}
    assert (difference is not None) == (path.name[:-9] in parting), difference
