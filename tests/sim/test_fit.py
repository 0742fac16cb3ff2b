"""FittedLatency: what is fitted is what was measured, and a latency file is read back or refused."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import twinserve.sim.fit as fits
from twinserve.settings.errors import InputError
from twinserve.sim.devices import DEVICES
from twinserve.sim.fit import (
    DRIFT_NS,
    FIRST_SCHEMA,
    FOLDS,
    WATCHED,
    WAVE_SHARE,
    FittedLatency,
    StepSample,
    choose_knots,
    fit,
    floor_of,
    prompt_wave,
    ramps,
)
from twinserve.sim.kernels import Kernels
from twinserve.sim.latency import RecordedLatency, ScaledLatency, StepCost, StepFeatures
from twinserve.sim.model_configs import SHAPES
from twinserve.sim.roofline import RooflineLatency
from twinserve.worlds.run import shipped_latencies


def features(decodes: int, context: int, prompt: int = 0) -> StepFeatures:
    pairs = decodes * context + prompt * (prompt + 1) // 2
    rows = decodes + bool(prompt)
    longest, prompts = context if decodes else 0, ((0, prompt),) if prompt else ()
    kv_tokens = decodes * context + prompt
    return StepFeatures(0, rows, prompt, decodes, kv_tokens, pairs, rows, longest_decode=longest, prompts=prompts)


ABOUT = {
    "model": "made up",
    "shape": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_layers": 36,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "windowed_layers": [],
    },
    "device": "NVIDIA H100 80GB HBM3",
    "dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
    "quantization": "none",
}
CUT = Kernels(
    decodes=(1, 2, 4, 8, 16, 64),
    prompt_tokens=(16, 64, 256),
    decodes_beside=(0, 16, 64),
    prompts=4,
    decode_cuts=((1, 8, 128, 128), (8, 1, 128, 128)),
)


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


MONOTONE = fit(samples(0.3), {}, kernels=CUT)
FLOORED = fit([StepSample(sample.features, 1000, 1000) for sample in samples(0.0)], ABOUT)


def test_costs_without_noise_are_fitted_to_within_a_percent():
    model = fit(samples(0.0), {})
    for shape in (features(6, 300), features(12, 1000), features(3, 64)):
        host, device, _ = model.step_cost(shape)[:3]
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
    model.watch(features(32, 64))
    assert (model.num_outside, model.worst_excess) == (2, 3.0), "the worst of all, not the latest"


def test_errors_are_relative_to_the_whole_of_a_cost_what_is_fixed_of_it_included():
    rows, means, fixed = np.ones((2, 1)), np.array([110.0, 10_000.0]), np.array([0.0, 9_900.0])
    (found,) = fits.least_squares(rows, means, np.ones(2), fixed)
    assert found == pytest.approx(110, abs=0.1), "a hundredth of the second cost is less than an eleventh of the first"


def test_a_context_is_cut_as_the_padded_rows_say_and_not_those_that_there_are():
    kernels = Kernels(decodes=(2, 8), decode_cuts=((1, 4, 64, 16), (8, 1, 64, 16)))
    step = StepFeatures(0, 3, 0, 3, 3 * 640, 3 * 640, 3, longest_decode=640)
    found = dict(zip(fits.GROWN, fits.grown(step, kernels, 0.0), strict=True))
    assert found["decode_span_block"] == kernels.blocks(8, 640) == 4 * kernels.blocks(3, 640)


@pytest.mark.parametrize(
    ("prompts", "kv_tokens"), [((), 32_600), (((96, 24),), 3000), (((500, 10), (480, 14), (0, 3)), 3000)]
)
def test_costs_of_repeated_steps_are_those_of_each(prompts, kv_tokens):
    each, at_once = fit(samples(0.3), {}, kernels=CUT), fit(samples(0.3), {}, kernels=CUT)
    prompt = sum(length for _, length in prompts)
    step = StepFeatures(7, 5, prompt, 4, kv_tokens, 9000, 5, 2, 1, longest_decode=2040, prompts=prompts)
    host, devices = at_once.repeated_costs(step, 50)
    costs = [each.step_cost(step.repeated(number, 123)) for number in range(1, 51)]
    assert [StepCost(host, device) for device in devices.tolist()] == costs
    for number in range(1, 51):
        each.watch(step.repeated(number, 123))
    at_once.watch(step.repeated(1, 0), 50)
    assert each.num_outside == at_once.num_outside > 0
    assert each.worst_excess == at_once.worst_excess > 1.0
    assert each.with_drift([0.5, 2.0]).repeated_costs(step, 50) is None


def test_every_feature_that_costs_is_watched_pairs_among_them():
    model = fit(samples(0.0), {})
    model.watch(features(4, 256, 256))
    assert model.num_outside == 0
    far = features(0, 0, 256)._replace(attention_pairs=256 * 20_000, prompts=((20_000, 256),), kv_tokens=2048)
    model.watch(far)
    assert (model.num_outside, model.worst_excess) == (1, 256 * 20_000 / (256 * 257 // 2 + 16 * 256))
    assert set(model.data["range"]["prompt"]) == set(WATCHED)


@given(
    decodes=st.integers(0, 40),
    context=st.integers(1, 6000),
    prompts=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 700)), max_size=5),
    more=st.sampled_from(["decode", "longer", "prompt", "longer prompt", "deeper prompt"]),
)
def test_a_step_that_does_more_costs_no_less(decodes, context, prompts, more):
    def step(decodes: int, context: int, prompts: list[tuple[int, int]]) -> StepFeatures:
        tokens = sum(length for _, length in prompts)
        pairs = decodes * context + sum(n * s + n * (n + 1) // 2 for s, n in prompts)
        kv_tokens = decodes * context + sum(map(sum, prompts))
        rows = decodes + len(prompts)
        return StepFeatures(
            0, rows, tokens, decodes, kv_tokens, pairs, rows,
            longest_decode=context if decodes else 0, prompts=tuple(prompts),
        )  # fmt: skip

    first = prompts[0] if prompts else (0, 1)
    larger = {
        "decode": step(decodes + 1, context, prompts),
        "longer": step(decodes, context + 7, prompts),
        "prompt": step(decodes, context, [*prompts, first]),
        "longer prompt": step(decodes, context, [(first[0], first[1] + 1), *prompts[1:]]),
        "deeper prompt": step(decodes, context, [(first[0] + 5, first[1]), *prompts[1:]]),
    }[more]
    smaller = step(decodes, context, prompts)
    if decodes or prompts:
        for model in (MONOTONE, FLOORED):
            costs = [model.step_cost(features) for features in (smaller, larger)]
            assert costs[0].device_ns <= costs[1].device_ns and costs[0].host_ns <= costs[1].host_ns


def test_no_step_takes_less_than_its_arithmetic_and_its_bytes_at_the_devices_peaks():
    fast = [StepSample(sample.features, 1000, 1000) for sample in samples(0.0)]
    model, unknown = fit(fast, ABOUT), fit(fast, ABOUT | {"device": "a card of nobody"})
    for deep in (features(16, 40_000), features(0, 0, 20_000)):
        least = RooflineLatency(SHAPES["qwen3-8b"], DEVICES["h100"].at_peak)
        assert model.step_cost(deep).device_ns == least.step_cost(deep)[1] > unknown.step_cost(deep).device_ns
    step = features(2, 3000)
    assert model.repeated_costs(step, 9)[1].tolist() == [
        model.step_cost(step.repeated(number, 0)).device_ns for number in range(1, 10)
    ]


def test_the_least_of_a_step_is_that_of_as_many_devices_as_it_was_measured_on():
    assert floor_of(ABOUT).tensor_parallel == 1
    two = floor_of(ABOUT | {"tensor_parallel_size": 2, "device": "2 x NVIDIA H100"})
    assert two.tensor_parallel == 2 and two.device.name == "H100"
    deep = features(16, 40_000)
    assert floor_of(ABOUT).step_cost(deep)[1] / 2 < two.step_cost(deep)[1] < floor_of(ABOUT).step_cost(deep)[1]
    assert prompt_wave(ABOUT | {"tensor_parallel_size": 2}) == 2 * prompt_wave(ABOUT)
    counts = [fit(samples(0.0), about).num_devices for about in ({}, {"tensor_parallel_size": 2})]
    assert counts == [1, 2]


@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"kv_cache_dtype": "fp8"}, {"quantization": "int8"}])
def test_nothing_is_known_of_the_least_where_numbers_have_other_sizes(other):
    assert floor_of(ABOUT | other) is None


def test_what_is_read_again_and_what_comes_from_the_pool_cost_together_no_less_than_the_memory():
    """Where a token seems to cost half of its reading, and from the pool too little more, the pool's is the rest."""
    least = SHAPES["qwen3-8b"].kv_bytes_per_token() / (DEVICES["h100"].bandwidth / 1e9)
    few = [
        StepSample(
            step._replace(shared_tokens=shared), 1000, 10**5 + round(least * (0.9 * n * context - 0.4 * shared))
        )
        for n in (2, 4, 8) for context in (512, 4096) for p in (0, 16) for shared in (0, context, n * context * 3 // 4)
        for step in [features(n, context, p)]
    ]  # fmt: skip
    for data in fit(few, ABOUT).data["regimes"].values():
        ns = data["device"]["ns"]
        assert ns["decode_kv_token"] > 0.1 * least
        assert ns["decode_kv_token"] + ns["decode_pool_token"] == pytest.approx(least, rel=1e-5)


def test_what_is_read_from_the_pool_is_never_cheaper_than_the_devices_memory():
    """Where what was measured cost the same whatever the contexts, longer ones still cost what their bytes take."""
    few = [
        StepSample(features(n, context, p), 1000, 10**7)
        for n in (1, 2, 3, 4) for context in (64, 128) for p in (0, 16)
    ]  # fmt: skip
    model, unknown = fit(few, ABOUT), fit(few, ABOUT | {"device": "a card of nobody"})
    kv_token_ns = SHAPES["qwen3-8b"].kv_bytes_per_token() / (DEVICES["h100"].bandwidth / 1e9)
    shape, deep = features(3, 64), features(3, 9000)
    for fitted, least in ((model, kv_token_ns), (unknown, 0.0)):
        for data in fitted.data["regimes"].values():
            ns = data["device"]["ns"]
            assert ns["decode_kv_token"] + ns["decode_pool_token"] == pytest.approx(least, rel=1e-5)
        assert fitted.step_cost(shape).device_ns == pytest.approx(10**7, rel=0.01)
    assert model.step_cost(deep).device_ns - model.step_cost(shape).device_ns >= 0.99 * 3 * 8936 * kv_token_ns


def test_tiles_of_prompts_that_attend_at_once_take_as_long_as_the_longest_of_them():
    """On the device of ABOUT so many tiles of each KV head run at once: up to those, more of them cost nothing more."""
    wave = WAVE_SHARE * DEVICES["h100"].multiprocessors / ABOUT["shape"]["num_kv_heads"]
    few = [features(0, 0, 64)._replace(prompts=((start, 64),) * n) for n in (1, 2, 40) for start in (0, 1024, 4096)]
    few = [f._replace(seqs=len(f.prompts), prompt_tokens=64 * len(f.prompts)) for f in few]
    decodes = [features(n, 64) for n in (1, 2)]
    measured = [
        StepSample(f, 1000, 5 * 10**7 + round(1000 * max(Kernels().tiles(f.prompts)[1], wave * f.longest_prompt)))
        for f in (*few, *decodes)
    ]  # fmt: skip
    model = fit(measured, ABOUT)
    assert model.data["prompt_wave"] == wave == 8.25
    assert "prompt_wave" not in fit(measured, ABOUT | {"device": "a card of nobody"}).data
    for sample in measured:
        assert model.step_cost(sample.features).device_ns == pytest.approx(sample.device_ns, rel=0.03)


def test_a_captured_step_costs_what_its_padding_does():
    model = fit(samples(0.0), {}, kernels=CUT)
    for decodes, prompt in ((5, 0), (5, 20)):
        least, most = (features(n, 100, prompt)._replace(kv_tokens=900, longest_decode=100) for n in (decodes, 8))
        assert model.step_cost(least).device_ns == model.step_cost(most).device_ns
    assert CUT.padded(5, 20, 1, 6) == (16, 80, 20)
    assert CUT.padded(5, 300, 1, 6) == (16, 305, 20), "beyond the captured sizes nothing is padded"


def test_decode_attention_is_cut_by_the_rows_and_read_in_blocks():
    assert [CUT.blocks(rows, 2000) for rows in (4, 8)] == [2, 16]
    assert CUT.blocks(4, 20) == 1
    assert [CUT.cut_tokens(2, 2, kv) for kv in (1000, 2048, 4000)] == [1000, 2048, 2048]
    assert CUT.cut_tokens(8, 8, 4000) == 0, "a context is one span"
    assert CUT.tiles([(0, 100), (1000, 64), (7, 1)]) == (4, 64 + 100 + 1064 + 8)


def test_the_first_schemas_files_cost_what_they_did():
    old = {
        "constant": 1e6, "kv_token": 30.0, "attention_pair": 2.0, "seq": 100.0, "sampled": 10.0, "tokens_to_9": 800.0
    }  # fmt: skip
    part = {"device": {"knots": [1, 9], "ns": old}, "host": {"knots": [1, 9], "ns": {"constant": 5.0, "seq": 3.0}}}
    data = {"schema": FIRST_SCHEMA, "about": {}, "regimes": {"decode": part, "prompt": part}, "range": {}}
    decode, prompt = features(5, 100), features(4, 100, 5)
    model = FittedLatency(data)
    assert model.step_cost(decode)[:3] == (20, 1_000_000 + 500 * 30 + 500 + 50 + 400, 0)
    assert model.step_cost(prompt)[:3] == (20, 1_000_000 + 405 * 30 + 415 * 2 + 500 + 50 + 800, 0)


def test_ramps_make_a_rising_line_through_the_knots():
    assert ramps(1, [1, 2, 4]) == [0.0, 0.0]
    assert ramps(3, [1, 2, 4]) == [1.0, 0.5]
    assert ramps(8, [1, 2, 4]) == [1.0, 3.0]
    assert choose_knots([1, 2, 3, 4, 64, 66, 68]) == [1, 2, 3, 4, 68]


def test_a_latency_file_is_read_back_as_it_was_written(tmp_path):
    model = fit(samples(0.1), {"model": "tiny", "device": "none"})
    model.save(tmp_path / "latency.json")
    again = FittedLatency.load(tmp_path / "latency.json")
    assert again.identity == model.identity
    assert again.step_cost(features(5, 77)) == model.step_cost(features(5, 77))
    with pytest.raises(InputError, match="exists already"):
        model.save(tmp_path / "latency.json")


def test_a_changed_coefficient_is_another_model():
    model = fit(samples(0.0), {})
    changed = json.loads(json.dumps(model.data))
    changed["regimes"]["decode"]["device"]["ns"]["constant"] += 1
    assert FittedLatency(changed).identity != model.identity


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"schema": "twinserve-latency/9"}',
            "schema is 'twinserve-latency/9', expected 'twinserve-latency/2' or 'twinserve-latency/1'",
        ),
        ("[1]", "schema is None"),
        ("{", "expected JSON"),
        ('{"schema": "twinserve-latency/1"}', "about is missing"),
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
    host, _, lead = model.step_cost(features(3, 64, 30))[:3]
    assert (host, lead) == (pytest.approx(20 * 10**6, rel=0.01), pytest.approx(15 * 10**6, rel=0.01))
    with pytest.raises(ValueError, match="knows no steps beyond captured graphs"):
        fit(small, {}).with_captured_tokens(16)


