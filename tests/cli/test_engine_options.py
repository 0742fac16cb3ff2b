"""Options of the commands that run the engine: attention, and random weights."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")


@pytest.fixture
def shape(tmp_path):
    """A folder with a config and no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_run_says_which_attention_serves_and_notes_it(twinserve, trace, shape, tmp_path):
    out = tmp_path / "run"
    result = twinserve("run", trace, "--model", shape, "--load-format", "dummy", "--json", "--out", out)
    assert result.code == 0, result.err
    assert result.err.count("attention: sdpa (device is 'cpu', expected cuda") == 1
    run = json.loads((out / "run.json").read_text())
    assert (run["facts"]["attention"], run["facts"]["load_format"]) == ("sdpa", "dummy")
    assert run["facts"]["attention_reason"].startswith("device is 'cpu'")
    assert run["settings"]["block_size"] == 16
    assert twinserve("replay", out).code == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--attention", "flash", "device is 'cpu', expected cuda: flash-attn runs on NVIDIA GPUs"),
        ("--attention", "fast", "attention is 'fast', expected one of auto, triton, flash, sdpa"),
        ("--load-format", "empty", "load_format is 'empty', expected auto or dummy"),
        ("--gpu-memory-utilization", "1.5", "gpu_memory_utilization is 1.5, expected a number between 0 and 1"),
        ("--device", "gpu", "device is 'gpu', expected cpu or cuda"),
    ],
)
def test_what_cannot_be_used_is_refused(twinserve, trace, shape, option, value, message):
    options = {"--model": shape, "--load-format": "dummy"} | {option: value}
    result = twinserve("run", trace, *(word for pair in options.items() for word in pair))
    assert (result.code, result.err) == (2, f"twinserve: {message}\n")


def test_a_shape_is_profiled(twinserve, shape, tmp_path):
    out = tmp_path / "latency.json"
    sizes = ("--max-seqs", 2, "--max-context", 64, "--max-prompt", 32, "--repeats", 1)
    result = twinserve("profile", "--model", shape, "--load-format", "dummy", *sizes, "--out", out)
    assert result.code == 0, result.err
    about = json.loads(out.read_text())["about"]
    assert (about["attention"], about["load_format"], about["block_size"]) == ("sdpa", "dummy", 16)


def test_a_step_that_fails_is_one_line_and_leaves_no_record(twinserve, trace, shape, tmp_path, monkeypatch):
    import torch

    from twinserve.engine.model_runner import ModelRunner

    def launch(self, batch):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB.\nSee the manual")

    monkeypatch.setattr(ModelRunner, "launch", launch)
    result = twinserve("run", trace, "--model", shape, "--load-format", "dummy", "--out", tmp_path / "run")
    assert (result.code, result.out) == (1, "")
    (line,) = [line for line in result.err.splitlines() if line.startswith("twinserve: ")]
    assert line.startswith("twinserve: step 0 failed (")
    assert line.endswith("): OutOfMemoryError: tried to allocate 2 GiB. See the manual")
    assert result.err.splitlines()[-1] == line and "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


def test_what_is_no_step_failure_is_not_hidden(twinserve, trace, shape, monkeypatch):
    monkeypatch.setattr("twinserve.worlds.run_real", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        twinserve("run", trace, "--model", shape, "--load-format", "dummy")
