"""README as a stranger walks it: its commands in the order in which they stand, on a small trace, and its snippet.

The engine serves a tiny model of random weights in place of SmolLM2; commands that want a GPU, a network or a person
are left out by name. Where there is no torch, commands of the engine say what is missing, and all others run.
"""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

from shell import twinserve
from walked import ONE_PROCESS, as_walked, commands, make_tiny

__all__ = ["twinserve"]

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
POLICIES = (Path(__file__).resolve().parents[1] / "docs" / "policies.md").read_text(encoding="utf-8")
LINES = commands(README)
(ANSWER,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
LEFT_OUT = {
    "run TRACE --device cuda": "wants a GPU",
    "serve --record": "runs until it is told to end: tests/commands/test_serve_command.py",
    "top ": "watches a server: tests/serving/test_top.py",
    "generate ": "wants the weights of SmolLM2: tests/engine/test_smollm2.py",
    "model verify": "wants a folder with weights: tests/engine/test_verify.py",
}
ENGINE = ("run", "profile")
PLAN = 'trace = "TRACE"\nlatency = "roofline:llama-3-8b@h100"\nlimit = 20\n[grid]\nmax_num_seqs = [4, 8]\n'


def prepared(folder: Path, twinserve) -> None:
    """What README's commands take to be there: a policy of one's own, runs of two policies, a plan."""
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", POLICIES, re.DOTALL) if "class FairShare" in block
    )
    (folder / "fair_share.py").write_text(code, encoding="utf-8")
    made = ("trace", "make", "--out", "TRACE", "--requests", 60, "--rate", 20, "--output-tokens", "fixed:8")
    assert twinserve(*made).code == 0
    for seed in range(2):
        for policy, name in (("fcfs", "fcfs"), ("shortest", "fair")):
            how = ("--latency", "llama-3-8b-h200", "--scheduling-policy", policy, "--shuffle-seed", seed)
            assert twinserve("sim", "TRACE", *how, "--out", f"runs/{name}-{seed}").code == 0
    (folder / "plan.toml").write_text(PLAN)


def test_every_command_of_the_readme_runs_in_the_order_in_which_it_stands(tmp_path, monkeypatch, twinserve):
    has_torch = find_spec("torch") is not None
    monkeypatch.chdir(tmp_path)
    prepared(tmp_path, twinserve)
    make_tiny(tmp_path)
    assert len(LINES) > 20 and all(any(line.startswith(f"twinserve {name}") for line in LINES) for name in LEFT_OUT)
    for line in LINES:
        words = as_walked(line)
        if any(" ".join(words).startswith(name) for name in LEFT_OUT):
            continue
        if words[0] in ENGINE and not has_torch:
            result = twinserve(*words)
            assert result.code == 2 and "pip install 'twinserve[engine]'" in result.err, line
            if words[0] == "run":  # a record of somebody else's
                own = shlex.split(line)[2:]
                assert twinserve("sim", *own, "--latency", "smollm2-135m-cpu-2-threads").code == 0
            continue
        result = twinserve(*([*shlex.split(line)[1:], *ONE_PROCESS] if words[0] == "capacity" else words))
        assert result.code == 0, f"{line}: {result.err}"
        if words[0] == "capacity":
            assert ANSWER in result.err, "what README shows is what it answers"
    assert "exact" in twinserve("replay", "runs/real").out


def test_the_snippet_prints_what_it_promises(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.match(r"100 finished, TTFT \{'mean': 0\.\d+", capsys.readouterr().out)
