"""Fixtures of the tests that need a CUDA device; every module here is marked gpu."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_judge import Judge, Watcher, judge_of

from twinserve.engine.llm import LLM
from twinserve.settings.build_core import Settings


@pytest.fixture(autouse=True)
def _exact_float32():
    """The device multiplies float32 as float32, and not as TF32."""
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def qwen3() -> Judge:
    """A judge whose heads are of a size that flash-attn has."""
    return judge_of("qwen3")


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def serving() -> Iterator[Callable[..., LLM]]:
    """Makes LLMs on the device and closes them; behind an attention backend's name, ", eager" takes no graphs."""
    made: list[LLM] = []

    def make(judge: Judge, attention: str, **settings: Any) -> LLM:
        name, _, execution = attention.partition(", ")
        if name == "flash":
            pytest.importorskip("flash_attn")
        defaults = {"block_size": 256, "num_gpu_blocks": 16}
        options = {"dtype": "bfloat16" if name == "flash" else "float32", "attention": name}
        options["execution"] = execution or "auto"
        made.append(LLM(judge.model, device="cuda", settings=Settings.load(defaults | settings), **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()
