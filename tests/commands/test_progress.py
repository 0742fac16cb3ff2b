"""The progress bar of a run, on a terminal that is none."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from twinserve.commands import progress
from twinserve.policies import Batch, Sequence


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def put_terminal(monkeypatch) -> Terminal:
    """Let stderr be a terminal; not in a fixture, as pytest puts its own stderr in place before each test."""
    for name, value in (("TERM", "xterm"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def step(running: int, waiting: int, used_blocks: int, sampled: int) -> Batch:
    batch = Batch(1)
    batch.num_running, batch.num_waiting, batch.num_used_blocks = running, waiting, used_blocks
    batch.seqs = [Sequence([1])] * sampled
    return batch


def states(bar, monkeypatch) -> list[str]:
    """What the bar is told to show from now on."""
    told: list[str] = []
    update = bar._bar.update
    monkeypatch.setattr(bar._bar, "update", lambda task, *, state: told.append(state) or update(task, state=state))
    return told


def test_a_terminal_shows_the_state_of_a_run(monkeypatch, clock):
    terminal = put_terminal(monkeypatch)
    with progress.Bar("run", 9, num_blocks=200) as bar:
        bar.advance()
        clock.now += 2.0
        bar.stepped(step(7, 1234, 50, 3000))
    text = terminal.getvalue()
    assert "1/9" in text and "7 running, 1234 waiting, KV 25%, 1,500 tokens/s" in text


def test_states_come_twice_a_second_and_count_the_tokens_between(monkeypatch, clock):
    put_terminal(monkeypatch)
    bar = progress.Bar("run", 9, num_blocks=200)
    told = states(bar, monkeypatch)
    for _ in range(256):
        clock.now += 1 / 128
        bar.stepped(step(2, 0, 20, 2))
    assert told == ["2 running, 0 waiting, KV 10%, 256 tokens/s"] * 4


def test_where_nobody_knows_how_much_there_is_what_is_done_is_counted(monkeypatch):
    terminal = put_terminal(monkeypatch)
    with progress.Bar("capacity", None) as bar:
        bar.advance(1234)
    assert "1,234 done" in terminal.getvalue() and "/?" not in terminal.getvalue()


def test_where_there_is_no_terminal_steps_say_nothing(monkeypatch, capsys, clock):
    with progress.Bar("run", 9, num_blocks=200) as bar:
        clock.now += 5
        bar.stepped(step(2, 0, 20, 2))
    assert capsys.readouterr().err == ""


def test_a_run_shows_its_steps(twinserve, trace, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen: list[Batch] = []
    monkeypatch.setattr(progress.Bar, "stepped", lambda self, batch: seen.append(batch))
    result = twinserve("run", trace, "--model", tmp_path, "--load-format", "dummy", "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert len(seen) == summary["steps"]
    assert sum(batch.num_sampled for batch in seen) == summary["output_tokens"]


def test_a_replay_and_a_report_show_how_far_they_are(monkeypatch, clock, twinserve, trace, tmp_path):
    run = tmp_path / "run"
    assert twinserve("sim", trace, "--latency", "llama-3-8b-h200", "--out", run).code == 0
    steps = json.loads((run / "run.json").read_text())["summary"]["steps"]
    monkeypatch.setattr(progress.Decisions, "_TOGETHER", 1)
    for words, what in ((("replay", run), "replay"), (("report", run, "--out", tmp_path / "page.html"), "report: ")):
        terminal = put_terminal(monkeypatch)
        assert twinserve(*words).code == 0
        assert what in terminal.getvalue() and f"{steps}/{steps}" in terminal.getvalue()
