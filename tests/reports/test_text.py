"""Numbers read well and say no more than they know."""

from __future__ import annotations

import pytest

from twinserve.reports.text import count, duration, flat, number, percent, plain


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (0, "0"), (7, "7"), (12345, "12,345"), (0.0123456, "0.01235"), (23.0, "23.00")]
    + [(999.96, "1000"), (1234.5, "1,234"), (152681.4, "152,681")],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("share", "text"), [(None, "–"), (0.1234, "+12.3%"), (-0.5, "−50.0%"), (-0.0001, "0.0%")])
def test_errors_have_a_sign_unless_they_round_to_nothing(share, text):
    assert percent(share, signed=True) == text


def test_times_are_in_seconds_from_a_second_on():
    assert (duration(0.0301), duration(1.5)) == ("30.10 ms", "1.500 s")


def test_counts_agree_with_their_noun():
    assert [count(n, "step") for n in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]


def test_values_of_a_record_are_flattened_and_written_plainly():
    assert flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
    assert [plain(value) for value in (None, {}, [], True, "x", [1, "y"], 0)] == [
        "none",
        "none",
        "none",
        "true",
        "x",
        '[1, "y"]',
        "0",
    ]
