"""FittedLatency: what is fitted is what was measured, and a latency file is read back or refused."""

import json
import random

import pytest

from twinserve.settings.errors import InputError
from twinserve.sim.fit import DRIFT_NS, FittedLatency, StepSample, choose_knots, fit, ramps
from twinserve.sim.latency import RecordedLatency, ScaledLatency, StepFeatures


def features(decodes: int, context: int, prompt: int = 0) -> StepFeatures:
    pairs = decodes * context + prompt * (prompt + 1) // 2
    rows = decodes + bool(prompt)
    return StepFeatures(0, rows, prompt, decodes, decodes * context + prompt, pairs, rows)


def true_cost(step: StepFeatures) -> tuple[float, float]:
    tokens = 3e6 * min(step.tokens, 4) + 1e6 * max(0, step.tokens - 4)
    return 2e5 + 1e4 * step.seqs, 2e7 + tokens + 80.0 * step.kv_tokens


def samples(noise: float, repeats: int = 6) -> list[StepSample]:
    rng = random.Random(0)
    shapes = [features(n, c) for n in (1, 2, 4, 8, 16) for c in (64, 512, 2048)]
    shapes += [features(n, 256, p) for n in (0, 4, 16) for p in (1, 16, 64, 256)]
    return [
        StepSample(shape, *(round(ns * rng.uniform(1 - noise, 1 + noise)) for ns in true_cost(shape)))
        for shape in shapes
        for _ in range(repeats)
    ]


def test_costs_without_noise_are_fitted_to_within_a_percent():
    model = fit(samples(0.0), {})
    for shape in (features(6, 300), features(12, 1000), features(3, 64)):
        host, device, _ = model.step_cost(shape)
        assert host == pytest.approx(true_cost(shape)[0], rel=0.01)
        assert device == pytest.approx(true_cost(shape)[1], rel=0.01)


def test_held_out_residuals_grow_with_the_noise():
    quiet, loud = (fit(samples(noise), {}).data["residuals"]["decode"]["device"] for noise in (0.0, 0.3))
    assert quiet["mean_abs"] < 0.02 < loud["mean_abs"]


def test_no_coefficient_is_negative_and_costs_never_fall_with_more_tokens():
    model = fit(samples(0.3), {})
    for regime in model.data["regimes"].values():
        for part in regime.values():
            assert all(ns >= 0 for ns in part["ns"].values())
    costs = [model.step_cost(features(n, 100))[1] for n in range(1, 40)]
    assert costs == sorted(costs)


def test_a_step_beyond_what_was_measured_is_counted_with_its_excess():
    model = fit(samples(0.0), {})
    model.watch(features(16, 64))
    assert model.num_outside == 0
    model.watch(features(48, 64))
    assert (model.num_outside, model.worst_excess) == (1, 3.0)
    model.step_cost(features(480, 64))
    assert (model.num_outside, model.worst_excess) == (1, 3.0), "asking is not making"


@pytest.mark.parametrize(("prompt", "kv_tokens"), [(0, 32_600), (24, 3000)])
def test_costs_of_repeated_steps_are_those_of_each(prompt, kv_tokens):
    each, at_once = fit(samples(0.3), {}), fit(samples(0.3), {})
    step = StepFeatures(7, 5, prompt, 4, kv_tokens, 9000, 5, arrived=2, left=1)
    host, devices = at_once.repeated_costs(step, 40, 50)
    costs = [each.step_cost(step.repeated(number, 40, 123)) for number in range(1, 51)]
    assert [(host, device, 0) for device in devices.tolist()] == costs
    for number in range(1, 51):
        each.watch(step.repeated(number, 40, 123))
    at_once.watch(step.repeated(1, 40, 0), 50)
    assert each.num_outside == at_once.num_outside > 0
    assert each.worst_excess == at_once.worst_excess > 1.0
    assert each.with_drift([0.5, 2.0]).repeated_costs(step, 40, 50) is None


def test_ramps_make_a_rising_line_through_the_knots():
    assert ramps(1, [1, 2, 4]) == [0.0, 0.0]
    assert ramps(3, [1, 2, 4]) == [1.0, 0.5]
    assert ramps(8, [1, 2, 4]) == [1.0, 3.0]
    assert choose_knots([1, 2, 3, 4, 64, 66, 68]) == [1, 2, 3, 4, 68]


def test_a_latency_file_is_read_back_as_it_was_written(tmp_path):
    model = fit(samples(0.1), {"model": "tiny"})
    model.save(tmp_path / "latency.json")
    again = FittedLatency.load(tmp_path / "latency.json")
    assert again.identity == model.identity
    assert again.step_cost(features(5, 77)) == model.step_cost(features(5, 77))
    with pytest.raises(FileExistsError):
        model.save(tmp_path / "latency.json")


