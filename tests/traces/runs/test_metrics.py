"""One definition of each metric, held against definitions written out token by token."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latencies import Uneven

from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.sim.replica import simulate
from twinserve.traces.runs.metrics import (
    DraftCounts,
    RunMetrics,
    TokenGaps,
    attainment,
    distribution,
    speculation_of,
    summarize,
    summary_of,
    token_gaps,
)
from twinserve.traces.runs.record import RunRecorder, load_record, single_steps

KEYS = [
    *("world", "requests", "finished", "refused", "aborted", "shortened", "duration_s", "output_tok_s", "total_tok_s"),
    *("ttft_s", "tpot_s", "itl_s", "e2e_s", "cached_tokens", "prompt_tokens", "output_tokens", "preemptions"),
    *("device_wait_share", "steps", "events", "wall_s"),
]
NOTHING = {"mean": None, "p50": None, "p90": None, "p95": None, "p99": None}


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


def test_preemptions_before_a_prompt_was_handed_over_count_once():
    metrics = RunMetrics()
    metrics.request(request(stage="prefill", preemptions=2))
    assert summary_of(metrics.whole)["preemptions"] == 2


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


# --- the device's waits for the host ---


def timed(decided_ns, start_ns, end_ns, *, running=1, waiting=0, left=(), tokens=1):
    """A step's row as far as the device's waits need it."""
    row = {"decided_ns": decided_ns, "start_ns": start_ns, "end_ns": end_ns, "running": running, "waiting": waiting}
    return row | {"left": list(left), "tokens": tokens, "count": 1}


def waited_ns(*steps):
    """What the steps' waits come to, from their share of a duration of 4 s."""
    share = summarize([request(arrival_ns=0)], list(steps))["device_wait_share"]
    return None if share is None else round(share * 4e9)


def test_the_device_waits_from_the_end_of_a_step_to_the_start_of_the_next():
    assert waited_ns(timed(0, 5, 10), timed(11, 12, 20), timed(20, 27, 30)) == 2 + 7


def test_a_step_that_starts_as_the_one_before_ends_waits_for_nothing():
    assert waited_ns(timed(0, 5, 10), timed(6, 10, 20), timed(12, 20, 30)) == 0


def test_a_system_without_requests_is_idle_and_does_not_wait():
    assert waited_ns(timed(0, 5, 10, running=2), timed(50, 60, 70, left=[0, 1]), timed(70, 71, 80)) == 1
    assert waited_ns(timed(0, 5, 10, running=2), timed(50, 60, 70, left=[0])) == 50


def test_requests_that_wait_for_room_are_work_though_all_that_ran_has_ended():
    assert waited_ns(timed(0, 5, 10, waiting=1), timed(11, 13, 20, left=[0])) == 3


def test_what_was_decided_before_the_end_is_work_though_all_that_ran_has_ended():
    assert waited_ns(timed(0, 5, 10), timed(9, 13, 20, left=[0])) == 3
    assert waited_ns(timed(0, 5, 10), timed(10, 13, 20, left=[0])) == 3
    assert waited_ns(timed(0, 5, 10), timed(11, 13, 20, left=[0])) == 0


def test_a_step_without_tokens_is_no_work_and_breaks_no_wait():
    first, empty = timed(0, 5, 10), timed(10, 11, 12, tokens=0)
    assert waited_ns(first, empty) == 0
    assert waited_ns(first, empty, timed(12, 14, 20)) == 4
    assert waited_ns(first, empty, timed(40, 44, 50, left=[0])) == 0
    assert waited_ns(first, empty | {"left": [0], "running": 0}, timed(40, 44, 50), timed(51, 52, 60)) == 2


def test_waits_are_a_share_of_the_duration():
    steps = [timed(0, 1, 10**9), timed(10**9, 2 * 10**9, 3 * 10**9)]
    assert summarize([request(arrival_ns=0)], steps)["device_wait_share"] == 0.25
    assert summarize([request(arrival_ns=2 * 10**9)], steps)["device_wait_share"] == 0.5


def test_waits_are_undefined_without_steps_decisions_or_a_duration():
    step_alone = {"decided_ns": 0, "start_ns": 1, "end_ns": 2, "count": 1}
    assert waited_ns() is None
    assert waited_ns(timed(0, 5, 10), step_alone) is None
    assert summarize([], [timed(0, 5, 10)])["device_wait_share"] is None


