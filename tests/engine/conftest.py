"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from engine_judge import Judge, Watcher, judge_of

from twinserve.engine.llm import LLM
from twinserve.settings.build_core import Settings


@pytest.fixture(params=["llama", "qwen3"])
def judge(request: pytest.FixtureRequest) -> Judge:
    """A judge of each of the two families."""
    return judge_of(request.param)


@pytest.fixture
def llama() -> Judge:
    return judge_of("llama")


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def serving() -> Iterator[Callable[..., LLM]]:
    """Makes LLMs of a judge's model with some settings, and closes them."""
    made: list[LLM] = []

    def make(judge: Judge, *, device: str = "cpu", seed: int = 0, **settings) -> LLM:
        # Many blocks of one token, or few of many: the same number of tokens.
        defaults = {"block_size": 16, "num_gpu_blocks": max(1, 4096 // settings.get("block_size", 16))}
        made.append(LLM(judge.model, device=device, seed=seed, settings=Settings.load(defaults | settings)))
        return made[-1]

    yield make
    for llm in made:
        llm.close()