def test_a_changed_coefficient_is_another_model():
    model = fit(samples(0.0), {})
    changed = json.loads(json.dumps(model.data))
    changed["regimes"]["decode"]["device"]["ns"]["constant"] += 1
    assert FittedLatency(changed).identity != model.identity


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"schema": "twinserve-latency/9"}', "schema is 'twinserve-latency/9', expected 'twinserve-latency/1'"),
        ("[1]", "schema is None"),
        ("{", "expected JSON"),
        ('{"schema": "twinserve-latency/1"}', "lacks 'regimes'"),
    ],
)
def test_a_file_that_is_no_latency_file_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "latency.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words.replace("'", ".")) as error:
        FittedLatency.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_too_few_shapes_are_refused():
    with pytest.raises(ValueError, match="1 shapes were measured for decode steps"):
        fit([StepSample(features(1, 8), 1, 1)], {})


def step_row(decided: int, start: int, end: int, *, running: int = 1, waiting: int = 0, left: tuple = ()) -> dict:
    return {
        "decided_ns": decided,
        "start_ns": start,
        "end_ns": end,
        "running": running,
        "waiting": waiting,
        "left": list(left),
    }


def test_recorded_costs_include_the_host_work_after_a_step_but_no_idling():
    latency = RecordedLatency([step_row(0, 2, 12), step_row(15, 16, 20), step_row(100, 101, 110, left=(0,))])
    costs = [latency.step_cost(StepFeatures(i, 1, 0, 1, 1, 1, 1)) for i in range(3)]
    assert costs == [(5, 10), (1, 4), (1, 9)]
    with pytest.raises(ValueError, match="step 3 was asked for"):
        latency.step_cost(StepFeatures(3, 1, 0, 1, 1, 1, 1))


def test_recorded_costs_one_step_ahead_let_the_next_decision_come_before_the_end():
    latency = RecordedLatency([step_row(0, 2, 12), step_row(3, 12, 22), step_row(13, 22, 32)])
    assert [latency.step_cost(StepFeatures(i, 1, 0, 1, 1, 1, 1)) for i in range(2)] == [(2, 10), (9, 10)]


def test_the_sum_of_what_is_fitted_is_that_of_what_was_measured_however_uneven_it_is():
    rng = random.Random(4)
    uneven = [StepSample(features(n, 50 + n % 7, 40 + n), rng.choice([14, 30]) * 10**6, 10**6) for n in range(1, 200)]
    steady = [StepSample(features(n, 64), 10**6, 10**6) for n in range(1, 9)]
    model = fit(uneven + steady, {})
    measured = sum(sample.host_ns for sample in uneven)
    assert sum(model.step_cost(sample.features).host_ns for sample in uneven) == pytest.approx(measured, rel=0.02)
    assert abs(model.data["residuals"]["prompt"]["host"]["total"]) < 0.03


def test_steps_beyond_the_captured_graphs_are_a_regime_of_their_own():
    small = [StepSample(features(n, 64, p), 2 * 10**6, 10**6, 0) for n in (1, 2, 4) for p in (0, 8, 16)]
    large = [StepSample(features(n, 64, 100), 20 * 10**6, 10**6, 15 * 10**6) for n in (1, 2, 4)]
    model = fit(small + large, {}, captured_tokens=32)
    assert model.step_cost(features(3, 64, 16))[0] == pytest.approx(2 * 10**6, rel=0.01)
    assert model.step_cost(features(3, 64, 28))[0] == pytest.approx(2 * 10**6, rel=0.01)
    host, _, lead = model.step_cost(features(3, 64, 30))
    assert (host, lead) == (pytest.approx(20 * 10**6, rel=0.01), pytest.approx(15 * 10**6, rel=0.01))
    with pytest.raises(ValueError, match="knows no steps beyond captured graphs"):
        fit(small, {}).with_captured_tokens(16)


def test_scaled_costs_are_another_models_times_a_factor():
    model = fit(samples(0.0), {})
    host, device, lead = model.step_cost(features(4, 64))
    assert ScaledLatency(model, 1.5).step_cost(features(4, 64)) == (round(1.5 * host), round(1.5 * device), lead)


def test_the_host_drifts_by_the_time_of_the_decision_and_phases_begin_elsewhere():
    model = fit(samples(0.0), {}).with_drift([1.0, 2.0, 3.0, 4.0])
    host = fit(samples(0.0), {}).step_cost(features(4, 64)).host_ns

    def levels(latency: FittedLatency) -> list[float]:
        times = [number * DRIFT_NS + 1 for number in range(5)]
        return [latency.step_cost(features(4, 64)._replace(decided_ns=ns)).host_ns / host for ns in times]

    assert levels(model) == pytest.approx([1, 2, 3, 4, 1], rel=1e-3)
    assert [levels(phase)[0] for phase in model.phases(2)] == pytest.approx([1, 3], rel=1e-3)
    assert levels(model.with_drift([])) == pytest.approx([1] * 5)