def test_scaled_costs_are_another_models_times_a_factor():
    model = fit(samples(0.0), {})
    host, device, lead = model.step_cost(features(4, 64))[:3]
    assert ScaledLatency(model, 1.5).step_cost(features(4, 64))[:3] == (round(1.5 * host), round(1.5 * device), lead)


def test_the_host_drifts_by_the_time_of_the_decision_and_phases_begin_elsewhere():
    model = fit(samples(0.0), {}).with_drift([1.0, 2.0, 3.0, 4.0])
    host = fit(samples(0.0), {}).step_cost(features(4, 64)).host_ns

    def levels(latency: FittedLatency) -> list[float]:
        times = [number * DRIFT_NS + 1 for number in range(5)]
        return [latency.step_cost(features(4, 64)._replace(decided_ns=ns)).host_ns / host for ns in times]

    assert levels(model) == pytest.approx([1, 2, 3, 4, 1], rel=1e-3)
    assert [levels(phase)[0] for phase in model.phases(2)] == pytest.approx([1, 3], rel=1e-3)
    assert levels(model.with_drift([])) == pytest.approx([1] * 5)


def test_a_slow_host_is_slow_in_its_lead_too():
    large = [StepSample(features(n, 64, 100), 20 * 10**6, 10**6, 15 * 10**6) for n in (1, 2, 4)]
    small = [StepSample(features(n, 64, p), 2 * 10**6, 10**6, 0) for n in (1, 2, 4) for p in (0, 8, 16)]
    even = fit(small + large, {}, captured_tokens=32)
    slow, plain = (model.step_cost(features(3, 64, 30)) for model in (even.with_drift([2.0]), even))
    assert plain.lead_ns > 0 and slow == plain._replace(host_ns=2 * plain.host_ns, lead_ns=2 * plain.lead_ns)


