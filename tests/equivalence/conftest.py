"""A tiny real model, runs of it by every composition and pipeline depth, and a table of what they were made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from equivalence.real_run import RealRun, run_engine
from transformers import LlamaConfig, LlamaForCausalLM

from twinserve.traces.request import Request
from twinserve.traces.runs.replay import replay

LINES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    """Random weights, small enough that every token, end-of-sequence among them, is about equally probable."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=["mixed", "prefill-first"])
def composition(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[0, 1], ids=["depth0", "depth1"])
def depth(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def serve(tiny_model: LlamaForCausalLM, tmp_path: Path, composition: str, depth: int) -> Callable[..., RealRun]:
    """Makes a recorded run by each composition and pipeline depth: `serve(requests, **settings)`."""

    def make(requests: list[Request], **values: Any) -> RealRun:
        values |= {"composition": composition, "pipeline_depth": depth}
        return run_engine(tiny_model, tmp_path / "run", requests, **values)

    return make


@pytest.fixture
def assert_replayed(pytestconfig: pytest.Config, composition: str, depth: int) -> Callable[[RealRun, str, str], None]:
    """Asserts that a record makes every decision again: `assert_replayed(run, scenario, what_happened)`."""
    lines = pytestconfig.stash.setdefault(LINES, [])

    def check(run: RealRun, scenario: str, happened: str) -> None:
        result = replay(run.record)
        assert result.difference is None, str(result.difference)
        assert result.equal == result.recorded == run.counts["decisions"]
        lines.append(f"{scenario} depth={depth} {composition}: {result.equal} decisions, {happened}, replay exact")
        print(lines[-1])

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what the runs were made of."""
    lines = config.stash.get(LINES, [])
    if lines:
        terminalreporter.section("real runs decided again")
        terminalreporter.write("".join(f"{line}\n" for line in lines))
