"""What the command line says where a number of ranks cannot be, before anything is loaded or started."""

from __future__ import annotations

import json
import socket

import pytest

from twinserve.commands.app import parser

pytest.importorskip("torch")


@pytest.fixture
def shape(tmp_path):
    """A folder with a config and no weights: six query heads, three KV heads."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 48, "intermediate_size": 96,
        "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def refused(twinserve, shape, *words) -> str:
    """The one line that the command ends with, with exit status 2."""
    result = twinserve("run", shape / "trace.csv", "--model", shape, "--load-format", "dummy", *words)
    assert result.code == 2
    (line,) = result.err.splitlines()
    return line


@pytest.fixture
def with_trace(shape):
    (shape / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,20,9\n")
    return shape


@pytest.mark.parametrize("command", ["run", "profile", "generate", "serve"])
def test_a_command_takes_a_number_of_ranks(command):
    known = {option for parameter in parser().commands[command].params for option in parameter.opts}
    assert "--tensor-parallel-size" in known


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((0,), "tensor_parallel_size is 0, expected: Input should be greater than or equal to 1"),
        ((4,), "tensor_parallel_size is 4, expected a divisor of the model's 6 query heads"),
        ((2,), "tensor_parallel_size is 2, expected a divisor or a multiple of the model's 3 KV heads"),
        ((3, "--device", "cuda"), "device is 'cuda', but torch finds 0 CUDA devices"),
        (
            (3, "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'),
            "tensor_parallel_size is 3, expected 1 with speculative_config",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(twinserve, with_trace, words, problem, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert refused(twinserve, with_trace, "--tensor-parallel-size", *words) == f"twinserve: {problem}"


def test_ranks_that_torchrun_starts_are_refused_in_one_line(twinserve, with_trace, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    problem = "tensor_parallel_size is 3, expected 1 under torchrun: the ranks are started here"
    assert refused(twinserve, with_trace, "--tensor-parallel-size", 3) == f"twinserve: {problem}"


def test_fewer_devices_than_ranks_are_refused(with_trace, monkeypatch):
    from twinserve.engine.checks import RunnerConfig
    from twinserve.engine.models.source import ModelSource
    from twinserve.engine.options import EngineOptions
    from twinserve.settings.build_core import Settings
    from twinserve.settings.errors import InputError

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("twinserve.engine.capability.Capability.of", lambda device: _Any())
    values = {"model": str(with_trace), "load_format": "dummy", "dtype": "float32", "tensor_parallel_size": 3}
    for device, problem in (
        ("cuda", "tensor_parallel_size is 3, but torch finds 2 CUDA devices"),
        ("cuda:1", "device is 'cuda:1', expected cuda: the ranks take cuda:0 to cuda:2"),
    ):
        options = EngineOptions.load(values | {"device": device})
        with pytest.raises(InputError) as caught:
            RunnerConfig.checked(ModelSource.of(with_trace, options), options, Settings())
        assert str(caught.value) == problem


class _Any:
    """A device that can do whatever is asked."""

    def check_formats(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("port", "problem"),
    [("used", "cannot be listened at, expected a port that nobody uses"), ("no", "expected a port from 0 to 65535")],
)
def test_a_port_that_cannot_be_listened_at_is_refused_in_one_line(twinserve, with_trace, monkeypatch, port, problem):
    with socket.create_server(("127.0.0.1", 0)) as used:
        value = str(used.getsockname()[1]) if port == "used" else port
        monkeypatch.setenv("MASTER_PORT", value)
        line = refused(twinserve, with_trace, "--tensor-parallel-size", 3)
    assert line.startswith("twinserve: MASTER_PORT is ") and problem in line and value in line
