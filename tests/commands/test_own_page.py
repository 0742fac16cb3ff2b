"""What docs/policies.md says of a policy of one's own, word for word: its file and its commands, in both worlds."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from twinserve.traces.readers import write_trace
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.record import load_record

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the page's file, a tiny model, and a trace in which tenant "a" floods the queue."""
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "fair_share.py").write_text(code)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    tenants = [("a", 10)] * 6 + [("b", 20)] * 3
    requests = [
        Request(number, 0, (Part(number, 0, length),), 4, tenant=tenant)
        for number, (tenant, length) in enumerate(tenants)
    ]
    write_trace(tmp_path / "TRACE", requests, {})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def admitted(run: str) -> list[int]:
    """Who was admitted, in order."""
    return [seq_id for step in load_record(Path(run)).steps for seq_id, *_ in step["admitted"]]


def test_the_pages_policy_runs_by_the_pages_commands_in_both_worlds_and_is_replayed(twinserve, folder, latency):
    pytest.importorskip("torch")
    section = PAGE[PAGE.index("The same file decides in a simulation and in the engine") :]
    commands = re.findall(r"^    twinserve (.*)$", section, re.MULTILINE)[:3]
    of_this_machine = {
        "sim": ("--latency", latency, "--max-num-seqs", 1),
        "run": ("--model", "model", "--load-format", "dummy", "--max-num-seqs", 1),
        "replay": (),
    }
    for command in commands:
        name, *words = shlex.split(command)
        result = twinserve(name, *words, *of_this_machine.pop(name))
        assert result.code == 0, result.err
    assert not of_this_machine and result.out.startswith("exact: ")
    assert twinserve("replay", "runs/sim").code == 0
    assert admitted("runs/sim") == [0, 6, 1, 2, 7, 3, 4, 8, 5]
    assert admitted("runs/real").index(6) < 4, "first come would admit it after all of tenant a's"
    of_both = [load_record(Path("runs") / world).run["settings"]["scheduling_policy"] for world in ("sim", "real")]
    assert of_both[0] == of_both[1] and re.fullmatch("fair_share.py:FairShare@[0-9a-f]{64}", of_both[0])


def test_the_pages_router_runs_by_the_pages_command(twinserve, folder, latency):
    page = (Path(__file__).resolve().parents[2] / "docs" / "fleets.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (folder / "power.py").write_text(code)
    [command] = re.findall(r"^    twinserve (.*power\.py.*)$", page, re.MULTILINE)
    result = twinserve(*shlex.split(command), "--latency", latency, "--out", "fleet")
    assert result.code == 0, result.err
    router = json.loads((folder / "fleet" / "run.json").read_text())["facts"]["fleet"]["router"]["name"]
    assert re.fullmatch(r"power\.py:PowerOfTwo\(seed=3\)@[0-9a-f]{64}", router)
    assert twinserve("replay", "fleet").code == 0


def test_a_parameter_as_the_page_writes_it_is_understood(twinserve, folder, latency):
    [text] = re.findall(r'`"lanes\.py:(.*?)"`', PAGE)
    derived = "\n\nclass Lanes(FairShare):\n    def __init__(self, weights, window):\n        super().__init__()\n"
    (folder / "lanes.py").write_text((folder / "fair_share.py").read_text() + derived)
    result = twinserve("sim", "TRACE", "--latency", latency, "--scheduling-policy", f"lanes.py:{text}", "--out", "run")
    assert result.code == 0, result.err
    [said] = re.findall(r"lanes\.py:(.*)@", load_record(Path("run")).run["settings"]["scheduling_policy"])
    assert said == text
