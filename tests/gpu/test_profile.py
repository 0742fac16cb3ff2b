"""What is measured is what serves: steps are graphs, of sequences that the device knows already."""

from __future__ import annotations

import pytest

from twinserve.engine.profile import StepShape, measure

pytestmark = pytest.mark.gpu

SHAPES = [StepShape(4, 64), StepShape(2, 64, prompt=32), StepShape(0, 0, prompt=32), StepShape(0, 0, 32, start=256)]


def test_measured_steps_are_graphs_and_decodes_go_on_from_a_step_before(qwen3, serving, monkeypatch):
    llm = serving(qwen3, "triton", max_model_len=512, max_num_batched_tokens=256)
    ran = []
    run = llm.runner._run

    def watched(changes, graph, inputs=None, *others):
        ran.append((graph is not None, inputs is None))
        return run(changes, graph, inputs, *others)

    monkeypatch.setattr(llm.runner, "_run", watched)
    steps = measure(llm, SHAPES, repeats=1)
    assert len(steps) == len(SHAPES)
    assert all(is_graph for is_graph, _ in ran)
    # Of the shapes, each measured twice, two have decodes and so a step before; that of decodes alone goes on from it.
    assert len(ran) == 2 * (len(SHAPES) + 2)
    assert sum(is_resident for _, is_resident in ran) == 2
