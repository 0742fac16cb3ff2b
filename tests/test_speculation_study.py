"""The page on when speculation pays: where it stops paying, and that it says what the records say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import speculation_study  # noqa: E402
from speculation_study import break_even, page_of  # noqa: E402


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([(1, 0.9), (4, 0.8)], "never"),
        ([(1, 2.0), (4, 1.5), (16, 0.5)], "10"),
        ([(1, 2.0), (4, 1.0), (16, 1.2)], "4"),
        ([(1, 2.0), (4, 1.1)], "beyond 4"),
    ],
)
def test_where_drafts_stop_paying(points, words):
    assert break_even(points) == words


def test_the_page_names_the_fastest_and_how_many_times_it_is():
    options = {"batches": [1, 8], "drafts": [2, 4], "acceptance": [0.5]}
    options |= {"model": "m", "dtype": "bfloat16", "prompt_tokens": 5, "output_tokens": 6}
    about = {"device": "h200", "options": options, "draft": {"layers": 2, "hidden": 64}}
    about |= {"command": "python benchmarks/speculation_runs.py --device cuda --commit abc", "commit": "abc"}
    rates = {(0, 0.0): (100, 800), (2, 0.5): (150, 760), (4, 0.5): (180, 400)}
    runs = [
        {"drafts": k, "acceptance": rate, "requests": batch, "steps": 3, "output_tok_s": found}
        for (k, rate), both in rates.items()
        for batch, found in zip((1, 8), both, strict=True)
    ]
    text = page_of({"about": about, "decisions": 1234, "runs": runs})
    assert "| 0.5 | 2 | 1.50 | 0.95 |" in text and "| 0.5 | 4 | 1.80 | 0.50 |" in text
    assert "| 0.5 | 7 | 5 |" in text, "2 drafts pay up to some 7 requests, 4 up to 5"
    assert "| 0.5 | 4 | 0 |" in text, "alone 4 drafts are fastest, and of 8 requests none"
    assert "All 1,234 decisions" in text and "--commit" not in text


def test_the_page_is_what_the_records_say():
    (archive,) = speculation_study.RESULTS.glob("*/speculation.tar.xz")
    found = speculation_study.measured(archive)
    assert speculation_study.PAGE.read_text(encoding="utf-8") == page_of(found)