def test_residuals_are_those_of_shapes_that_the_fit_has_not_seen(monkeypatch):
    """The fits behind the residuals, of the host and of the device, each leave some shapes out, and each shape once."""
    solved: list[set[tuple[float, ...]]] = []
    least_squares = fits.least_squares

    def watched_solve(rows, means, counts, fixed=0.0):
        solved.append(set(map(tuple, means[:, None].round(3).tolist())))
        return least_squares(rows, means, counts, fixed)

    monkeypatch.setattr(fits, "least_squares", watched_solve)
    noisy = samples(0.1)
    fit(noisy, {}, holds_out=False)
    whole, solved[:] = list(solved), []
    fit(noisy, {})
    kept = [shapes for shapes in solved if shapes not in whole]
    held_out = [(every, every - shapes) for shapes in kept for every in whole if shapes < every]
    assert len(kept) == len(held_out) == len(whole) * FOLDS
    for every in whole:
        folds = [left_out for of, left_out in held_out if of == every]
        assert len(folds) == FOLDS and all(folds)
        assert sum(map(len, folds)) == len(set.union(*folds)) == len(every)


JUNK = (None, True, -1, "x", "1", [], [1], {}, float("inf"), -5e9, 1e300, [[]], ["a"], "\0")


@pytest.mark.parametrize(
    ("place", "values"),
    [
        (("drift",), [["a"], "x", [-1.0], [0], [1e308], 3, [None]]),
        (("about",), [[], "text", {}, {"model": "m"}, {"model": 1, "device": "d"}]),
        (("about", "tensor_parallel_size"), [0, -1, 1.5, "two", None]),
        (("regimes", "decode", "device", "ns", "constant"), JUNK),
        (("regimes", "decode", "device", "knots"), [["\0"], [-1], [None], [1.5], [2**64], 3, None]),
        (("regimes", "prompt", "host"), JUNK),
        (("regimes", "decode"), JUNK),
        (("range", "decode"), [1, "", None, []]),
        (("range", "decode", "seqs"), [1, [1], [1, 2, 3], ["a", "b"], [-1, 4], None]),
        (("captured_tokens",), ["x", -1, 1.5, []]),
        (("kernels",), [3, [], {"decodes": 5, "unknown": 1}]),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) and value and isinstance(value[0], str) else "values",
)
def test_what_a_latency_file_says_is_of_the_right_kind_and_unit(tmp_path, place, values):
    model = fit(samples(0.0), ABOUT)
    for value in values:
        data = json.loads(json.dumps(model.data))
        inner = data
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
        path = tmp_path / "latency.json"
        path.write_text(json.dumps(data))
        with pytest.raises(InputError) as error:
            FittedLatency.load(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value), value


