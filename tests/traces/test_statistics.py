"""What a trace holds, held against definitions written out, and against what was found in the public traces."""

from __future__ import annotations

import random

import numpy as np
import pytest

from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.readers import read_trace
from twinserve.traces.request import Part, PrefixKeys, Request, answer_text
from twinserve.traces.statistics import BLOCK_SIZES, load_of, most_arrivals, shared_tokens, trace_statistics

SECOND = 10**9


def at(*times_s, length=10):
    return [Request(n, round(time * SECOND), (Part(n, 0, length),), 5) for n, time in enumerate(times_s)]


def arrivals_of(*times_s):
    return np.array([round(time * SECOND) for time in times_s], np.int64)


# --- burstiness ---


def test_even_gaps_do_not_vary():
    statistics = trace_statistics(at(*range(101)))
    assert (statistics["rate"], statistics["gap_cv"]) == (1.0, 0.0)
    assert statistics["peak_to_mean"]["1s"] == 1.0


def test_a_burst_is_so_many_times_the_mean():
    statistics = trace_statistics(at(0, 0.5, 20.1, 20.2, 20.3, 20.4, 39.9, 39.99))
    # 8 requests in 40 windows of a second, 4 of 10 seconds; most are 4 in one window.
    assert statistics["peak_to_mean"] == {"1s": 20.0, "10s": 2.0, "60s": None}
    across = trace_statistics(at(0, 0.9, 1.1, 1.2, 4))
    assert across["peak_to_mean"]["1s"] == 3.0, "3 of 5 requests within a second, of 5, wherever it begins"


def test_requests_of_one_instant_have_no_rate():
    statistics = trace_statistics(at(3, 3, 3))
    assert (statistics["rate"], statistics["gap_cv"]) == (None, None)
    assert statistics["peak_to_mean"] == {"1s": None, "10s": None, "60s": None}


def test_the_load_is_a_rate_between_arrivals_and_that_of_the_busiest_minute():
    assert load_of(arrivals_of(5, 6, 7, 9)) == (4.0, 0.75, None)
    assert load_of(arrivals_of(0, 50, 55, 100, 114)) == (114.0, 4 / 114, 3 / 60)
    assert load_of(arrivals_of(0, 60))[2] is None and load_of(arrivals_of(0, 60.5))[2] == 1 / 60
    assert load_of(arrivals_of(3, 3, 3)) == (0.0, 0.0, None)


def test_the_busiest_time_is_found_wherever_the_pieces_are_cut_in_which_it_is_looked_for(monkeypatch):
    monkeypatch.setattr("twinserve.traces.statistics._PIECE", 3)
    times_s = [0, 10, 20, 30, 40, 40.1, 40.2, 40.3, 40.4, 60, 61, 90]
    assert most_arrivals(arrivals_of(*times_s), 1) == 5
    assert most_arrivals(arrivals_of(*times_s[-3:]), 1) == 1, "its end does not count"


def test_lengths_are_told_by_their_percentiles():
    lengths = trace_statistics([at(n, length=n + 1)[0] for n in range(101)])["prompt_tokens"]
    assert lengths == {"mean": 51, "p50": 51, "p90": 91, "p95": 96, "p99": 100, "max": 101, "total": 101 * 51}


# --- reuse ---


def hits_of_a_cache(requests: list[Request], size: int) -> int:
    """Prompt tokens that a cache without end hits: block by block, served one after the other."""
    cache: set[int] = set()
    hits = 0
    for request in requests:
        keys = PrefixKeys(request.parts, answer_text(request.id))
        most = (request.prompt_tokens - 1) // size
        found = next((n for n in range(most) if keys((n + 1) * size) not in cache), most)
        hits += found * size
        computed = request.prompt_tokens + request.max_tokens - 1
        cache |= {keys(end) for end in range(size, computed + 1, size)}
    return hits


