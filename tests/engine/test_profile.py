"""The profiler: a design that is the same for a seed and within its limits, and steps of the shapes asked for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from twinserve.engine.llm import LLM
from twinserve.engine.profile import StepShape, covering, design, measure
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.latency import StepFeatures

LIMITS = {
    "max_seqs": 256,
    "max_context": 8000,
    "max_prompt": 2048,
    "block_size": 16,
    "num_blocks": 25_000,
    "max_rows": 256,
    "max_tokens": 8192,
    "repeats": 5,
}

SMALL = {
    "max_seqs": 2,
    "max_context": 64,
    "max_prompt": 32,
    "block_size": 16,
    "num_blocks": 64,
    "max_rows": 8,
    "max_tokens": 64,
    "repeats": 1,
}


def test_a_seed_gives_the_same_shapes_and_another_seed_others():
    assert design(64, **LIMITS, seed=3) == design(64, **LIMITS, seed=3) != design(64, **LIMITS, seed=4)


@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        LIMITS | {"max_seqs": 4, "max_context": 70, "max_prompt": 5},
        LIMITS | {"max_rows": 20},
        LIMITS | {"max_tokens": 300},
        SMALL,
        *(SMALL | {"max_rows": rows} for rows in (1, 2, 3)),
        SMALL | {"max_rows": 1, "max_tokens": 1},
        SMALL | {"max_rows": 2, "max_tokens": 3, "most_drafts": 1},
        SMALL | {"max_context": 16, "block_size": 256, "num_blocks": 12},
    ],
)
def test_every_shape_is_within_the_limits(limits):
    size, steps = limits["block_size"], 1 if limits["max_rows"] < 3 else 2
    shapes = design(256, **limits)
    assert any(shape.prompts for shape in shapes) and any(shape.contexts for shape in shapes)
    for shape in shapes:
        assert shape.contexts or shape.prompts
        assert len(shape.contexts) <= limits["max_seqs"] and shape.prompt_tokens <= limits["max_prompt"]
        assert len(shape.contexts) + steps * len(shape.prompts) <= limits["max_rows"]
        assert sum(1 + drafts for _, drafts in shape.drafted) + shape.prompt_tokens <= limits["max_tokens"]
        assert shape.longest <= limits["max_context"] + limits.get("most_drafts", 0)
        assert shape.kv_tokens <= size * limits["num_blocks"]
        assert all(start % size == 0 and length >= 1 for start, length in shape.prompts)
        assert all(context >= 2 for context in shape.contexts)
        assert shape.common % size == 0 and shape.common < min(shape.contexts, default=1)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"num_blocks": 1}, "most steps to measure do not fit the 16 tokens of the KV pool"),
        ({"max_rows": 1, "max_tokens": 1, "max_context": 16}, "all steps with prompts are alike"),
    ],
)
def test_limits_that_leave_too_little_to_measure_are_refused(limits, words):
    with pytest.raises(InputError, match=words):
        design(64, **(SMALL | limits))


def test_the_design_has_the_steps_that_traffic_makes():
    shapes = design(128, **LIMITS)
    decodes = [shape for shape in shapes if not shape.prompts]
    beside = [shape for shape in shapes if shape.prompts and shape.contexts]
    assert min(len(decodes), len(beside), len(shapes) - len(decodes) - len(beside)) >= 25
    assert {math.ceil(math.log2(len(shape.contexts))) for shape in decodes} == set(range(9)), "every power of two"
    assert {math.ceil(math.log2(len(shape.contexts))) for shape in beside} >= set(range(1, 9))
    assert any(len(shape.prompts) >= 8 for shape in shapes)
    assert any(length < 100 and start > 2000 for shape in shapes for start, length in shape.prompts), "a last piece"
    assert any(shape.shares and any(start for start, _ in shape.prompts) for shape in shapes)
    assert len({shape.common for shape in shapes if len(shape.contexts) > 8}) > 4, "beginnings of many lengths"
    unevenness = [max(shape.contexts) * len(shape.contexts) / sum(shape.contexts) for shape in decodes]
    assert min(unevenness) < 1.2 and max(unevenness) > 4


SHAPES = [
    StepShape((40, 90)),
    StepShape((), ((0, 20), (0, 7))),
    StepShape((30,), ((32, 9), (64, 5)), shares=True),
    StepShape((30,), ((32, 9), (48, 5))),
    StepShape((90, 70, 60), common=48),
]


def test_each_shape_is_run_some_steps_in_a_row_and_what_is_measured_is_that_shape(llama, serving):
    llm = serving(llama, max_model_len=256)
    steps = measure(llm, SHAPES, repeats=3)
    assert len(steps) == 3 * len(SHAPES)
    found = [StepFeatures.of(step.batch, step.arrived) for step in steps]
    for first in range(0, len(found), 3):
        one, *others = found[first : first + 3]
        shape = next(
            shape for shape in SHAPES if shape.prompts == one.prompts and len(shape.contexts) == one.decode_tokens
        )
        assert one.longest_decode == (max(shape.contexts) + 1 if shape.contexts else 0), "the first step does not count"
        assert [other.prompts for other in others] == [one.prompts] * 2
        assert one.shared_tokens == shape.common * max(0, len(shape.contexts) - 1)
        assert [other.decode_kv_tokens - one.decode_kv_tokens for other in others] == [
            number * one.decode_tokens for number in (1, 2)
        ]
        assert all(features.arrived == features.left == len(shape.prompts) for features in others)
    assert all(step.device_ns > 0 and step.launch_ns > 0 and step.bookkeeping_ns >= 0 for step in steps)


@pytest.mark.parametrize(
    ("shape", "words"),
    [(StepShape((300,)), "expected contexts below 256"), (StepShape((200,) * 30), "expected at most the 4096 tokens")],
)
def test_a_shape_without_room_is_refused(llama, serving, shape, words):
    with pytest.raises(InputError, match=words):
        measure(serving(llama, max_model_len=256), [shape], repeats=1)


ROOM = {"max_context": 8000, "block_size": 16, "num_blocks": 25_000, "max_rows": 64, "repeats": 5}
MADE = [StepShape((context,) * rows) for rows in (1, 2, 3) for context in range(500, 510)]
MADE += [StepShape((2000,) * 30, ((0, 100),)), StepShape((), ((4096, 50), (0, 900)))]


def test_shapes_of_a_trace_are_taken_from_each_kind_before_another_of_any():
    found = covering(MADE, 5, **ROOM, seed=1)
    assert set(MADE[-2:]) < set(found) and {len(shape.contexts) for shape in found} == {0, 1, 2, 3, 30}
    assert len(covering(MADE, 100, **ROOM)) == len(MADE) == len(set(covering(MADE, 100, **ROOM)))
    assert covering(MADE, 9, **ROOM, seed=1) == covering(MADE[::-1], 9, **ROOM, seed=1)
    assert covering(MADE, 9, **ROOM, seed=1) != covering(MADE, 9, **ROOM, seed=2)


@pytest.mark.parametrize("limits", [{"max_rows": 8}, {"max_context": 600}, {"num_blocks": 200}])
def test_sequences_without_room_are_left_out_of_a_traces_shapes(limits):
    room = ROOM | limits
    for shape in covering(MADE, 100, **room):
        assert shape.contexts or shape.prompts
        assert len(shape.contexts) + 2 * len(shape.prompts) <= room["max_rows"]
        assert shape.longest <= room["max_context"] and shape.kv_tokens <= 16 * room["num_blocks"]


def test_a_decided_step_has_a_shape_that_can_be_measured(llama, serving):
    llm = serving(llama, max_model_len=256)
    batch = measure(llm, [StepShape((90, 40), ((32, 9), (0, 5)))], repeats=1)[0].batch
    shape = StepShape.of(batch, 16)
    assert shape == StepShape((91, 41), ((32, 9), (0, 5)))
    assert StepShape.of(batch, 64).prompts == ((0, 9), (0, 5))
    assert StepFeatures.of(measure(llm, [shape], repeats=1)[0].batch).prompts == shape.prompts


DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
DRAFTED = [
    StepShape((40, 90), drafts=(3, 3), asked=3),
    StepShape((90, 70, 60), common=48, drafts=(2, 0, 2), asked=2),
    StepShape((30, 41), ((32, 9), (48, 5)), drafts=(1, 0), asked=1),
    StepShape((30,), ((32, 9), (64, 5)), shares=True, asked=3),
    StepShape((), ((0, 20), (0, 7)), asked=2),
    StepShape((40, 90)),
]


def check_drafted(llm: LLM) -> None:
    """Each of DRAFTED is run as it is, however often, whatever comes of its drafts."""
    steps = measure(llm, DRAFTED, repeats=3)
    assert len(steps) == 3 * len(DRAFTED)
    shapes = {(len(shape.contexts), len(shape.prompts), shape.asked): shape for shape in DRAFTED}
    assert len(shapes) == len(DRAFTED)
    for step in steps:
        batch, found = step.batch, StepFeatures.of(step.batch)
        shape = shapes.pop((len(batch) - len(batch.prompts), len(batch.prompts), found.asked), None)
        if shape is None:
            continue  # a repetition, which `measure` has held against its shape
        assert sorted(batch.drafts.values()) == sorted(number for number in shape.drafts if number)
        assert (found.verifying, found.drafts) == (sum(number > 0 for number in shape.drafts), sum(shape.drafts))
        assert found.drafting == (len(batch) if shape.asked else 0)
        assert step.device_ns > 0 and step.launch_ns > 0 and step.bookkeeping_ns >= 0
    assert not shapes


def test_rows_with_drafts_are_measured_as_they_are_asked_for(llama, serving):
    check_drafted(serving(llama, max_model_len=256, speculative_config=DRAFTS))


@pytest.mark.parametrize("rate", [None, 1.0])
def test_a_model_drafts_in_what_is_measured_and_nothing_is_accepted(llama, rate):
    """Though it guesses all of it, or all is taken for right."""
    config = {"method": "draft_model", "num_speculative_tokens": 3, "model": "given", "synthetic_acceptance_rate": rate}
    settings = {"num_gpu_blocks": 256, "max_model_len": 256, "pipeline_depth": 1, "speculative_config": config}
    llm = LLM(llama.model, settings=Settings.load(settings), draft=llama.model)
    check_drafted(llm)
    prompt = [5, 9, 300] * 4
    if rate is None:
        (answer,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=12))
        llama.check(prompt, answer.token_ids)
    llm.close()


@pytest.mark.parametrize("has_graphs", [False, True])
def test_graphs_and_steps_that_the_host_waits_for_are_measured_one_ahead_and_all_rows_have_drafts(
    llama, monkeypatch, has_graphs
):
    config = {"method": "draft_model", "num_speculative_tokens": 3, "model": "given"}
    settings = {"num_gpu_blocks": 256, "max_model_len": 256, "pipeline_depth": 1, "speculative_config": config}
    llm = LLM(llama.model, settings=Settings.load(settings), draft=llama.model)
    monkeypatch.setattr(llm.runner, "kernel_facts", lambda: {} if has_graphs else {"waits": True})
    monkeypatch.setattr(llm, "attention", replace(llm.attention, graphs=has_graphs))
    steps = measure(llm, DRAFTED, repeats=3)
    assert len(steps) == 3 * len(DRAFTED)
    found = [StepFeatures.of(step.batch) for step in steps]
    assert all(
        one.drafts == one.asked * (len(step.batch) - len(step.batch.prompts))
        for one, step in zip(found, steps, strict=True)
    )
    assert {one.asked for one in found} == {0, 1, 2, 3}
    assert all(step.launch_ns >= 0 <= step.bookkeeping_ns and step.device_ns > 0 for step in steps)
    llm.close()


def test_what_a_launch_waited_for_is_no_part_of_it(llama, serving, monkeypatch):
    def waiting(batch):
        handle = launch(batch)
        handle.waited_ns = 10**15
        return handle

    llm = serving(llama, max_model_len=256, pipeline_depth=1, speculative_config=DRAFTS | {"method": "ngram_gpu"})
    launch = llm.runner.launch
    monkeypatch.setattr(llm.runner, "launch", waiting)
    monkeypatch.setattr(llm.runner, "kernel_facts", lambda: {})
    monkeypatch.setattr(llm, "attention", replace(llm.attention, graphs=True))
    steps = measure(llm, DRAFTED[:1], repeats=3)
    assert len(steps) == 3 and all(-(10**15) < step.launch_ns < -(10**14) for step in steps)


@pytest.mark.parametrize("limits", [LIMITS, SMALL | {"max_prompt": 64}])
def test_a_design_with_drafts_has_none_some_and_all_of_them_and_fits_a_step(limits):
    shapes = design(128, **(limits | {"max_tokens": 2048}), most_drafts=4)
    assert {shape.asked for shape in shapes} == {0, 1, 2, 3, 4}
    for shape in shapes:
        assert set(shape.drafts) <= {0, shape.asked} and len(shape.drafted) == len(shape.contexts)
        assert shape.prompt_tokens + len(shape.contexts) + sum(shape.drafts) <= 2048
        assert all(context >= 3 for context in shape.contexts) and all(length >= 2 for _, length in shape.prompts)
        assert len(shape.contexts) <= limits["max_seqs"]
    asking = [shape for shape in shapes if shape.asked and len(shape.contexts) > 1]
    whole = [shape for shape in asking if all(shape.drafts)]
    assert len(asking) > 30 < 3 * len(whole) and len(whole) < len(asking)


def test_a_decided_step_with_drafts_has_a_shape_that_can_be_measured(llama, serving):
    llm = serving(llama, max_model_len=256, speculative_config=DRAFTS)
    batch = measure(llm, DRAFTED[1:2], repeats=1)[0].batch
    shape = StepShape.of(batch, 16)
    assert shape == StepShape((91, 71, 61), drafts=(2, 0, 2), asked=2)
    kept = covering([shape], 1, **(ROOM | {"max_rows": 2}))
    assert kept == [StepShape((91, 71), drafts=(2, 0), asked=2)], "a sequence and its drafts are left out together"
    assert StepFeatures.of(measure(llm, kept, repeats=1)[0].batch).drafts == 2
