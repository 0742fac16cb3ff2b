"""The script of a GPU session: whatever a step does, the others run and all that there is comes back."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_session.py"


@pytest.fixture(scope="module")
def session():
    spec = importlib.util.spec_from_file_location("gpu_session", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_steps_that_fail_or_hang_take_none_with_them(session, tmp_path, capsys):
    def step(name: str, code: str, limit_s: float = 60.0):
        return session.Step(name, [sys.executable, "-c", code], limit_s)

    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    steps = [
        step("bad", "raise SystemExit('no such thing')"),
        step("hanging", hanging, 1.0),
        step("good", f"import twinserve; print('fine'); open({str(work / 'made.json')!r}, 'w').write('{{}}')"),
    ]
    outcomes = session.run_steps(steps, out, work, {"card": "none"}, 300.0)
    assert [outcome.status for outcome in outcomes] == [
        "failed with exit status 1",
        "stopped at the limit of 1 s",
        "done",
    ]
    assert sorted(path.name for path in out.iterdir()) == ["results.tar.gz", "session.json", "session.log"]
    said = (out / "session.log").read_text()
    assert "no such thing" in said and said.index("=== hanging") < said.index("=== good") < said.index("fine")
    assert [row["status"] for row in json.loads((out / "session.json").read_text())["steps"]][2] == "done"
    with tarfile.open(out / "results.tar.gz") as archive:
        assert "results/made.json" in archive.getnames()
    shown = capsys.readouterr().out
    assert "--- bad: failed" in shown and "no such thing" in shown


def test_no_step_begins_once_the_time_is_spent(session, tmp_path):
    outcomes = session.run_steps([session.Step("late", ["false"], 9.0)], tmp_path, tmp_path, {}, 0.0)
    assert outcomes[0].status == "not begun: no time was left"


def test_its_steps(session, tmp_path, monkeypatch):
    trace = "azure.csv --window-s 0:60 --max-output-tokens 256"
    arguments = ["gpu_session.py", "--out", str(tmp_path), "--run", trace, "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", arguments)
    steps = {step.name: step.command for step in session.steps_of(session.parse(), tmp_path)}
    assert list(steps) == ["tests", "cycles", "profile", "run1"]
    assert f"--junitxml={tmp_path / 'junit.xml'}" in steps["tests"]
    assert steps["run1"][3:9] == ["run", *trace.split()]
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "run1,profile"])
    assert [step.name for step in session.steps_of(session.parse(), tmp_path)] == ["profile", "run1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "run2"])
    with pytest.raises(SystemExit, match="no step is called run2"):
        session.steps_of(session.parse(), tmp_path)


def test_what_is_missing_is_named(session, monkeypatch):
    monkeypatch.setattr(session, "NEEDED", ("torch", "no-such-distribution"))
    facts = session.environment("abc")
    assert facts["versions"]["no-such-distribution"] == "missing" and facts["versions"]["torch"] != "missing"
    assert facts["commit"] == "abc"
