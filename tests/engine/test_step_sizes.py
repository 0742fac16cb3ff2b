"""Which steps are captured, and to which size a step is padded."""

from __future__ import annotations

from typing import Any, cast

import pytest

from twinserve.engine.graphs.step_sizes import (
    CAPTURED_PROMPTS,
    CAPTURED_TOKENS,
    GraphOptions,
    StepSize,
    StepSizes,
)
from twinserve.settings.errors import InputError
from twinserve.sim.kernels import Kernels

LARGE = 1e10
"""Floating point operations for a token of a model of which no step beyond 2,048 tokens is captured."""


@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), [(1, 1), (3, 70), (40, 384), (300, 8192)])
def test_a_step_is_padded_to_the_smallest_captured_size_with_room_for_it(max_num_seqs, max_num_batched_tokens):
    sizes = StepSizes(max_num_seqs, max_num_batched_tokens, LARGE)
    captured = sizes.captured("all")
    longest = min(max_num_batched_tokens, CAPTURED_TOKENS[-1])
    for decodes in range(min(max_num_seqs, longest) + 1):
        for prompt_tokens, prompts in ((0, 0), (1, 1), (longest // 2 + 1, 1), (longest, CAPTURED_PROMPTS)):
            step = StepSize(decodes, min(longest, decodes + prompt_tokens), prompts)
            fitting = [
                size
                for size in captured
                if size.decodes >= decodes and size.tokens >= step.tokens and bool(size.prompts) == bool(prompts)
            ]
            if step.tokens:
                smallest = min(fitting, key=lambda size: (size.decodes, size.tokens))
                assert sizes.padded(step) == smallest


def test_the_tokens_of_a_captured_step_are_those_of_the_twin():
    sizes = StepSizes(300, 2048, LARGE)
    kernels = Kernels.load(sizes.as_facts("all"))
    for decodes, prompt_tokens in ((0, 700), (1, 1), (17, 40), (65, 1), (65, 1983), (257, 30), (300, 1748)):
        padded = sizes.padded(StepSize(decodes, decodes + prompt_tokens, 1))
        expected = padded.decodes, padded.tokens, padded.decodes + CAPTURED_PROMPTS
        assert kernels.padded(decodes, prompt_tokens, 1, 1) == expected
        assert padded.tokens - decodes - prompt_tokens < 256


def test_the_twin_knows_the_sizes_under_other_limits():
    profiled = Kernels.load(StepSizes(1024, 8192, LARGE).as_facts("all"))
    for max_num_seqs, max_num_batched_tokens in ((1, 1), (64, 512), (100, 900), (256, 2048), (1024, 8192)):
        own = Kernels.load(StepSizes(max_num_seqs, max_num_batched_tokens, LARGE).as_facts("all"))
        assert profiled.at(max_num_seqs, max_num_batched_tokens) == own
    assert Kernels().at(64, None) == Kernels()
    assert own.at(2000, None) == own


def test_a_step_that_no_graph_has_room_for_keeps_its_size():
    sizes = StepSizes(8, 8192, LARGE)
    for step in (StepSize(0, 0), StepSize(4, 2049, 1), StepSize(4, 500, CAPTURED_PROMPTS + 1)):
        assert sizes.padded(step) == step
        assert step not in sizes.captured("all")


def test_steps_that_outlast_their_launches_are_not_captured():
    for billions, most in ((0.44, 7168), (1.0, 3072), (7.0, 2048)):
        sizes = StepSizes(64, 8192, 2e9 * billions)
        assert sizes.captured("all")[0] == StepSize(64, most, CAPTURED_PROMPTS)
    assert StepSizes(64, 3000, 1.0).captured("all")[0].tokens == 3072


def test_what_is_switched_off_is_not_captured():
    sizes = StepSizes(40, 512, LARGE)
    every, decodes = sizes.captured("all"), sizes.captured("decodes")
    assert [size.decodes for size in decodes] == [40, 32, 24, 16, 8, 4, 2, 1]
    assert decodes == [size for size in every if not size.prompts]
    assert len(every) - len(decodes) == 7 * 3 - 1, "up to 512 tokens, 0, 16 and 40 of decodes"
    assert sizes.captured("none") == []
    assert GraphOptions() == GraphOptions(captured="all", longest_first=True)
    with pytest.raises(InputError, match="captured is 'few', expected one of all, decodes, none"):
        GraphOptions(captured=cast(Any, "few"))


@pytest.mark.parametrize(("seqs", "budget"), [(8, 2048), (1024, 512), (256, 16384), (4, 30)])
def test_no_step_has_more_tokens_than_the_largest(seqs, budget):
    """What a step leaves of each token is kept in memory of that size."""
    sizes = StepSizes(seqs, budget, 1e9)
    captured = [size.tokens for size in sizes.captured("all")]
    assert sizes.most_tokens == max(*captured, budget)