@pytest.mark.parametrize("content", ["[" * 100_000, '{"schema": ' + "1" * 5000 + "}", "\0", "[1]"])
def test_nesting_and_digits_beyond_measure_are_one_line(tmp_path, content):
    (tmp_path / "latency.json").write_text(content)
    with pytest.raises(InputError, match=r"latency.json.*expected"):
        FittedLatency.load(tmp_path / "latency.json")


@pytest.mark.parametrize("name", shipped_latencies())
def test_files_that_ship_are_what_a_latency_file_should_be(name):
    assert FittedLatency.load(shipped_latencies()[name]).identity


def test_a_token_of_a_prompt_and_a_token_beyond_the_largest_graph_decide_the_regime():
    assert fits.regime_of(features(3, 50, prompt=1), 4) == "prompt"
    assert fits.regime_of(features(4, 50), 4) == "decode"
    assert fits.regime_of(features(4, 50, prompt=1), 4) == fits.regime_of(features(5, 50), 4) == "eager"
    assert fits.regime_of(features(5, 50)) == "decode"


@pytest.fixture(scope="module")
def of_one_line() -> FittedLatency:
    """The device takes a millisecond and 100 us a token that is computed, padding included."""
    sizes = Kernels(decodes=(4, 8, 16), decodes_beside=(0, 8, 16), prompt_tokens=(32, 128))
    samples = []
    for rows in (1, 4, 6, 8, 12, 16):
        for step in (features(rows, 100), features(rows, 100, prompt=20)):
            _, tokens, _ = sizes.padded(rows, step.prompt_tokens, len(step.prompts), 0)
            samples.append(StepSample(step, 100_000, 1_000_000 + 100_000 * tokens, 50_000))
    return fit(samples, {"model": "made up", "device": "no device"}, kernels=sizes, holds_out=False)


