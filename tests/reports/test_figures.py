"""Figures show what the record holds, and say what they leave out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from twinserve.reports.distributions import LATENCIES, latency_figure, step_figures
from twinserve.reports.gantt import request_figure
from twinserve.reports.kv import kv_figure
from twinserve.reports.replayed import replayed
from twinserve.reports.runs import Run, runs_of
from twinserve.reports.thin import FINE_BINS, GROUPS, LINE_POINTS
from twinserve.reports.timelines import batch_figure
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.replay import Hearer


def traces(figure, y_axis="y"):
    return [trace for trace in figure.data if trace.get("yaxis", "y") == y_axis]


def longer(record, times: int):
    """The record's run, again and again."""
    span = max(row["end_ns"] for row in record.steps) + 1_000_000_000
    steps = [
        row | {name: row[name] + span * turn for name in ("decided_ns", "start_ns", "end_ns")}
        for turn in range(times)
        for row in record.steps
    ]
    times_of = ("arrival_ns", "ingested_ns", "first_scheduled_ns", "first_token_ns", "finish_ns")
    requests = [
        row | {name: row[name] + span * turn for name in times_of} | {"id": row["id"] + turn * len(record.requests)}
        for turn in range(times)
        for row in record.requests
    ]
    return replace(record, steps=steps, requests=requests)


def test_the_batch_over_time_is_that_of_the_steps(sim):
    figure = batch_figure(runs_of([sim]))
    running, waiting, tokens = (traces(figure, name)[0] for name in ("y", "y2", "y3"))
    for trace, field in ((running, "running"), (waiting, "waiting"), (tokens, "tokens")):
        assert max(trace["y"]) == max(row[field] for row in sim.steps)
        shown = set(zip(trace["x"].tolist(), trace["y"].tolist(), strict=True))
        assert shown >= {(row["start_ns"] / 1e9, row[field]) for row in sim.steps}
    assert figure.notes == []


def test_nothing_runs_once_the_last_request_has_ended(sim):
    for trace in batch_figure(runs_of([sim])).data:
        assert trace["y"][-1] == 0
        assert trace["x"][-1] == pytest.approx(max(row["end_ns"] for row in sim.steps) / 1e9)


def test_between_two_bursts_nothing_runs(sim):
    record = longer(sim, 2)
    end_s = max(row["end_ns"] for row in sim.steps) / 1e9
    (running,) = traces(batch_figure(runs_of([record])))
    in_the_gap = running["y"][(running["x"] > end_s - 1e-6) & (running["x"] < end_s + 0.99)]
    assert in_the_gap[-1] == 0 and len(in_the_gap) <= 2


def test_long_lines_are_thinned_and_keep_their_extremes(sim):
    record = longer(sim, 12)
    assert len(record.steps) > 2 * LINE_POINTS
    figure = batch_figure(runs_of([record]))
    for trace in figure.data:
        assert len(trace["x"]) <= GROUPS
    low, high, mean = traces(figure)
    assert max(high["y"]) == max(row["running"] for row in record.steps) and min(low["y"]) == 0
    assert (low["y"] <= mean["y"] + 1e-9).all() and (mean["y"] <= high["y"] + 1e-9).all()
    assert any(note.startswith("Thinned: ") and f"{GROUPS} equal stretches" in note for note in figure.notes)
    fine = {(entry["at"], entry["kind"]): entry["values"] for entry in figure.detail["bins"]}
    assert len(fine[1, "high"]) == FINE_BINS and max(fine[1, "high"]) == max(high["y"])


def again(*records) -> list[Run]:
    """The runs, decided again as a page does it."""
    return [replace(run, cached=replayed(run).cached) for run in runs_of(list(records))]


def named(figure, name: str, y_axis="y"):
    (trace,) = [trace for trace in traces(figure, y_axis) if trace["name"] == name]
    return trace


