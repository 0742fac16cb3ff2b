"""The page on when speculation pays: where it stops paying, and that it says what the records say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import speculation_study  # noqa: E402
from result_files import load_json  # noqa: E402
from speculation_study import break_even, paces, page_of  # noqa: E402


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


TWIN = {"tpot_s.mean": 0.011, "tpot_s.p99": -0.02, "ttft_s.mean": 0.5, "output_tok_s": -0.012}


def test_the_page_says_what_the_twin_says_where_there_is_one():
    options = {"batches": [1, 8], "drafts": [2, 4], "acceptance": [0.5], "rate": 8.0}
    options |= {"model": "m", "dtype": "bfloat16", "prompt_tokens": 5, "output_tokens": 6}
    about = {"device": "h200", "options": options, "draft": {"layers": 2, "hidden": 64}, "command": "x", "commit": "y"}
    rates = {(0, 0.0): (100, 800), (2, 0.5): (150, 760), (4, 0.5): (180, 400)}
    said = {(0, 0.0): (100, 800), (2, 0.5): (190, 840), (4, 0.5): (171, 500)}
    runs = [
        {"drafts": k, "acceptance": rate, "requests": batch, "steps": 3, "output_tok_s": real, "twin_tok_s": twin}
        | {"errors": TWIN, "step_ms": 4.0 + real / 1000}
        for (k, rate), both in rates.items()
        for batch, real, twin in zip((1, 8), both, said[k, rate], strict=True)
    ]
    served = {"requests": 9, "steps": 3, "output_tok_s": 1.0, "errors": TWIN}
    traffic = [served | {"drafts": drafts, "acceptance": drafts / 8} for drafts in (0, 4)]
    found = {"about": about, "decisions": 1234, "runs": runs, "traffic": traffic}
    found |= {"prompt_launches": {"launch_ns": 9.5, "device_ns": 8.2}}
    text = page_of(found)
    assert "| 0.5 | 2 | 1.50 (1.90) | 0.95 (1.05) |" in text
    assert "| 0.5 | 7 (beyond 8) | 5 (6) |" in text
    assert "| 0.5 | 4 (2) | 0 (2) |" in text
    assert "in 0 of 2 cases; where it names another, 16.7% is" in " ".join(text.split()), "150 for 180, 760 for 800"
    assert "| 2 drafts | 1.1%, 1.1% | 2.0%, 2.0% | 50.0%, 50.0% | 1.2%, 1.2% |" in text
    assert "9 requests of many lengths, 8 a second" in text and "took up to 0% longer" in " ".join(text.split())
    assert "| 4 drafts, 0.5 | +1.1% | -2.0% | +50.0% | -1.2% |" in text
    assert "took 9.5 ms to be launched, at the median, beside 8.2 ms on the device" in " ".join(text.split())
    for run in runs:
        del run["twin_tok_s"], run["errors"]
    assert "in brackets" not in page_of(found) and "| 0.5 | 4 | 0 |" in page_of(found)


def test_a_pace_is_that_of_runs_alike_but_for_what_is_accepted():
    cases = ((0, 8, None), (2, 1, 5.0), (2, 1, 4.0), (2, 8, 9.0), (4, 8, 30.0), (4, 8, 27.0))
    runs = [
        {"drafts": k, "requests": batch} | ({} if step_ms is None else {"step_ms": step_ms})
        for k, batch, step_ms in cases
    ]
    assert paces({"runs": runs}) == pytest.approx(0.25)


def test_the_page_has_the_runs_with_prompt_lookup_where_they_were_made():
    (archive,) = speculation_study.RESULTS.glob("*/speculation.tar.xz")
    found = load_json(archive.parent / "draft-study.json")
    runs = [
        {"decisions": {"recorded": 7, "equal": 7}, "tokens_per_step": tokens, "pace": pace}
        | {"errors": {"by the law": TWIN | {"tpot_s.mean": off}}}
        for tokens, pace, off in ((1.5, 0.9, 0.01), (2.0, 1.25, -0.04), (2.5, 1.0, 0.03))
    ]
    texts = {"cases": {"with repeats": runs}, "options": {"requests": 8, "rounds": 3}, "load": [0.5, 4.0]}
    texts |= {"model": "m", "device": "CPU", "command": "x", "commit": "y", "law": "that was fitted to others"}
    text = page_of(found, texts)
    assert "21 decisions are made again" in " ".join(text.split())
    assert "or by a law that was fitted to others. The load average was 0.5 to 4.0" in " ".join(text.split())
    assert "0.90 to 1.25 times" in " ".join(text.split())
    assert "| with repeats, by the law | 2.00 | +1.0% (-4.0% to +3.0%) |" in text
    assert "Prompt lookup by the twin" not in page_of(found)


def test_the_page_is_what_the_records_say():
    (archive,) = speculation_study.RESULTS.glob("*/speculation.tar.xz")
    beside = speculation_study.RESULTS / "cpu" / "lookup-texts.json"
    written, texts = load_json(archive.parent / "draft-study.json"), load_json(beside) if beside.exists() else None
    assert speculation_study.PAGE.read_text(encoding="utf-8") == page_of(written, texts)
    found = speculation_study.measured(archive, only=("k0-a0.0-n4", "k4-a0.8-n1", "k8-a0.9-n16"))
    assert len(found["runs"]) == 3 and all(run in written["runs"] for run in json.loads(json.dumps(found["runs"])))
