"""Which steps are captured, and to which size a step is padded."""

from __future__ import annotations

from typing import Any, cast

import pytest

from twinserve.engine.graphs.step_sizes import (
    CAPTURED_PROMPT_TOKENS,
    CAPTURED_PROMPTS,
    GraphOptions,
    StepSize,
    StepSizes,
)
from twinserve.settings.errors import InputError


@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), [(1, 1), (3, 70), (40, 384), (256, 8192)])
def test_a_step_is_padded_to_the_smallest_captured_size_with_room_for_it(max_num_seqs, max_num_batched_tokens):
    sizes = StepSizes(max_num_seqs, max_num_batched_tokens)
    captured = sizes.captured("all")
    longest = min(max_num_batched_tokens, CAPTURED_PROMPT_TOKENS[-1])
    for decodes in range(max_num_seqs + 1):
        for tokens, prompts in ((0, 0), (1, 1), (longest // 2 + 1, 1), (longest, CAPTURED_PROMPTS)):
            step = StepSize(decodes, tokens, prompts)
            fitting = [
                size
                for size in captured
                if size.decodes >= decodes and size.prompt_tokens >= tokens and bool(size.prompt_tokens) == bool(tokens)
            ]
            if decodes or tokens:
                smallest = min(fitting, key=lambda size: (size.prompt_tokens, size.decodes))
                assert sizes.padded(step) == smallest


def test_a_step_that_no_graph_has_room_for_keeps_its_size():
    sizes = StepSizes(8, 8192)
    for step in (StepSize(0), StepSize(4, 2049, 1), StepSize(4, 500, CAPTURED_PROMPTS + 1)):
        assert sizes.padded(step) == step
        assert step not in sizes.captured("all")


def test_what_is_switched_off_is_not_captured():
    sizes = StepSizes(40, 512)
    every, decodes = sizes.captured("all"), sizes.captured("decodes")
    assert [size.decodes for size in decodes] == [40, 32, 24, 16, 8, 4, 2, 1]
    assert decodes == [size for size in every if not size.prompt_tokens]
    assert len(every) - len(decodes) == 7 * 3, "up to 512 prompt tokens, beside 0, 16 and 40 decodes"
    assert sizes.captured("none") == []
    assert GraphOptions() == GraphOptions(captured="all", longest_first=True)
    with pytest.raises(InputError, match="captured is 'few', expected one of all, decodes, none"):
        GraphOptions(captured=cast(Any, "few"))
