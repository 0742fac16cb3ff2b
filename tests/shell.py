"""Runs commands as a shell would, in this process."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from twinserve.cli import main
from twinserve.sim.fit import FittedLatency, StepSample, fit
from twinserve.sim.latency import StepFeatures
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.readers import write_trace


@dataclass(frozen=True)
class Result:
    """What a command left: exit status, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def twinserve(monkeypatch, capsys) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["twinserve", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def trace(tmp_path) -> Path:
    """Twelve requests in bursts, with a shared system prompt."""
    requests = generate(
        seed=3,
        num_requests=12,
        rate=20.0,
        prompt_tokens=LengthSpec.parse("fixed:24"),
        output_tokens=LengthSpec.parse("lognormal:6:0.5"),
        arrivals="burst",
        burst_size=3,
        num_system_prompts=1,
        system_prompt_tokens=32,
    )
    path = tmp_path / "trace.jsonl"
    write_trace(path, requests, {})
    return path


def fitted() -> FittedLatency:
    """A latency model of round numbers; one of one's own, as it counts what it was asked."""
    return copy.deepcopy(_fitted())


@functools.cache
def _fitted() -> FittedLatency:
    samples = []
    for rows in (1, 2, 4, 8):
        for context in (64, 512):
            decode = StepFeatures(0, rows, 0, rows, rows * context, rows * context, rows)
            prompt = StepFeatures(0, 1, rows * 16, 0, rows * 16, rows * 8 * (rows * 16 + 1), 1)
            samples.append(StepSample(decode, 100_000, 2_000_000 + 100_000 * rows))
            samples.append(StepSample(prompt, 100_000, 2_000_000 + 10_000 * rows * 16))
    return fit(samples, {"model": "round numbers", "device": "no device"})


@pytest.fixture
def latency(tmp_path) -> Path:
    path = tmp_path / "latency.json"
    fitted().save(path)
    return path
