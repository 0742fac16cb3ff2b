"""Prompts as parts share whole blocks exactly where their tokens do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twinserve.serving.parts import PartMaker
from twinserve.traces.request import Part, PrefixKeys, answer_text

TOKENS = st.lists(st.integers(0, 2), max_size=14)


@given(st.lists(TOKENS, max_size=6))
def test_prompts_have_equal_keys_as_far_as_they_have_equal_blocks(prompts):
    maker, size = PartMaker(4), 4
    parts = [maker.parts(number, prompt) for number, prompt in enumerate(prompts)]
    keys = [PrefixKeys(own, answer_text(number)) for number, own in enumerate(parts)]
    for one, first in enumerate(prompts):
        assert sum(part.length for part in parts[one]) == len(first)
        for other, second in enumerate(prompts[:one]):
            for end in range(size, min(len(first), len(second)) + 1, size):
                assert (keys[one](end) == keys[other](end)) == (first[:end] == second[:end])


@given(TOKENS, TOKENS, TOKENS, TOKENS)
def test_an_answer_that_comes_back_is_known_as_that_answer(prompt, answer, rest, before):
    maker = PartMaker(4)
    maker.parts(9, before)
    first = maker.parts(0, prompt)
    maker.answered(0, prompt, first, answer)
    whole = [*prompt, *answer, *rest]
    keys, again = PrefixKeys(first, answer_text(0)), PrefixKeys(maker.parts(1, whole), answer_text(1))
    for end in range(4, len(prompt) + len(answer) + 1, 4):
        if whole[:end] != before[:end]:
            assert keys(end) == again(end)


def test_tokens_that_nobody_else_has_are_a_text_of_the_requests_own():
    maker = PartMaker(2)
    assert maker.parts(4, [1, 2, 3]) == (Part(4, 0, 3),)
    assert maker.parts(5, [1, 2, 4, 5, 6]) == (Part(4, 0, 2), Part(5, 2, 3))


def test_what_came_first_is_forgotten_first():
    maker = PartMaker(2, most_blocks=2)
    for number in range(3):
        maker.parts(number, [number, number])
    assert maker.parts(7, [2, 2]) == (Part(2, 0, 2),)
    assert maker.parts(8, [0, 0]) == (Part(8, 0, 2),)