def test_the_waits_of_a_fleet_are_a_share_of_the_durations_of_its_replicas():
    one, other, unused = RunMetrics(), RunMetrics(), RunMetrics()
    for part, wait_ns, finish_ns in ((one, 10**9, 4 * 10**9), (other, 3 * 10**9, 12 * 10**9)):
        part.request(request(arrival_ns=0, finish_ns=finish_ns))
        part.waits.row(timed(0, 1, 10))
        part.waits.row(timed(10, 10 + wait_ns, finish_ns))
    assert summary_of([one, other, unused])["device_wait_share"] == (1 + 3) / (4 + 12)


times = st.integers(0, 50)


@given(st.lists(st.tuples(times, times, times), min_size=2, max_size=5), times, st.booleans(), times)
def test_waits_of_steps_that_share_a_row_are_those_of_the_steps(spans, lag_ns, back_to_back, later_ns):
    """Each repetition: from the decision before to this, from the start before, and from the end of the step before."""
    row = timed(3, 5, 10) | {"decision": 0, "committed": -1, "digest": "", "count": 1 + len(spans)}
    decided, starts, periods = (list(column) for column in zip(*spans, strict=True))
    repeats = {"end_ns": periods, "start_ns": [lag_ns]}
    if not back_to_back:
        repeats |= {"decided_ns": decided, "start_ns": starts}
    row["repeats"] = repeats | {"grown": []}
    *_, last = single = list(single_steps(row))
    following = timed(last["end_ns"], last["end_ns"] + later_ns, last["end_ns"] + 60)
    assert waited_ns(row, following) == waited_ns(*single, following)


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_a_simulations_summary_is_that_of_its_rows_grouped_or_not(tmp_path, some_requests, pipeline_depth):
    """And the host's time, which steps wait for unless they were decided ahead, is in it."""
    settings, params = Settings(num_gpu_blocks=400, pipeline_depth=pipeline_depth), SamplingParams(ignore_eos=True)
    with RunRecorder(tmp_path / "run", world="sim", settings=settings.model_dump(), facts={}) as recorder:
        simulate(
            some_requests,
            settings.build_core(listener=recorder),
            Uneven(),
            announce=lambda request: recorder.expect(request, params),
        )
        summary = recorder.close()
    record = load_record(tmp_path / "run")
    grouped = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert len(grouped) == summary["events"] < len(record.steps) / 2
    assert summarize(record.requests, grouped, world="sim") == summary
    assert summarize(record.requests, record.steps, world="sim") == summary | {"events": len(record.steps)}
    busy_ns = sum(step["end_ns"] - step["start_ns"] for step in record.steps if step["tokens"])
    assert summary["device_wait_share"] <= 1 - busy_ns / 1e9 / summary["duration_s"]
    if pipeline_depth == 0:
        assert summary["device_wait_share"] > 0.9 * 700_001 * (len(record.steps) - 20) / 1e9 / summary["duration_s"]


# --- percentiles ---


def test_percentiles_equal_numpys_on_every_value_written_out():
    rng = random.Random(0)
    for _ in range(500):
        counts = {rng.randrange(1, 10**14): rng.randrange(1, 10) for _ in range(rng.randrange(1, 20))}
        values = [value for value, count in counts.items() for _ in range(count)]
        expected = {f"p{p}": float(np.percentile(values, p)) / 1e9 for p in (50, 90, 95, 99)}
        assert distribution((array("q", counts), array("i", counts.values()))) == expected | {
            "mean": pytest.approx(np.mean(values) / 1e9, rel=1e-12)
        }


