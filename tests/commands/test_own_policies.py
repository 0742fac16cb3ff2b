"""Policies of one's own on the command line: in both worlds, in files of settings, in sweeps, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import own_rules
import pytest

from twinserve.commands.progress import Bar
from twinserve.engine.options import EngineOptions
from twinserve.planning.point import Job, Point, compute
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.runs.record import load_record
from twinserve.worlds.run import load_llm, measure_steps


@pytest.fixture
def mine(tmp_path) -> Path:
    """A file of rules of one's own."""
    return Path(shutil.copy(own_rules.__file__, tmp_path / "mine.py"))


def run_json(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def assert_refused(result, *words: str) -> None:
    """One line on stderr that has these words, and nothing else."""
    assert (result.code, result.out) == (2, ""), (result.out, result.err)
    line = result.err.splitlines()[-1]
    assert line.startswith("twinserve: ") and "Traceback" not in result.err
    for word in words:
        assert word in line, line


def test_a_simulation_by_rules_of_ones_own_is_recorded_and_replayed(twinserve, trace, latency, mine, tmp_path):
    small = ("--latency", latency, "--max-num-seqs", 2, "--num-gpu-blocks", 12)
    usual, own = tmp_path / "usual", tmp_path / "own"
    assert twinserve("sim", trace, *small, "--out", usual).code == 0
    options = ("--scheduling-policy", f"{mine}:LastCome(window=9)", "--admission", f"{mine}:Roomy(spare=2)")
    result = twinserve("sim", trace, *small, *options, "--victim", f"{mine}:FirstAdmitted", "--out", own)
    assert result.code == 0, result.err
    settings = run_json(own)["settings"]
    calls = {"scheduling_policy": "LastCome(window=9)", "admission": "Roomy(spare=2)", "victim": "FirstAdmitted"}
    for name, call in calls.items():
        assert re.fullmatch(re.escape(f"{mine}:{call}@") + "[0-9a-f]{64}", settings[name])
    assert (own / "steps.jsonl").read_bytes() != (usual / "steps.jsonl").read_bytes()
    assert twinserve("replay", own).out.startswith("exact: ")
    mine.write_text(mine.read_text().replace("[-1]", "[0]"))
    assert_refused(twinserve("replay", own), f"{own}/run.json: settings.scheduling_policy is ", "with sha256 ")
    mine.unlink()
    assert_refused(twinserve("replay", own), f"{own}/run.json: settings.scheduling_policy is ", "can be read")


def test_a_relative_file_is_looked_for_beside_the_settings_or_from_the_working_directory(
    twinserve, trace, latency, mine, tmp_path, monkeypatch
):
    (tmp_path / "conf").mkdir()
    shutil.copy(mine, tmp_path / "conf" / "theirs.py")
    config = tmp_path / "conf" / "settings.toml"
    config.write_text('scheduling_policy = "theirs.py:LastCome"\nvictim = "../mine.py:FirstAdmitted"\n')
    monkeypatch.chdir(tmp_path)
    result = twinserve("sim", trace, "--latency", latency, "--config", "conf/settings.toml", "--out", "run")
    assert result.code == 0, result.err
    settings = run_json(tmp_path / "run")["settings"]
    assert settings["scheduling_policy"].startswith("conf/theirs.py:LastCome@")
    assert settings["victim"].startswith("conf/../mine.py:FirstAdmitted@")
    assert twinserve("replay", "run").code == 0
    given = ("--config", config, "--scheduling-policy", "mine.py:LastCome(window=2)", "--out", "other")
    assert twinserve("sim", trace, "--latency", latency, *given).code == 0
    assert run_json(tmp_path / "other")["settings"]["scheduling_policy"].startswith("mine.py:LastCome(window=2)@")


BAD = {
    "no file": ("none.py:LastCome", "", "scheduling_policy is 'none.py:LastCome', expected: a file that can be read ("),
    "no class": ("mine.py:Mine", "", "mine.py: scheduling_policy is 'Mine', expected a class of this file: LastCome"),
    "no method": ("mine.py:FirstAdmitted", "", "scheduling_policy is 'FirstAdmitted', expected a class with __iter__"),
    "no Python": ("mine.py:LastCome", "def choose(:\n", "mine.py:1: scheduling_policy is 'LastCome', expected Python"),
    "no keyword": ("mine.py:LastCome(size=1)", "", "mine.py: scheduling_policy is 'LastCome(size=1)', expected a clas"),
    "no constant": ("mine.py:LastCome(window=x)", "", "is 'mine.py:LastCome(window=x)', expected: fcfs, priority, sho"),
    "another name": ("first-come", "", "scheduling_policy is 'first-come', expected: fcfs, priority, shortest, cache"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_used_is_refused_in_a_line_and_nothing_is_left(
    twinserve, trace, latency, mine, tmp_path, monkeypatch, what
):
    policy, content, words = BAD[what]
    if content:
        mine.write_text(content)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    options = ("--scheduling-policy", policy)
    assert_refused(twinserve("sim", trace, "--latency", latency, *options, "--out", "run"), words)
    assert_refused(twinserve("run", trace, "--model", "no-such-model", *options), words)
    objective = ("--objective", "p99 TTFT <= 1 s")
    assert_refused(twinserve("capacity", trace, "--latency", latency, *objective, *options), words)
    config = tmp_path / "settings.toml"
    config.write_text(f"scheduling_policy = {json.dumps(policy)}\n")
    assert_refused(twinserve("sim", trace, "--latency", latency, "--config", config.name), words)
    config.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_steps_are_measured_with_an_order_of_ones_own_and_every_shape_is_admitted(mine, tmp_path):
    pytest.importorskip("torch")
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    rules = {"scheduling_policy": f"{mine}:LastCome", "admission": f"{mine}:Roomy(spare=9)"}
    options = EngineOptions(model=str(tmp_path), load_format="dummy")
    llm = load_llm(options, Settings.load(rules | {"num_gpu_blocks": 64}), progress=print)
    try:
        sizes = {"shapes": 16, "max_seqs": 2, "max_context": 64, "max_prompt": 32, "repeats": 1}
        samples = measure_steps(llm, **sizes, progress=lambda total: Bar("profile", total))
    finally:
        llm.close()
    assert {sample.features.decode_tokens for sample in samples} >= {0, 1, 2}


# --- sweeps and capacities ---

PLAN = """
trace = "{trace}"
latency = "{latency}"
max_num_seqs = 2
num_gpu_blocks = 12
all_at_zero = true

[grid]
scheduling_policy = ["fcfs", "mine.py:LastCome", "mine.py:LastCome(window=2)"]
victim = ["{folder}/mine.py:FirstAdmitted"]
"""


@pytest.fixture
def plan(trace, latency, mine, tmp_path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.format(trace=trace, latency=latency, folder=tmp_path))
    return path


def test_a_sweep_knows_the_content_of_a_file_and_workers_find_it(twinserve, plan, mine, tmp_path):
    first = twinserve("sweep", plan, "--out", tmp_path / "sweep", "--jobs", 2, "--json")
    assert first.code == 0, first.err
    assert "3 points, 3 to compute" in first.err
    rows = [json.loads(line) for line in first.out.splitlines()]
    policies = [row["point"]["scheduling_policy"] for row in rows]
    assert policies[0] == "fcfs" and len({policy[-64:] for policy in policies[1:]}) == 1
    assert policies[2].startswith(f"{mine}:LastCome(window=2)@")
    assert len({json.dumps(row["summary"]["ttft_s"]) for row in rows}) == 3, "they differ in what they do"
    alone = twinserve("sweep", plan, "--out", tmp_path / "alone", "--jobs", 1, "--json")
    assert alone.out == first.out
    again = twinserve("sweep", plan, "--out", tmp_path / "sweep", "--json")
    assert "3 points, 0 to compute" in again.err and again.out == first.out
    mine.write_text(mine.read_text().replace("[-1]", "[0]"))
    changed = twinserve("sweep", plan, "--out", tmp_path / "sweep", "--jobs", 2, "--json")
    assert "3 points, 3 to compute" in changed.err, "the victim's file is the same"
    changed_rows = [json.loads(line) for line in changed.out.splitlines()]
    assert changed_rows[1]["summary"]["ttft_s"] != rows[1]["summary"]["ttft_s"]
    assert changed_rows[1]["summary"]["ttft_s"] == changed_rows[0]["summary"]["ttft_s"], "first come is fcfs"


def test_a_capacity_is_found_with_a_policy_of_ones_own(twinserve, trace, latency, mine):
    options = ("--latency", latency, "--max-num-seqs", 2, "--objective", "p90 TTFT <= 30 ms", "--json", "--jobs", 1)
    usual, own = (
        twinserve("capacity", trace, *options, *policy) for policy in ((), ("--scheduling-policy", f"{mine}:LastCome"))
    )
    assert usual.code == own.code == 0, own.err
    assert json.loads(own.out)["point"]["scheduling_policy"].startswith(f"{mine}:LastCome@")
    assert json.loads(own.out)["value"] != json.loads(usual.out)["value"]


def test_a_file_that_changes_after_it_was_planned_is_refused(trace, latency, mine):
    fields = {"trace": str(trace), "latency": str(latency)}
    points = [
        Point.of(fields | {"scheduling_policy": f"{mine}:LastCome"}),
        Point.of(fields | {"replicas": 2, "router": f"{mine}:Modulo"}),
        Point.of(fields | {"group": [{"victim": f"{mine}:FirstAdmitted"}]}),
    ]
    jobs = [Job.of(point) for point in points]
    mine.write_text(mine.read_text() + "\n")
    for job in jobs:
        with pytest.raises(InputError, match="with sha256 .*, it has"):
            compute(job)
    assert {job.key for job in map(Job.of, map(reread, points))}.isdisjoint(job.key for job in jobs)


def reread(point: Point) -> Point:
    """The point with the files as they are now."""
    fields = {name: re.sub("@[0-9a-f]{64}", "", json.dumps(value)) for name, value in point.flat().items()}
    return Point.of({name: json.loads(text) for name, text in fields.items()})


# --- fleets ---


def test_a_router_of_ones_own_sends_requests_and_the_record_says_which(twinserve, trace, latency, mine, tmp_path):
    out = tmp_path / "fleet"
    router = ("--replicas", 3, "--router", f"{mine}:Modulo(count=2)")
    policy = ("--scheduling-policy", f"{mine}:LastCome", "--max-num-seqs", 2)
    result = twinserve("sim", trace, "--latency", latency, *router, *policy, "--out", out)
    assert result.code == 0, result.err
    sent = [[row["id"] for row in load_record(out / "replicas" / name).requests] for name in "012"]
    assert sent == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11], []]
    run = run_json(out)
    assert re.fullmatch(re.escape(f"{mine}:Modulo(count=2)@") + "[0-9a-f]{64}", run["facts"]["fleet"]["router"]["name"])
    assert run["settings"]["scheduling_policy"].startswith(f"{mine}:LastCome@")
    assert twinserve("replay", out).out.startswith("exact: ")


def test_a_router_and_the_rules_of_a_group_are_looked_for_beside_the_settings(
    twinserve, trace, latency, mine, tmp_path, monkeypatch
):
    groups = (
        '[[fleet.group]]\n[[fleet.group]]\nscheduling_policy = "mine.py:LastCome"\nvictim = "mine.py:FirstAdmitted"\n'
    )
    config = tmp_path / "fleet.toml"
    config.write_text(f'[fleet]\nrouter = "mine.py:Modulo"\n{groups}')
    monkeypatch.chdir("/")
    result = twinserve("sim", trace, "--latency", latency, "--config", config, "--out", tmp_path / "fleet")
    assert result.code == 0, result.err
    alike, own = (run_json(tmp_path / "fleet" / "replicas" / name)["settings"] for name in "01")
    assert (alike["scheduling_policy"], alike["victim"]) == ("fcfs", None)
    assert own["scheduling_policy"].startswith(f"{mine}:LastCome@") and own["victim"].startswith(f"{mine}:First")
    assert "scheduling_policy" not in run_json(tmp_path / "fleet")["settings"], "not all have the same"
    config.write_text('[[fleet.group]]\nvictim = "mine.py"\n')
    refused = twinserve("sim", trace, "--latency", latency, "--config", config)
    assert_refused(refused, "fleet.toml: fleet.group.0.victim is '", "', expected: FILE.py:CLASS or")


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ("{mine}:LastCome", "mine.py: router is 'LastCome', expected a class with choose"),
        (
            "{mine}:Modulo(size=3)",
            "mine.py: router is 'Modulo(size=3)', expected a class that can be built (TypeError: ",
        ),
        (
            "{mine}",
            "expected: round-robin, random, least-outstanding, power-of-two, least-kv-use, session-sticky, "
            "oracle-least-remaining, prefix-affine, kv-events, FILE.py:CLASS or FILE.py:CLASS(",
        ),
        ("{mine}:Modulo(count=-3)", "the router chose "),
    ],
)
def test_a_router_that_cannot_be_used_is_refused_in_a_line(twinserve, trace, latency, mine, tmp_path, router, words):
    options = ("--latency", latency, "--replicas", 2, "--router", router.format(mine=mine))
    assert_refused(twinserve("sim", trace, *options, "--out", tmp_path / "fleet"), words)
    assert not (tmp_path / "fleet").exists()