def test_other_limits_are_other_sizes_of_steps(of_one_line):
    assert of_one_line.at(16, 128) is of_one_line
    few = of_one_line.at(6, 128)
    assert few.kernels == of_one_line.kernels.at(6, 128) != of_one_line.kernels
    assert few.data["kernels"] == few.kernels.as_dict() and few.identity != of_one_line.identity


def test_steps_that_begin_while_they_are_launched_are_not_told_at_once(of_one_line):
    step = features(4, 100)
    assert of_one_line.step_cost(step).lead_ns > 0 and of_one_line.repeated_costs(step, 5) is None


def test_a_shape_counts_as_often_as_it_was_measured():
    rows, means = np.ones((2, 1)), np.array([100.0, 200.0])
    for counts, expected in (((1, 1), 150), ((3, 1), 125), ((1, 3), 175)):
        assert fits.least_squares(rows, means, np.array(counts)) == pytest.approx([expected])


def test_errors_have_a_sign_where_it_matters():
    measured = np.array([100.0, 100.0, 200.0, 100.0])
    found = fits._errors((np.array([90.0, 120.0, 180.0, 100.0]), measured))
    assert found == {"mean_abs": 0.1, "p90_abs": pytest.approx(0.17), "bias": 0.0, "total": pytest.approx(-0.02)}
    assert fits._errors((measured * 0.9, measured)) == dict.fromkeys(("mean_abs", "p90_abs"), 0.1) | dict.fromkeys(
        ("bias", "total"), -0.1
    )