class Pool(Hearer):
    """Counts the blocks of the whole pool, decision by decision: those held, those free that are cached, and others."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def decided(self, batch):
        manager = self.core.scheduler.block_manager
        cached = sum(block_id in manager.prefix_cache for block_id in manager.free_block_ids)
        self.counts.append((len(manager.used_block_ids), cached, len(manager.free_block_ids) - cached))


@pytest.mark.parametrize("depth", [0, 1])
def test_kv_blocks_are_held_cached_or_free_as_they_lie_in_the_pool(make_record, depth):
    record, pool = make_record(pipeline_depth=depth), Pool()
    pool.hear(record)
    figure = kv_figure(again(record))
    held, cached, free = (named(figure, name) for name in ("held", "cached", "free"))
    assert held["x"].tolist() == cached["x"].tolist() and set(free["y"]) == {90}
    shown = set(zip(held["x"].tolist(), held["y"].tolist(), cached["y"].tolist(), strict=True))
    for row, (used, known, others) in zip(record.steps, pool.counts, strict=True):
        assert (used, used + known) == (row["used_blocks"], 90 - others)
        assert (row["start_ns"] / 1e9, used, used + known) in shown
    assert max(known for _, known, _ in pool.counts) > 10 and min(others for _, _, others in pool.counts) == 0
    assert max(row["used_blocks"] for row in record.steps) == max(held["y"])
    assert held["y"][-1] == 0 < cached["y"][-1] <= 90, "what is cached stays, when all have ended"
    end_s = held["x"][-1]
    shares = [
        np.sum(np.diff(trace["x"], append=end_s, prepend=0.0)[1:] * trace["y"]) / end_s / 90 for trace in (held, cached)
    ]
    said = f"{shares[0]:.1%} held, {shares[1] - shares[0]:.1%} cached, {1 - shares[1]:.1%} free"
    assert f"In the mean over time: {said}." in figure.notes[0]


def test_what_is_cached_stays_while_nothing_runs_and_serves_who_comes_then(make_record):
    """Ten requests, one after another: between two of them blocks are cached and none is held."""
    requests = [Request(i, i * 10**9, (Part(7, 0, 64), Part(i, 0, 24)), 4) for i in range(10)]
    figure = kv_figure(again(make_record(requests=requests)))
    held, cached, hits = (named(figure, name, axis) for name, axis in (("held", "y"), ("cached", "y"), ("sim", "y2")))
    quiet = [stored for used, stored in zip(held["y"], cached["y"], strict=True) if not used]
    assert quiet == [5 + number for number in range(10)], "of each a block that is full and no other's"
    assert [share for share in hits["y"] if share is not None] == [0.0, *[pytest.approx(100 * 64 / 88)] * 9]


def test_prompts_found_in_the_cache_are_those_of_the_requests_and_add_up_to_the_summary(sim):
    figure = kv_figure(again(sim))
    hits = named(figure, "sim", "y2")
    edges = np.array(hits["x"]) - hits["x"][0]
    tokens = {"cached_tokens": 0.0, "prompt_tokens": 0}
    for begin_s, share in zip(edges, hits["y"], strict=True):
        rows = [r for r in sim.requests if begin_s <= r["first_scheduled_ns"] / 1e9 < begin_s + 2 * hits["x"][0]]
        assert (share is None) == (not rows)
        if rows:
            found, asked = (sum(row[name] for row in rows) for name in tokens)
            assert share == pytest.approx(100 * found / asked)
            tokens["cached_tokens"] += share / 100 * asked
            tokens["prompt_tokens"] += asked
    summary = sim.run["summary"]
    assert tokens == {name: pytest.approx(summary[name]) for name in tokens} and summary["cached_tokens"] > 0
    assert f"first scheduled: {summary['cached_tokens'] / summary['prompt_tokens']:.1%}." in figure.notes[-1]


def test_without_a_prefix_cache_nothing_is_cached_and_nothing_is_said_of_prompts(make_record):
    figure = kv_figure(again(make_record(enable_prefix_caching=False)))
    assert named(figure, "held")["y"].tolist() == named(figure, "cached")["y"].tolist()
    assert not any("cached (%)" in axis["title"]["text"] for name, axis in figure.layout.items() if "yaxis" in name)


def test_of_a_record_that_is_not_decided_again_the_held_blocks_are_shown_and_the_rest_is_said_to_be_unknown(sim):
    steps = [row | {"digest": "0" * 16} if row["decision"] == 7 else row for row in sim.steps]
    figure = kv_figure(again(replace(sim, steps=steps)))
    most = max(row["used_blocks"] for row in sim.steps)
    assert max(named(figure, "held")["y"]) == most and {trace["name"] for trace in traces(figure)} == {
        "held",
        "free or cached",
    }
    assert f"{most} of 90 ({most / 90:.0%})" in figure.notes[0] and "mean over time" not in figure.notes[0]
    assert "Which free blocks were cached is not known, as it is not decided again exactly: sim." in figure.notes


def test_several_runs_have_their_blocks_in_one_panel_and_in_one_each(sim, real):
    figure = kv_figure(again(sim, real))
    assert [trace["name"] for trace in traces(figure)] == ["real", "sim"]
    for axis, record, label in (("y2", real, "real"), ("y3", sim, "sim")):
        held = named(figure, f"{label} held", axis)
        assert max(held["y"]) == max(row["used_blocks"] for row in record.steps)


def test_every_preemption_is_marked(sim):
    (marks,) = traces(kv_figure(runs_of([sim])), "y3")
    assert sum(marks["customdata"]) == sim.run["summary"]["preemptions"]


def test_marks_of_many_preemptions_are_merged_and_none_is_lost(sim):
    steps = [row | {"preempted": [0, 1]} for row in longer(sim, 12).steps]
    figure = kv_figure(runs_of([replace(sim, steps=steps)]))
    (marks,) = traces(figure, "y3")
    assert len(marks["x"]) <= LINE_POINTS
    assert sum(marks["customdata"]) == 2 * len(steps)
    assert any("share a mark" in note for note in figure.notes)


def test_a_pool_without_end_has_no_shares(make_record):
    figure = kv_figure(runs_of([make_record(num_gpu_blocks=None)]))
    assert "a pool without end" in figure.notes[0]
    assert "ticktext" not in figure.layout["yaxis"]


@pytest.mark.parametrize("metric", LATENCIES)
def test_a_distribution_has_the_summarys_median_and_extremes(real, sim, metric):
    runs = runs_of([sim, real])
    figure = latency_figure(runs, metric)
    scale = 1e3 if "(ms" in figure.layout["xaxis"]["title"]["text"] else 1.0
    for run, trace in zip(runs, figure.data, strict=True):
        x, y = trace["x"] / scale, trace["y"]
        assert (y[0], y[-1]) == (0, 100)
        assert np.interp(50, y, x) == pytest.approx(run.summary[metric]["p50"], rel=0.05)
        assert (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()


def test_steps_with_prompt_tokens_are_apart_from_those_that_only_decode(sim):
    prompt, decode = step_figures(runs_of([sim]))
    of_prompts = [row for row in sim.steps if row["prompt_tokens"]]
    assert len(prompt.data[0]["x"]) == len(of_prompts)
    assert len(decode.data[0]["x"]) == sum(row["tokens"] > 0 for row in sim.steps) - len(of_prompts)
    assert max(prompt.data[0]["y"]) == max(row["end_ns"] - row["start_ns"] for row in of_prompts) / 1e6


def test_bars_of_a_request_add_up_to_its_end_to_end_latency(make_record):
    record = make_record(num_requests=20)
    figure = request_figure(runs_of([record]), 0)
    bars = [trace for trace in figure.data if trace["type"] == "bar"]
    assert [trace["name"] for trace in bars] == ["queued", "prefill", "decode"]
    for place, row in enumerate(record.requests):
        total = sum(trace["x"][place] for trace in bars)
        assert total == pytest.approx((row["finish_ns"] - row["arrival_ns"]) / 1e9)
    assert figure.notes == []


def test_too_many_requests_are_left_out_and_counted_around_the_longest_wait(sim, real):
    figure = request_figure(runs_of([sim, real]), 0)
    longest = max(real.requests, key=lambda row: row["first_token_ns"] - row["arrival_ns"])
    assert str(longest["id"]) in figure.layout["yaxis"]["ticktext"]
    assert len(figure.layout["yaxis"]["ticktext"]) == 30
    assert "30 of 80 served requests" in figure.notes[0] and f"request {longest['id']}," in figure.notes[0]
    assert figure.notes[1] == "50 requests left out."


def test_a_request_that_ended_early_has_the_phases_it_reached(make_record):
    record = make_record(num_requests=3)
    cut = record.requests[0] | {"first_token_ns": None, "finish_reason": "abort"}
    waiting = record.requests[1] | {"first_scheduled_ns": None, "first_token_ns": None, "finish_reason": "abort"}
    figure = request_figure(runs_of([replace(record, requests=[cut, waiting, record.requests[2]])]), 0)
    queued, prefill, decode = figure.data[:3]
    assert prefill["base"][0] + prefill["x"][0] == pytest.approx(cut["finish_ns"] / 1e9)
    assert (len(queued["x"]), len(prefill["x"]), len(decode["x"])) == (2, 2, 1)
    assert figure.notes == ["1 request left out."]


def test_steps_without_decisions_are_not_drawn_and_that_is_said(sim, real):
    bare = replace(sim, steps=[{key: row[key] for key in ("start_ns", "end_ns", "count")} for row in sim.steps])
    assert batch_figure(runs_of([bare])) is None
    assert kv_figure(runs_of([bare])) is None
    assert step_figures(runs_of([bare])) == []
    assert latency_figure(runs_of([bare]), "itl_s") is None
    assert "Not drawn, because its record keeps no decisions: sim." in batch_figure(runs_of([bare, real])).notes


def test_requests_are_drawn_as_they_came_in_in_whatever_order_replicas_had_them(sim):
    """Those of a replica that died come to another much later."""
    whole, shuffled = (
        request_figure(runs_of([replace(sim, requests=rows)]), 0) for rows in (sim.requests, sim.requests[::-1])
    )
    assert whole.json() == shuffled.json()
    assert whole.notes == shuffled.notes and len(whole.notes) == 2, "not all are drawn"
