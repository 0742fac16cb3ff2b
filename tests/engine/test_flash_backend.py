"""The engine on flash-attn, as far as a CPU can tell: a stand-in computes what the library would be asked for."""

from __future__ import annotations

import sys

import flash_stand_in
import pytest
import torch
from engine_judge import GREEDY, judge_of
from flash_stand_in import AnywhereFlash

from twinserve.engine.layers import choice
from twinserve.engine.llm import LLM
from twinserve.engine.model_runner import ModelRunner
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.request import Part, Request

CPU = torch.device("cpu")
every_depth = pytest.mark.parametrize("pipeline_depth", [0, 1])


@pytest.fixture
def flash(monkeypatch):
    """flash-attn seems to be there, and to run here."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_stand_in.module())
    monkeypatch.setitem(choice.BACKENDS, "flash", AnywhereFlash)


@pytest.fixture
def qwen3():
    return judge_of("qwen3")


@every_depth
def test_chunks_and_prefix_hits_beside_decodes(flash, qwen3, watcher, serving, pipeline_depth):
    llm = serving(qwen3, block_size=256, pipeline_depth=pipeline_depth, max_num_seqs=6, max_num_batched_tokens=150)
    assert llm.attention.name == "flash"
    shared = Part(100, 0, 260)
    requests = [Request(i, 0, (shared, Part(i, 0, length)), 12) for i, length in enumerate([5, 30, 1, 77])]
    requests += [Request(4 + i, 0, (Part(4 + i, 0, length),), 14) for i, length in enumerate([1, 90, 33, 130])]
    sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher)
    assert watcher.chunks and watcher.mixed_steps and watcher.hit_tokens and watcher.largest_batch == 6
    qwen3.check_all(sequences)


def test_windows_beside_full_layers(flash, watcher, serving):
    judge = judge_of("qwen2-windows")
    llm = serving(judge, block_size=256, max_num_seqs=4, max_num_batched_tokens=40)
    assert llm.attention.name == "flash"
    requests = [Request(i, 0, (Part(i, 0, length),), 12) for i, length in enumerate([5, 90, 1, 19])]
    sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher)
    assert watcher.chunks and watcher.mixed_steps
    judge.check_all(sequences)


@every_depth
def test_preemptions(flash, qwen3, watcher, serving, pipeline_depth):
    llm = serving(qwen3, block_size=256, num_gpu_blocks=3, pipeline_depth=pipeline_depth, max_num_batched_tokens=300)
    requests = [Request(i, 0, (Part(i, 0, length),), 20) for i, length in enumerate([245, 240, 250])]
    sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher)
    assert watcher.preemptions
    qwen3.check_all(sequences)


def test_its_blocks_are_large_unless_their_size_is_given(flash, qwen3):
    llm = LLM(qwen3.model, settings=Settings.load({"num_gpu_blocks": 4}))
    assert (llm.attention.name, llm.settings.block_size, llm.runner.block_size) == ("flash", 256, 256)
    assert llm.facts()["attention"] == "flash"
    assert llm.facts()["attention_reason"] == "the fastest for float32, heads of 64 and this device"
    llm.close()
    given = LLM(qwen3.model, settings=Settings.load({"num_gpu_blocks": 4, "block_size": 512}))
    assert (given.attention.name, given.settings.block_size) == ("flash", 512)
    given.close()


def test_small_blocks_are_refused_where_it_was_asked_for_and_taken_by_sdpa_where_not(flash, qwen3):
    small = Settings.load({"num_gpu_blocks": 4, "block_size": 16})
    with pytest.raises(InputError, match="block_size is 16, expected a multiple of 256 for flash-attn"):
        LLM(qwen3.model, settings=small, attention="flash")
    llm = LLM(qwen3.model, settings=small)
    assert (llm.attention.name, llm.settings.block_size) == ("sdpa", 16)
    assert llm.attention.reason == "block_size is 16, expected a multiple of 256 for flash-attn"
    llm.close()


def test_small_heads_are_refused_where_it_was_asked_for_and_taken_by_sdpa_where_not(flash, llama):
    with pytest.raises(InputError, match="head_dim is 32, expected 64 or 128 for flash-attn"):
        ModelRunner(llama.model, None, "cpu", attention="flash", num_blocks=4)
    runner = ModelRunner(llama.model, None, "cpu", num_blocks=4)
    assert runner.attention.name == "sdpa"
    runner.close()


def test_a_cpu_is_served_by_sdpa_with_small_blocks(llama):
    assert choice.choose_attention("sdpa", 64, torch.float32, CPU).reason == "asked for"
    chosen = choice.choose_attention("auto", 64, torch.bfloat16, CPU)
    assert (chosen.name, chosen.block_size) == ("sdpa", 16)
    assert chosen.reason == "device is 'cpu', expected cuda: flash-attn runs on NVIDIA GPUs"
    with pytest.raises(InputError, match="device is 'cpu', expected cuda"):
        LLM(llama.model, attention="flash")


def test_an_old_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match=r"the device's compute capability is \(7, 5\), expected at least \(8, 0\)"):
        choice.choose_attention("flash", 64, torch.bfloat16, torch.device("cuda"))


def test_a_new_device_needs_the_library(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    chosen = choice.choose_attention("auto", 64, torch.bfloat16, torch.device("cuda"))
    assert chosen.name == "sdpa" and "cannot be imported" in chosen.reason
    monkeypatch.setitem(sys.modules, "flash_attn", flash_stand_in.module())
    assert choice.choose_attention("auto", 64, torch.bfloat16, torch.device("cuda")).name == "flash"
