"""What is measured is what serves: steps are graphs, launched one step ahead, of sequences that the device knows."""

from __future__ import annotations

import pytest

import twinserve.engine.profile as profile
from twinserve.engine.llm import LLM
from twinserve.engine.profile import MOST_WARMING, StepShape, measure
from twinserve.settings.build_core import Settings
from twinserve.sim.kernels import Kernels
from twinserve.sim.latency import StepFeatures

pytestmark = pytest.mark.gpu

SHAPES = [
    StepShape((64,) * 4),
    StepShape((64, 90), ((0, 32),)),
    StepShape((), ((0, 20), (0, 12))),
    StepShape((), ((256, 32),)),
]


def test_measured_steps_are_graphs_and_decodes_go_on_from_a_step_before(qwen3, serving, monkeypatch):
    llm = serving(qwen3, "triton", max_model_len=512, max_num_batched_tokens=256)
    ran = []
    run = llm.runner._run

    def watched(step, *others):
        ran.append((step.size in llm.runner._graphs, step.inputs is None))
        return run(step, *others)

    monkeypatch.setattr(llm.runner, "_run", watched)
    monkeypatch.setattr(profile, "WARMING_NS", 0)
    steps = measure(llm, SHAPES, repeats=2)
    assert len(steps) == 2 * len(SHAPES)
    assert len(ran) == 3 * len(SHAPES) and all(is_graph for is_graph, _ in ran)
    assert sum(is_resident for _, is_resident in ran) == 2, "those of decodes alone go on from the step before"


def test_steps_are_run_until_the_device_is_warm_before_they_count(qwen3, serving, monkeypatch):
    llm = serving(qwen3, "triton", max_model_len=512, max_num_batched_tokens=256)
    monkeypatch.setattr(profile, "WARMING_NS", 1 << 60)
    steps = measure(llm, SHAPES[:1], repeats=2)
    contexts = [step.batch.starts[0] + 1 for step in steps]
    assert contexts == [64 + 1 + MOST_WARMING, 64 + 2 + MOST_WARMING]


def test_the_facts_of_a_run_say_how_its_steps_are_padded_and_cut(qwen3, serving):
    llm = serving(qwen3, "triton", max_model_len=512, max_num_batched_tokens=256)
    kernels = Kernels.load(llm.facts()["kernels"])
    assert kernels.tokens[-1] == 256 and kernels.decodes[-1] == llm.settings.max_num_seqs
    assert kernels.decode_cuts[0][0] == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_steps_with_drafts_are_graphs_and_the_facts_say_how_they_attend(qwen3, monkeypatch, depth):
    config = {"method": "draft_model", "num_speculative_tokens": 3, "model": "given"}
    settings = {"num_gpu_blocks": 256, "max_model_len": 512, "max_num_batched_tokens": 256, "block_size": 16}
    settings |= {"pipeline_depth": depth, "speculative_config": config, "max_num_seqs": 8}
    options = {"device": "cuda", "attention": "triton", "dtype": "float32"}
    llm = LLM(qwen3.model, settings=Settings.load(settings), draft=qwen3.model, **options)
    kernels = Kernels.load(llm.facts()["kernels"])
    # One step ahead the device alone has to know what was accepted.
    assert (kernels.single, kernels.waits, kernels.decodes[-1], kernels.tokens[-1]) == (4, depth == 0, 32, 256)
    monkeypatch.setattr(profile, "WARMING_NS", 0)
    shapes = [StepShape((64, 90), drafts=(3, 3), asked=3), StepShape((64,), ((0, 20),), drafts=(2,), asked=2)]
    steps = measure(llm, shapes, repeats=2)
    assert sorted(StepFeatures.of(step.batch).drafts for step in steps) == [2, 2, 6, 6]
    assert all(step.launch_ns >= 0 <= step.bookkeeping_ns and step.device_ns > 0 for step in steps)
    llm.close()