def test_a_value_alone_is_every_percentile():
    assert distribution(array("d", [3e9])) == {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p95": 3.0, "p99": 3.0}


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


def test_a_token_beyond_an_answer_that_began_elsewhere_does_not_count_either():
    """Its first token came at 5 ns from another replica; the third that this one samples is discarded."""
    own = request(stage="decode", arrival_ns=0, first_token_ns=5, finish_ns=30)
    steps = [step(10, admitted=[(0, 0, 5, 1)]), step(30), step(60)]
    assert summarize([own], steps)["itl_s"]["mean"] == pytest.approx((5 + 20) / 2 / 1e9)


def test_tokens_of_a_run_come_at_once():
    """A row that kept three of its four tokens, beside one that goes on as ever."""
    run = step(30, rows=[(0, 0, 4, 1)]) | {"runs": [[0, 4, 3]]}
    steps = [step(10, admitted=[(0, 0, 5, 1), (1, 0, 5, 1)]), run, step(60)]
    assert token_gaps({0: 5, 1: 3}, steps) == {0: 2, 20: 2, 30: 2}


def test_requests_that_did_not_finish_do_not_count():
    steps = [step(10, admitted=[(0, 0, 5, 1), (7, 0, 5, 1)]), step(20)]
    assert token_gaps({0: 2}, steps) == {10: 1}


@pytest.mark.parametrize("usual", [0, 1])
def test_gaps_of_a_request_that_is_aborted_are_taken_back_and_those_of_others_stay(usual):
    """Alone, or in the group of those that sample together: both get tokens after 7, 9 and 11 ns."""
    gaps = TokenGaps()
    for seq_id in (1, 2):
        gaps.begin(seq_id, 9)
    named = [(1, 1), (2, 1)]
    for end_ns, rows in ((100, named), (107, named), (116, named), (127, named)):
        gaps.step(end_ns, bool(usual), [], rows if not usual or end_ns == 100 else [])
    assert gaps.counts() == {7: 2, 9: 2, 11: 2}
    gaps.end(1, counts=False)
    assert gaps.counts() == {7: 1, 9: 1, 11: 1}
    gaps.end(2, counts=True)
    assert gaps.counts() == {7: 1, 9: 1, 11: 1}


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


def test_a_duration_begins_with_the_first_request_though_that_never_finished():
    unfinished = request(id=1, arrival_ns=0, finish_reason="refused", first_token_ns=None, finish_ns=None)
    rows = [request(arrival_ns=3 * 10**9, first_token_ns=4 * 10**9, finish_ns=8 * 10**9), unfinished]
    assert summarize(rows, [])["duration_s"] == summarize(rows[::-1], [])["duration_s"] == 8.0


def test_a_fleets_share_of_waiting_is_of_all_durations_and_no_mean_of_shares():
    parts = [RunMetrics(), RunMetrics()]
    for part, wait_ns, finish_ns in zip(parts, (9, 0), (10, 990), strict=True):
        part.waits.total_ns, part.first_arrival_ns, part.last_finish_ns = wait_ns, 0, finish_ns
    assert summary_of(parts)["device_wait_share"] == 9 / 1000


def test_a_fleet_lasts_from_its_first_arrival_to_its_last_finish_and_counts_all_preemptions():
    one, other = RunMetrics(), RunMetrics()
    one.request(request(arrival_ns=3 * 10**9, first_token_ns=4 * 10**9, preemptions=2, cached_tokens=8))
    other.request(request(id=1, finish_ns=9 * 10**9, finish_reason="abort", preemptions=5))
    other.request(request(id=2, output_tokens=2, max_tokens=3, first_token_ns=2 * 10**9, finish_ns=5 * 10**9))
    summary = summary_of([one, other])
    assert (summary["duration_s"], summary["preemptions"], summary["shortened"]) == (4.0, 7, 1)
    assert summary["total_tok_s"] == (10 + 3 + 10 + 2) / 4, "tokens from the cache are served, too"
    assert summary["tpot_s"]["p99"] > 2.9, "two tokens have a gap"


def test_who_kept_limits_is_a_share_of_all_that_came_and_goodput_one_of_the_time():
    kept = attainment(3, 40, {"requests": 8, "rejected": 2, "duration_s": 2.0})
    assert kept == {"share": 0.3, "goodput_req_s": 1.5, "goodput_tok_s": 20.0}
    assert set(attainment(0, 0, {"requests": 0, "duration_s": 0.0}).values()) == {None}


def test_drafts_of_a_fleet_are_those_of_its_replicas_together():
    parts = [DraftCounts(), DraftCounts(), DraftCounts()]
    parts[0].add(2, 3)
    parts[1].add(2, 1)
    parts[2].add(1, 2)
    assert speculation_of(parts) == {
        "drafts": 3, "draft_tokens": 5, "accepted_tokens": 3, "wasted_tokens": 2, "acceptance_rate": 0.6,
        "acceptance_by_position": [2 / 3, 0.5], "tokens_per_step": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
def test_drafts_of_replicas_of_unequal_lengths_are_added_position_by_position(order):
    short, long = DraftCounts(), DraftCounts()
    short.add(1, 2)
    for made in (1, 2, 4):
        long.add(3, made)
    found = speculation_of([short, long][::order])
    assert found is not None
    assert (found["draft_tokens"], found["accepted_tokens"]) == (10, 5)
    assert found["acceptance_by_position"] == [3 / 4, 1 / 3, 1 / 3]
