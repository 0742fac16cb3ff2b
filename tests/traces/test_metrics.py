"""One definition of each metric, held against definitions written out token by token."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from twinserve.traces.metrics import distribution, summarize, token_gaps
from twinserve.traces.record import load_record

KEYS = [
    *("world", "requests", "finished", "refused", "aborted", "shortened", "duration_s", "output_tok_s", "total_tok_s"),
    *("ttft_s", "tpot_s", "itl_s", "e2e_s", "cached_tokens", "prompt_tokens", "output_tokens", "preemptions"),
    *("steps", "events", "wall_s"),
]
NOTHING = {"mean": None, "p50": None, "p90": None, "p99": None}


def request(**values):
    """A request of 10 + 3 tokens that arrives at 1 s and has its tokens at 2, 3 and 4 s."""
    row = {"id": 0, "arrival_ns": 10**9, "first_token_ns": 2 * 10**9, "finish_ns": 4 * 10**9, "prompt_tokens": 10}
    row |= {"max_tokens": 3, "output_tokens": 3, "cached_tokens": 0, "preemptions": 0, "finish_reason": "length"}
    return row | values


def step(end_ns, *, admitted=(), rows=(), preempted=(), usual=1):
    return {
        "end_ns": end_ns,
        "count": 1,
        "admitted": [list(row) for row in admitted],
        "rows": [list(row) for row in rows],
        "preempted": list(preempted),
        "usual": usual,
    }


# --- what is counted ---


def test_the_summary_has_its_keys_in_order():
    assert list(summarize([], [])) == KEYS


def test_nothing_served_leaves_everything_undefined():
    summary = summarize([request(finish_reason="refused", first_token_ns=None, output_tokens=0)], [])
    assert [summary[key] for key in ("duration_s", "output_tok_s", "total_tok_s")] == [None, None, None]
    assert [summary[key] for key in ("ttft_s", "tpot_s", "itl_s", "e2e_s")] == [NOTHING] * 4


def test_each_request_is_counted_by_how_it_ended():
    reasons = ["stop", "length", "length", "abort", "refused", None]
    summary = summarize([request(id=i, finish_reason=reason) for i, reason in enumerate(reasons)], [])
    assert [summary[key] for key in ("requests", "finished", "aborted", "refused")] == [6, 3, 1, 1]


def test_a_length_below_the_requested_one_counts_as_shortened():
    rows = [request(max_tokens=4), request(id=1), request(id=2, max_tokens=4, finish_reason="stop")]
    assert summarize(rows, [])["shortened"] == 1


def test_ttft_counts_from_the_arrival():
    assert summarize([request()], [])["ttft_s"]["mean"] == 1.0


def test_tpot_divides_by_the_gaps_and_not_by_the_tokens():
    assert summarize([request()], [])["tpot_s"]["mean"] == 1.0


def test_tpot_leaves_out_answers_of_one_token():
    rows = [request(), request(id=1, output_tokens=1, finish_ns=2 * 10**9)]
    assert summarize(rows, [])["tpot_s"]["mean"] == 1.0


def test_throughput_counts_from_the_first_arrival_to_the_last_finish():
    rows = [request(), request(id=1, arrival_ns=0)]
    summary = summarize(rows, [])
    assert (summary["duration_s"], summary["output_tok_s"], summary["total_tok_s"]) == (4.0, 1.5, 6.5)


def test_aborted_requests_are_left_out_of_latencies_and_throughput():
    aborted = request(id=1, finish_reason="abort", first_token_ns=None, finish_ns=9 * 10**9)
    with_it, without = summarize([request(), aborted], []), summarize([request()], [])
    same = [key for key in KEYS if key not in ("requests", "aborted")]
    assert [with_it[key] for key in same] == [without[key] for key in same]


def test_a_row_of_several_steps_is_one_event():
    steps = [step(1), step(2) | {"count": 5}]
    assert [summarize([], steps)[key] for key in ("steps", "events")] == [6, 2]


# --- percentiles ---


def test_percentiles_equal_numpys_on_every_value_written_out():
    rng = random.Random(0)
    for _ in range(500):
        counts = {rng.randrange(1, 10**14): rng.randrange(1, 10) for _ in range(rng.randrange(1, 20))}
        values = [value for value, count in counts.items() for _ in range(count)]
        expected = {f"p{p}": float(np.percentile(values, p)) / 1e9 for p in (50, 90, 99)}
        assert distribution((array("q", counts), array("i", counts.values()))) == expected | {
            "mean": pytest.approx(np.mean(values) / 1e9, rel=1e-12)
        }


def test_a_value_alone_is_every_percentile():
    assert distribution(array("d", [3e9])) == {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0}


# --- gaps between tokens ---


def test_running_requests_share_the_gap_of_a_step():
    steps = [step(10, admitted=[(0, 0, 5, 1), (1, 0, 5, 1)]), step(17), step(30)]
    assert token_gaps({0: 3, 1: 3}, steps) == {7: 2, 13: 2}


def test_a_step_without_tokens_lengthens_the_gap():
    steps = [step(10, admitted=[(0, 0, 5, 1)]), step(14, rows=[(0, 0, 0)]), step(30)]
    assert token_gaps({0: 2}, steps) == {20: 1}


def test_a_step_for_prompts_alone_lengthens_the_gap_of_the_others():
    steps = [step(10, admitted=[(0, 0, 5, 1)], usual=0), step(14, admitted=[(1, 0, 5, 1)], usual=0), step(30)]
    assert token_gaps({0: 2, 1: 2}, steps) == {20: 1, 16: 1}


def test_a_last_chunk_of_one_token_samples_like_any_other():
    steps = [step(10, admitted=[(0, 0, 5, 0)]), step(20), step(33)]
    assert token_gaps({0: 2}, steps) == {13: 1}


def test_a_preemption_counts_in_the_gap_of_the_next_token():
    steps = [step(10, admitted=[(0, 0, 5, 1)]), step(20, preempted=[0]), step(50, admitted=[(0, 0, 6, 1)])]
    assert token_gaps({0: 2}, steps) == {40: 1}


def test_a_preempted_request_gets_no_token_while_it_waits():
    steps = [step(10, admitted=[(0, 0, 5, 1)]), step(20, preempted=[0]), step(30), step(50, admitted=[(0, 0, 6, 1)])]
    assert token_gaps({0: 2}, steps) == {40: 1}


def test_a_token_beyond_the_answer_does_not_count():
    steps = [step(10, admitted=[(0, 0, 5, 1), (1, 0, 5, 1)]), step(20), step(30)]
    assert token_gaps({0: 2, 1: 3}, steps) == {10: 3}


def test_requests_that_did_not_finish_do_not_count():
    steps = [step(10, admitted=[(0, 0, 5, 1), (7, 0, 5, 1)]), step(20)]
    assert token_gaps({0: 2}, steps) == {10: 1}


def test_gaps_are_undefined_where_decisions_were_not_kept():
    steps = [step(10, admitted=[(0, 0, 5, 1)]), {"end_ns": 20, "count": 1}]
    assert token_gaps({0: 2}, steps) == {}


@pytest.mark.parametrize("composition", ["mixed", "prefill-first"])
@pytest.mark.parametrize("pipeline_depth", [0, 1])
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_gaps_equal_those_between_the_tokens_that_sequences_got(record_run, composition, pipeline_depth, real, seed):
    run = record_run(
        composition=composition,
        pipeline_depth=pipeline_depth,
        real=real,
        seed=seed,
        abort_share=0.02,
        num_gpu_blocks=40,
    )
    record = load_record(run.path)
    assert run.summary["preemptions"] and run.summary["aborted"]
    answers = {row["id"]: row["output_tokens"] for row in record.requests if row["finish_reason"] in ("stop", "length")}
    expected = Counter(end - start for seq_id in answers for start, end in pairwise(run.token_ends.get(seq_id, [])))
    assert token_gaps(answers, record.steps) == expected
