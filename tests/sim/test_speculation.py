"""Drafts in a simulation: by a law, or as they came in a recorded run."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from latencies import Uneven

from twinserve.policies import Batch, SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.latency import StepFeatures
from twinserve.sim.replica import simulate
from twinserve.sim.speculation import (
    Acceptance,
    AcceptanceLaw,
    RecordedAcceptance,
    acceptance_of,
    fit_law,
    load_law,
    output_of,
    save_law,
)
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.runs.record import RunRecord, RunRecorder, load_record

NEVER = AcceptanceLaw((0.0,), found_share=0.0)
LAW = AcceptanceLaw((0.8, 0.6, 0.5), concentration=4.0, found_share=0.75, seed=2)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


def run(
    folder: Path, acceptance: Acceptance | None, *, step_by_step: bool = False, requests: int = 60, **values
) -> RunRecord:
    """The record of a simulation with these settings."""
    settings = Settings.load({"num_gpu_blocks": 300, "max_num_seqs": 8, "speculative_config": NGRAM} | values)
    trace = generate(
        seed=1,
        num_requests=requests,
        rate=5,
        prompt_tokens=LengthSpec.parse("lognormal:60:1.0:1:110"),
        output_tokens=LengthSpec.parse("lognormal:120:0.5:1:300"),
    )
    params = SamplingParams(ignore_eos=True)
    with RunRecorder(folder, world="sim", settings=settings.model_dump(), facts={}) as recorder:
        simulate(
            trace,
            settings.build_core(listener=recorder),
            Uneven(),
            params=params,
            announce=lambda request: recorder.expect(request, params),
            step_by_step=step_by_step,
            acceptance=acceptance,
        )
        recorder.close()
    return load_record(folder)


def test_with_drafts_every_step_is_made_by_itself(tmp_path):
    """So a simulation step by step is the same, and says as many rows."""
    records = [run(tmp_path / str(single), LAW, step_by_step=single) for single in (True, False)]
    for name in ("steps.jsonl", "requests.jsonl", "run.json"):
        assert (records[0].path / name).read_bytes() == (records[1].path / name).read_bytes()
    assert records[0].run["summary"]["events"] == records[0].run["summary"]["steps"]


@pytest.mark.parametrize("depth", [0, 1])
def test_more_drafts_that_are_right_are_fewer_steps_and_the_same_tokens(tmp_path, depth):
    config = {"speculative_config": NGRAM | {"method": "ngram_gpu"}, "pipeline_depth": depth}
    records = [run(tmp_path / str(rate), AcceptanceLaw((rate,)), **config) for rate in (0.0, 0.5, 1.0)]
    steps = [record.run["summary"]["steps"] for record in records]
    assert steps[0] > 1.15 * steps[1] and steps[1] > 1.15 * steps[2], steps
    assert len({record.run["summary"]["output_tokens"] for record in records}) == 1
    assert records[2].run["summary"]["speculation"]["acceptance_rate"] > (0.99 if depth == 0 else 0.9)


def test_shares_are_those_of_the_law_and_requests_differ_as_it_says():
    law = AcceptanceLaw((0.7, 0.5), concentration=2.0, found_share=0.4, seed=9)
    seqs = [Sequence([1] * 5, seq_id=number) for number in range(3000)]
    assert statistics.mean(law.found(seq, 5, 4) == 4 for seq in seqs) == pytest.approx(0.4, abs=0.03)
    assert {law.found(seq, 5, 4) for seq in seqs} == {0, 4}
    assert statistics.mean(law.right(seq, 5, 1) for seq in seqs) == pytest.approx(0.7, abs=0.03)
    own = []
    for seq in seqs[:400]:
        own.append(statistics.mean(law.right(seq, 5 + place, 1) for place in range(60)))
    assert statistics.pstdev(own) == pytest.approx((0.7 * 0.3 / 3.0) ** 0.5, rel=0.15), "sqrt(m (1 - m) / (a + b + 1))"
    alike = AcceptanceLaw((0.7, 0.5), seed=9)
    number = [alike.right(seq, 5, 2) for seq in seqs]
    assert statistics.mean(n >= 1 for n in number) == pytest.approx(0.7, abs=0.03)
    assert statistics.mean(n == 2 for n in number) == pytest.approx(0.35, abs=0.03)


@pytest.mark.parametrize(
    ("is_async", "found_share", "lengths"), [(False, 0.0, [4, 1, 1]), (True, 0.0, [1, 1, 1]), (True, 1.0, [4, 1, 1])]
)
def test_of_drafts_that_are_all_right_only_those_that_were_found_are(is_async, found_share, lengths):
    """A row with drafts, one without, and an admission padded with placeholders. Only decisions that run ahead give a
    row drafts before anybody knows whether they are found."""
    batch = Batch(1)
    seqs = [Sequence([1] * 9, seq_id=number) for number in range(3)]
    batch.seqs, batch.starts, batch.lengths, batch.prompts = seqs, [8, 8, 8], [4, 1, 4], [seqs[2]]
    batch.drafts, batch.num_drafts_asked = {seqs[0]: 3, seqs[2]: 3}, 2
    batch.count()
    runs = output_of(batch, AcceptanceLaw((1.0,), found_share=found_share), is_async=is_async)
    assert runs.lengths == lengths
    assert runs.proposed == (None if is_async else [2 * found_share] * 3)


def test_a_draw_belongs_to_a_seed_a_request_a_place_and_what_it_is_for():
    """So the same draft of the same answer is right whatever row it lies in, and nothing else shares its draw."""
    law = AcceptanceLaw((0.5,), found_share=0.5, seed=3)
    seqs = [Sequence([1] * 5, seq_id=number) for number in range(40)]

    def draws(law: AcceptanceLaw, seq: Sequence) -> tuple[tuple[int, ...], tuple[int, ...]]:
        found, right = zip(*((law.found(seq, place, 1), law.right(seq, place, 1)) for place in range(30)), strict=True)
        return found, right

    drawn = [draws(law, seq) for seq in seqs] + [draws(replace(law, seed=4), seq) for seq in seqs]
    assert drawn[:40] == [draws(replace(law), seq) for seq in seqs]
    assert len({one for both in drawn for one in both}) == 160, "requests, seeds and what is found or right"
    for seq, (_, right) in zip(seqs, drawn[:40], strict=True):
        for place in range(20):
            run = right[place : place + 8]
            assert law.right(seq, place, 8) == (*run, 0).index(0), "up to the first that is not"


def test_a_law_is_found_again_in_what_it_made(tmp_path):
    record = run(tmp_path / "run", AcceptanceLaw((0.8, 0.6, 0.5), 4.0, 0.75, 2), requests=300)
    fitted = fit_law(record.steps, seed=2)
    assert fitted.by_position[0] == pytest.approx(0.8, abs=0.04)
    assert fitted.found_share == pytest.approx(0.75, abs=0.03)
    assert fitted.concentration == pytest.approx(4.0, rel=0.4)
    again = run(tmp_path / "again", fitted, requests=300).run["summary"]
    for name in ("tpot_s", "e2e_s"):
        for statistic, tolerance in (("mean", 0.05), ("p99", 0.1)):
            assert again[name][statistic] == pytest.approx(record.run["summary"][name][statistic], rel=tolerance)


def test_requests_differ_in_how_much_is_found_of_them_as_the_law_says_and_it_is_found_again(tmp_path):
    law = AcceptanceLaw((0.8,), concentration=3.0, found_share=0.6, found_concentration=1.5, seed=4)
    seqs = [Sequence([1] * 5, seq_id=number) for number in range(400)]
    shares = []
    for seq in seqs:
        draws = [(law.found(seq, 5 + place, 1), law.right(seq, 5 + place, 1)) for place in range(60)]
        shares.append([statistics.mean(own) for own in zip(*draws, strict=True)])
    found, right = zip(*shares, strict=True)
    assert statistics.mean(found) == pytest.approx(0.6, abs=0.05)
    assert statistics.pstdev(found) == pytest.approx((0.6 * 0.4 / 2.5) ** 0.5, rel=0.15), (
        "sqrt(m (1 - m) / (a + b + 1))"
    )
    assert statistics.correlation(found, right) > 0.8, "of whom more is found, of him more is right"
    records = [run(tmp_path / str(seed), replace(law, seed=seed), requests=120) for seed in (4, 5)]
    one, both = fit_law(records[0].steps), fit_law(*(record.steps for record in records))
    assert both.found_share == pytest.approx(0.6, abs=0.05) and one.found_share != both.found_share
    assert both.found_concentration == pytest.approx(1.5, rel=0.4)
    again = run(tmp_path / "again", replace(both, seed=9), requests=120).run["summary"]
    alike = run(tmp_path / "alike", replace(both, seed=9, found_concentration=None), requests=120).run["summary"]
    told = statistics.mean(record.run["summary"]["tpot_s"]["p99"] for record in records)
    assert again["tpot_s"]["p99"] == pytest.approx(told, rel=0.1)
    assert alike["tpot_s"]["p99"] < 0.85 * told, "the tail is of those of whom little is found"


def test_a_run_without_differences_between_requests_has_none_in_its_law(tmp_path):
    record = run(tmp_path / "run", AcceptanceLaw((0.8,)), requests=100)
    fitted = fit_law(record.steps)
    assert fitted.concentration is None or fitted.concentration > 60
    with pytest.raises(ValueError, match="have no drafts"):
        fit_law(run(tmp_path / "none", None, speculative_config=None).steps)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_recorded_acceptance_makes_the_recorded_run_again(tmp_path, depth):
    config = {"speculative_config": NGRAM | {"method": "ngram_gpu"}, "pipeline_depth": depth}
    record = run(tmp_path / "run", LAW, **config)
    again = run(tmp_path / "again", RecordedAcceptance(record.steps, NEVER), **config)
    made = [[(row.get("drafts"), row.get("runs")) for row in one.steps] for one in (record, again)]
    assert made[0] == made[1]
    assert record.steps[-1]["digest"] == again.steps[-1]["digest"]


def test_with_other_settings_what_was_recorded_is_right_where_it_was(tmp_path):
    record = run(tmp_path / "run", LAW)
    again = run(tmp_path / "again", RecordedAcceptance(record.steps, NEVER), max_num_batched_tokens=24, max_num_seqs=4)
    one, other = (r.run["summary"]["speculation"] for r in (record, again))
    assert other["tokens_per_step"] == pytest.approx(one["tokens_per_step"], rel=0.1)


def test_the_settings_say_what_comes_of_drafts(tmp_path):
    def of(**values) -> Acceptance | None:
        return acceptance_of(Settings.load({"speculative_config": NGRAM | values}).speculative_config)

    assert acceptance_of(None) is None
    assert of(synthetic_acceptance_rate=0.6) == AcceptanceLaw((0.6,))
    save_law(LAW, tmp_path / "law.json")
    assert of(acceptance=str(tmp_path / "law.json")) == LAW == load_law(tmp_path / "law.json")
    assert isinstance(of(acceptance=str(run(tmp_path / "run", LAW).path)), RecordedAcceptance)
    with pytest.raises(InputError, match="expected one of synthetic_acceptance_rate and acceptance"):
        of()
    for values in (
        {"by_position": [1.5]},
        {"by_position": []},
        {"by_position": [0.5], "odd": 1},
        {"by_position": [0.5], "found_concentration": -1.0},
        [],
        {},
        {"by_position": [0.5], "seed": {}},
        {"by_position": [0.5], "seed": "x"},
        {"by_position": [0.5], "seed": 1.5},
    ):
        (tmp_path / "wrong.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match=r"wrong\.json: expected a law of acceptance"):
            load_law(tmp_path / "wrong.json")


def test_a_replica_with_drafts_needs_to_know_what_comes_of_them(tmp_path):
    with pytest.raises(ValueError, match="acceptance is None"):
        run(tmp_path / "run", None)


def test_a_row_with_drafts_costs_what_a_row_of_several_tokens_costs():
    batch = Batch(1)
    seqs = [Sequence([1] * 9, seq_id=number) for number in range(3)]
    batch.seqs, batch.starts, batch.lengths = seqs, [8, 20, 4], [1, 4, 5]
    batch.prompts, batch.chunks, batch.num_prompt_tokens, batch.num_tokens = [seqs[2]], [seqs[2]], 5, 10
    batch.drafts = {seqs[1]: 3}
    batch.count()
    features = StepFeatures.of(batch)
    assert (features.prompts, features.prompt_tokens, features.decode_tokens) == (((20, 4), (4, 5)), 9, 1)
    assert (features.sampled, features.longest_decode) == (2 + 3, 9)


def rows_of(*drafted: tuple[int, int, int]) -> list[dict]:
    """Steps of requests that begin in the first; then one with drafts a tuple of request, drafts and tokens made."""
    plain = {"left": [], "preempted": [], "rows": [], "admitted": [], "usual": False, "asked": 1}
    begun = sorted({request for request, *_ in drafted})
    first = plain | {"admitted": [[request, True] for request in begun]}
    return [first] + [
        plain | {"rows": [[request, True]], "drafts": [[request, number]], "runs": [[request, made, made]]}
        for request, number, made in drafted
    ]


def test_a_row_that_begins_inside_a_recorded_one_has_what_that_has_left():
    recorded = RecordedAcceptance(rows_of((0, 3, 4), (0, 3, 1)), NEVER)
    seq = Sequence([1] * 5, seq_id=0)
    at = [(recorded.found(seq, 5 + place, 3), recorded.right(seq, 5 + place, 3)) for place in range(1, 6)]
    assert at == [(3, 3), (2, 2), (1, 1), (0, 0), (3, 0)]
    assert (recorded.found(seq, 5 + 6, 3), recorded.right(seq, 5 + 6, 3)) == (0, 0), "beyond it the law says"
    assert recorded.found(seq, 5 + 1, 2) == 2, "no more than is asked for"


def test_a_law_counts_requests_alike_and_only_what_could_be_right_and_have_drafts():
    law = fit_law(rows_of(*[(0, 1, 2)] * 4, (1, 3, 1)))
    assert law.by_position == (0.5,), "all of one request's and none of the other's, whose later drafts nobody tried"
    assert law.found_share == 1.0, "the first token of an answer has no drafts behind it"
    law = fit_law(rows_of(*[(0, 2, 3)] * 3, (0, 2, 2), (0, 0, 1)))
    assert law.by_position == (1.0, 0.75)
    assert law.found_share == 0.8