def test_what_another_row_has_just_read_is_not_read_from_the_pool_again():
    alone, shared = features(4, 1000), features(4, 1000)._replace(shared_tokens=1500)
    place = fits.GROWN.index("decode_pool_token")
    values = [fits.grown(step, Kernels(), 0.0) for step in (alone, shared)]
    assert [value[place] for value in values] == [4000, 2500]
    assert values[0][:place] == values[1][:place] and values[0][place + 1 :] == values[1][place + 1 :]


def drafting(rows: int, drafts: int, asked: int, context: int = 200, prompt: int = 0) -> StepFeatures:
    """A step of so many rows with so many drafts each, and a prompt of so many tokens, behind which drafts are asked
    for."""
    prompts = ((context - 1, 1 + drafts),) * rows + (((0, prompt),) if prompt else ())
    tokens = rows * (1 + drafts) + prompt
    ends = rows * (context + drafts) + prompt
    pairs = sum(length * start + length * (length + 1) // 2 for start, length in prompts)
    count = rows + bool(prompt)
    verified = {"verifying": rows if drafts else 0, "drafts": rows * drafts}
    proposed = {"asked": asked, "drafting": count if asked else 0, "drafting_tokens": ends if asked else 0}
    return StepFeatures(
        0, count, tokens, 0, ends, pairs, rows * (1 + drafts) + bool(prompt), prompts=prompts, **verified, **proposed
    )


def drafted_cost(step: StepFeatures) -> tuple[float, float]:
    passes = 3e5 * step.asked + 2e4 * step.drafting + 1e4 * step.asked * step.drafting if step.drafting else 0.0
    return 1e5, 9e6 + 1e5 * step.tokens + 5e4 * step.verifying + passes


DRAFTED = [
    StepSample(step, *(round(ns) for ns in drafted_cost(step)))
    for rows in (1, 2, 4, 9, 16)
    for drafts in (0, 2, 5)
    for asked in (0, 2, 5)
    for prompt in (0, 40)
    for step in [drafting(rows, drafts, asked, prompt=prompt)]
]


@pytest.mark.parametrize("kernels", [Kernels(), Kernels(single=6), Kernels(single=6, waits=True)])
def test_what_verifying_and_drafting_cost_is_found_again_with_other_numbers_of_them(kernels):
    seen = [replace(one, features=one.features.attended(kernels.single)) for one in DRAFTED]
    model = fit(seen, {}, kernels=kernels)
    for step in (drafting(3, 4, 3), drafting(12, 1, 4), drafting(6, 5, 5, prompt=40), drafting(8, 0, 3)):
        host, device, lead = model.step_cost(step)[:3]
        assert device == pytest.approx(drafted_cost(step)[1], rel=0.01)
        assert host == pytest.approx(1e5 + kernels.waits * device, rel=0.01) and lead == kernels.waits * device


def test_rows_with_drafts_alone_stand_for_steps_that_nobody_saw(tmp_path):
    """On an engine that attends to them as to prompts; and where there are no drafts, that is refused as ever."""
    seen = [one for one in DRAFTED if one.features.verifying]
    model = fit(seen, {"model": "made up", "device": "none"})
    regimes = model.data["regimes"]
    assert regimes["decode"] == regimes["prompt"]
    assert model.data["residuals"]["decode"] == {"shapes": 0, "samples": 0}
    model.save(tmp_path / "latency.json")
    assert FittedLatency.load(tmp_path / "latency.json").identity == model.identity
    none = {"verifying": 0, "asked": 0}
    with pytest.raises(ValueError, match="0 shapes were measured for decode steps"):
        fit([replace(one, features=one.features._replace(**none)) for one in seen], {})


def test_more_drafts_than_were_measured_are_beyond_the_range():
    model = fit(DRAFTED, {})
    model.watch(drafting(16, 5, 5))
    assert model.num_outside == 0
    model.watch(drafting(16, 5, 10))
    assert (model.num_outside, model.worst_excess) == (1, 2.0)


def test_an_engine_of_other_limits_has_rows_with_as_many_drafts_as_they_say():
    kernels = Kernels(decodes=(1, 2, 4, 8, 16, 24, 32, 40), single=5, waits=True)
    assert kernels.at(4, None, 2) == Kernels(decodes=(1, 2, 4, 8, 12), single=3, waits=True)
    assert kernels.at(4, 10, 2).decodes == (1, 2, 4, 8, 10), "a step has no more tokens than its budget"
    assert Kernels(decodes=(1, 2, 4, 8)).at(4, None, 2) == Kernels(decodes=(1, 2, 4)), "this one has no drafts"
    assert Kernels.load(kernels.as_dict()) == kernels
    assert not {"single", "waits"} & Kernels(decodes=(1, 2)).as_dict().keys(), "files of others stay what they are"


def test_what_bookkeeping_took_beside_a_shape_that_is_held_out_is_not_known_either():
    """Of a run in which bookkeeping was measured too, and of a profile's shapes, which are known all the while."""
    shapes = {features(rows, 64): [100_000 + 1_000 * rows] for rows in range(1, 11)}
    bookkeeping = {step: [cost // 2 for cost in costs] for step, costs in shapes.items()} | {features(40, 64): [90_000]}
    out = features(10, 64)
    training = {step: costs for step, costs in shapes.items() if step != out}
    solved = [
        fits._solve_host(bookkeeping | {out: [cost]}, {}, shapes, "decode", True, training) for cost in (55_000, 10**9)
    ]
    assert solved[0] == solved[1]
    known = fits._solve_host(bookkeeping | {features(40, 64): [10**9]}, {}, shapes, "decode", True, training)
    assert known != solved[0]