@pytest.mark.parametrize("seed", range(5))
def test_reuse_is_what_a_cache_without_end_hits(seed):
    rng = random.Random(seed)
    conversations = generate(
        seed=seed,
        num_requests=40,
        rate=5.0,
        prompt_tokens=LengthSpec(150, 1.0),
        output_tokens=LengthSpec(60, 1.0),
        num_system_prompts=3,
        system_prompt_tokens=200,
        turns=3,
        think_time_s=1.0,
    )
    # Prompts of a few texts, begun and left anywhere, whole prompts again, and the same tokens in other parts.
    for number in range(40, 80):
        parts = tuple(Part(100 + rng.randrange(3), 16 * rng.randrange(2), rng.randrange(1, 400)) for _ in range(3))
        if number % 4 == 0:
            parts = conversations[rng.randrange(number)].parts
        if number % 4 == 1:
            first, *rest = conversations[rng.randrange(number)].parts
            parts = (first._replace(length=1), Part(first.text, first.start + 1, first.length), *rest)
        conversations.append(Request(number, 10**12, parts, 1 + rng.randrange(90)))
    reuse = trace_statistics(conversations)["reuse"]
    total = sum(request.prompt_tokens for request in conversations)
    for size in BLOCK_SIZES:
        hits = hits_of_a_cache(conversations, size)
        assert reuse[str(size)] == {"hit_tokens": hits, "hit_ratio": hits / total}
    assert reuse["16"]["hit_tokens"] > reuse["256"]["hit_tokens"] > 0


def test_a_whole_prompt_again_is_hit_but_for_its_last_token():
    requests = [Request(n, n, (Part(0, 0, 64),), 1) for n in range(2)]
    assert shared_tokens(requests) == [0, 64]
    assert trace_statistics(requests)["reuse"]["16"]["hit_tokens"] == 48


def test_an_answers_last_token_was_never_computed():
    answer = Part(answer_text(0), 0, 32)
    requests = [
        Request(0, 0, (Part(0, 0, 32),), 32),
        Request(1, 1, (Part(0, 0, 32), answer, Part(1, 0, 9)), 1, after=0),
    ]
    assert shared_tokens(requests) == [0, 63]


# --- the public traces, whole ---


@pytest.mark.parametrize(
    ("name", "block", "hit_tokens", "hit_ratio"),
    [
        ("mooncake/conversation_trace.jsonl.gz", "512", 54_063_104, 0.373380),
        ("llmservingsim/sharegpt-llama-3.1-8b-300-sps10.jsonl.gz", "16", 19_520, 0.075883),
        ("weka/trace_0291.json", "64", 2_022_592, 0.897287),
        ("weka/trace_0527.json", "64", 1_378_752, 0.970325),
        ("weka/trace_0553.json", "64", 1_773_888, 0.934519),
        ("azure/AzureLLMInferenceTrace_conv.csv", "16", 0, 0.0),
    ],
)
def test_reuse_of_the_public_traces(public_traces, name, block, hit_tokens, hit_ratio):
    reuse = trace_statistics(read_trace(public_traces / name).requests)["reuse"][block]
    assert reuse == {"hit_tokens": hit_tokens, "hit_ratio": pytest.approx(hit_ratio, abs=1e-6)}


@pytest.mark.parametrize(
    ("name", "rows", "prompt", "output", "rate", "gap_cv"),
    [
        ("azure/AzureLLMInferenceTrace_conv.csv", 19_366, (1154.7, 1020, 4142), (211.1, 129, 601), 5.53014, 1.0942),
        ("vidur/splitwise_conv.csv", 19_366, (1154.7, 1020, 4142), (211.1, 129, 601), 5.53014, 1.0942),
        ("weka/trace_0291.json", 32, (70_441.2, 79_332, 100_897.2), (609.5, 269, 2929), 0.02274, 2.2873),
        ("weka/trace_0527.json", 51, (27_861.1, 27_920, 39_591), (303.4, 142, 1486), 0.08292, 0.5746),
        (
            "llmservingsim/sharegpt-llama-3.1-8b-300-sps10.jsonl.gz",
            *(300, (857.5, 731.5, 2765.2), (652.5, 632, 784.1), 10.26192, 0.9416),
        ),
    ],
)
def test_lengths_and_rates_of_the_public_traces(public_traces, name, rows, prompt, output, rate, gap_cv):
    statistics = trace_statistics(read_trace(public_traces / name).requests)
    assert statistics["requests"] == rows
    for found, expected in ((statistics["prompt_tokens"], prompt), (statistics["output_tokens"], output)):
        assert [found[key] for key in ("mean", "p50", "p99")] == pytest.approx(expected, abs=0.051)
    assert statistics["rate"] == pytest.approx(rate, abs=1e-5)
    assert statistics["gap_cv"] == pytest.approx(gap_cv, abs=1e-4)


def test_requests_of_other_salts_share_nothing():
    requests = [Request(n, n, (Part(0, 0, 1000),), 1, salt=f"tenant {n % 2}") for n in range(10)]
    assert shared_tokens(requests) == [0, 0] + [1000] * 8
    alone = [Request(n, n, (Part(0, 0, 1000),), 1, salt=str(n)) for n in range(10)]
    assert trace_statistics(alone)["reuse"]["16"] == {"hit_tokens": 0, "hit_ratio": 0.0}
