"""Latency models fitted from recorded runs: known costs are found again, and what cannot be known is not guessed."""

import random
from copy import deepcopy
from functools import cache, partial

import pytest
from vllm_log import CAPTURED, US, write_log

from twinserve.policies import SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.fit import DRIFT_NS, FittedLatency, StepSample, regime_of
from twinserve.sim.kernels import Kernels
from twinserve.sim.latency import StepCost, StepFeatures
from twinserve.sim.profiles import Profile
from twinserve.sim.recorded_steps import Timeline, features_of, fit_records, host_levels, step_spans
from twinserve.sim.replica import simulate
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.record import RunRecord, RunRecorder, load_record
from twinserve.traces.runs.vllm_records import load_run

MS = 1_000_000
SETTINGS = {"max_num_seqs": 48, "max_num_batched_tokens": 512, "max_model_len": 512, "num_gpu_blocks": 2000}
LEAD = 300 * US


def requests(count: int = 400) -> list[Request]:
    rng = random.Random(1)
    at, made = 0, []
    for number in range(count):
        at += round(rng.expovariate(1.0) * 12 * MS)
        made.append(Request(number, at, (Part(number, 0, rng.choice([6, 20, 40, 150, 400])),), rng.randint(2, 60)))
    return made


def cost(features: StepFeatures) -> tuple[int, int, int, int]:
    """Bookkeeping, launch, device and lead, in nanoseconds."""
    bookkeeping = 50 * US + 20 * US * features.seqs + 30 * US * features.arrived + 40 * US * features.left
    regime = regime_of(features, CAPTURED)
    launch = {"decode": 800 * US, "prompt": 2000 * US, "eager": 5000 * US}[regime]
    device = 1200 * US + 600 * features.kv_tokens + 8 * US * features.tokens
    lead = {"decode": LEAD, "prompt": 1500 * US, "eager": 4500 * US}[regime]
    return bookkeeping, launch, device, lead


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log") / "run"
    return load_run(write_log(folder, requests(), SETTINGS | {"pipeline_depth": 1}, cost=cost))


@pytest.fixture(scope="module")
def model(record):
    return fit_records([record], {})


def recorded_features(record, regime: str) -> list[StepFeatures]:
    return [f for f in features_of(record) if f.seqs and regime_of(f, CAPTURED) == regime]


@pytest.mark.parametrize("regime", ["decode", "prompt", "eager"])
def test_host_costs_are_found_again_in_each_regime(record, model, regime):
    steps = recorded_features(record, regime)
    assert len(steps) > 30
    for features in steps[:: len(steps) // 20]:
        bookkeeping, launch, *_ = cost(features)
        assert model.step_cost(features).host_ns == pytest.approx(bookkeeping + launch, rel=0.06)


def test_device_costs_are_found_again_where_results_were_waited_for(record, model):
    steps = [f for f in recorded_features(record, "decode") if f.kv_tokens > 1500]
    assert len(steps) > 100
    for features in steps[:: len(steps) // 20]:
        assert model.step_cost(features).device_ns == pytest.approx(cost(features)[2], rel=0.05)


def test_the_lead_of_a_captured_step_is_found_again(record, model):
    (features, *_) = recorded_features(record, "decode")
    assert model.step_cost(features).lead_ns == pytest.approx(LEAD, rel=0.25)


def drifting(features: StepFeatures) -> tuple[int, int, int, int]:
    """A host that is half as slow again in every second stretch of ten levels."""
    factor = 1.5 if features.decided_ns // (10 * DRIFT_NS) % 2 else 1.0
    bookkeeping, launch, device, lead = cost(features)
    return round(bookkeeping * factor), round(launch * factor), device, round(lead * factor)


@pytest.fixture(scope="module")
def drifted(tmp_path_factory):
    """A log of a drifting host, by the depth of the pipeline; each is made once."""

    @cache
    def logged(depth: int):
        folder = tmp_path_factory.mktemp("drifted") / "log"
        return write_log(folder, requests(), SETTINGS | {"pipeline_depth": depth}, cost=drifting)

    return logged


def test_a_host_that_drifts_is_followed_in_its_levels(drifted):
    record = load_run(drifted(1))
    model = fit_records([record], {})
    fast, slow = model.data["drift"][2:9], model.data["drift"][12:19]
    assert max(fast) < 0.9 < 1.1 < min(slow)
    steps = list(step_spans(record))
    timeline = Timeline(record)
    late = sum(timeline.step(model.step_cost(features), free, following) for features, free, following in steps)
    assert late / sum(following - free for _, free, following in steps) == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_levels_of_a_host_are_found_without_launch_times(drifted, model, depth):
    record = load_run(drifted(depth))
    for row in record.steps:
        row["launched_ns"] = None
    levels = host_levels(record, model)
    assert len(levels) == record.steps[-1]["decided_ns"] // DRIFT_NS + 1
    for number, level in enumerate(levels[:-1]):
        if number % 10:
            assert level == pytest.approx(1.5 if number // 10 % 2 else 1.0, rel=0.12), number


def test_where_only_the_device_decides_the_level_before_goes_on(tmp_path):
    def slow_device(features: StepFeatures) -> tuple[int, int, int, int]:
        bookkeeping, launch, device, lead = cost(features)
        return bookkeeping, launch, device + 20 * MS, lead

    log = write_log(tmp_path / "log", requests(60), SETTINGS | {"pipeline_depth": 1}, cost=slow_device)

    class Exact(FittedLatency):
        def step_cost(self, features: StepFeatures) -> StepCost:
            bookkeeping, launch, device, lead = slow_device(features)
            return StepCost(bookkeeping + launch, device, lead)

        def with_drift(self, levels):
            return self

    levels = host_levels(load_run(log), object.__new__(Exact))
    assert len(set(levels)) == 1 and levels[0] == pytest.approx(1.0, abs=0.05)


def test_a_profile_shows_no_drift(record):
    facts = record.run["facts"]
    profile = type(record)(
        record.path,
        record.run | {"facts": facts | {"source": facts["source"] | {"kind": "profile"}}},
        record.requests,
        record.steps,
        {},
    )
    num_levels = record.steps[-1]["decided_ns"] // DRIFT_NS + 1
    assert len(fit_records([profile, record], {}).data["drift"]) == num_levels


def test_a_run_without_drift_has_levels_of_one(model):
    assert model.data["drift"]
    assert all(level == pytest.approx(1.0, abs=0.1) for level in model.data["drift"])


def test_the_largest_captured_graph_of_other_settings_moves_the_limit(model, record):
    features = next(f for f in recorded_features(record, "prompt") if f.tokens > 32)
    smaller = model.with_captured_tokens(32)
    assert smaller.step_cost(features).host_ns > model.step_cost(features).host_ns + 2 * MS
    assert smaller.identity != model.identity


def test_the_features_of_a_row_are_those_of_its_batch(tmp_path):
    seen: list[StepFeatures] = []

    def noting(features: StepFeatures) -> tuple[int, int, int, int]:
        seen.append(features)
        return cost(features)

    log = write_log(tmp_path / "log", requests(60), SETTINGS | {"num_gpu_blocks": 60}, cost=noting)
    rows = load_run(log).steps
    assert sum(len(row["preempted"]) for row in rows) > 0
    assert [features for features in features_of(load_run(log)) if features.seqs] == seen
    assert any(len(features.prompts) > 1 for features in seen) and any(features.longest_decode for features in seen)


def test_launches_that_were_not_recorded_are_not_guessed(tmp_path, record):
    log = write_log(tmp_path / "log", requests(20), SETTINGS | {"pipeline_depth": 0}, cost=cost)
    with pytest.raises(InputError, match="host and device cannot be told apart"):
        fit_records([load_run(log)], {})
    for row in (steps := [dict(row) for row in record.steps]):
        row["launched_ns"] = None
    untold = type(record)(record.path, record.run, record.requests, steps, {})
    with pytest.raises(InputError, match="host and device cannot be told apart"):
        fit_records([untold], {})


def test_a_simulation_is_no_measurement(record):
    simulated = type(record)(record.path, record.run | {"world": "sim"}, record.requests, record.steps, {})
    with pytest.raises(InputError, match="expected the record of a real run"):
        fit_records([simulated], {})


KERNELS = Kernels(decodes=(1, 2, 4, 8, 16, 32, 48), prompt_tokens=(32, 128, 512), decodes_beside=(0, 16, 48), prompts=8)


class Own:
    """Costs of an engine of ours: bookkeeping before a decision, a launch after it, and the device."""

    def step_cost(self, features: StepFeatures) -> StepCost:
        return StepCost(sum(self.host(features)), self.device(features))

    def host(self, features: StepFeatures) -> tuple[int, int]:
        return 40 * US + 5 * US * features.seqs + 20 * US * features.left, 300 * US + 100 * US * bool(features.prompts)

    def device(self, features: StepFeatures) -> int:
        _, tokens, _ = KERNELS.padded(features.decode_tokens, features.prompt_tokens, len(features.prompts), 0)
        return 1200 * US + 4 * US * tokens + 90 * features.decode_kv_tokens + 300 * KERNELS.tiles(features.prompts)[1]


@pytest.fixture(scope="module")
def own_record(tmp_path_factory):
    """A real run of ours as it would have been with the costs of `Own`, each time one that can be changed."""
    made = cache(lambda depth: run_of_own(tmp_path_factory.mktemp("own") / "run", depth))

    def record(depth: int, *, says_launches: bool = True) -> RunRecord:
        found = deepcopy(made(depth))
        for row in found.steps if not says_launches else ():
            del row["launched_ns"]
        return found

    return record


@pytest.fixture(scope="module")
def own_model(own_record):
    """The model of such a run."""
    return cache(lambda depth: fit_records([own_record(depth)], {}))


def run_of_own(folder, depth: int) -> RunRecord:
    """Simulate it, and write down when it launched."""
    settings = Settings.load(SETTINGS | {"pipeline_depth": depth})
    facts = {"tokens": None, "trace": {"sha256": ""}, "kernels": KERNELS.as_dict()}
    with RunRecorder(folder, world="sim", settings=settings.model_dump(), facts=facts) as recorder:
        params = SamplingParams(ignore_eos=True)
        core = settings.build_core(listener=recorder)
        announce = partial(recorder.expect, sampling=params)
        simulate(requests(250), core, Own(), params=params, announce=announce, step_by_step=True)
        recorder.close()
    record = load_record(folder)
    record.run["world"] = "real"
    for row, features in zip(record.steps, features_of(record), strict=True):
        bookkeeping, launch = Own().host(features)
        if depth:
            row["decided_ns"] += bookkeeping
        row["launched_ns"] = row["decided_ns"] + launch
    return record


@pytest.mark.parametrize("says_launches", [True, False])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_run_of_ours_gives_its_costs_whether_or_not_the_host_waited_for_the_device(
    own_record, own_model, depth, says_launches
):
    record = own_record(depth, says_launches=says_launches)
    model = own_model(depth) if says_launches else fit_records([record], {})
    for features in [features for features in features_of(record) if features.seqs][::50]:
        host, device, lead = model.step_cost(features)[:3]
        assert device == pytest.approx(Own().device(features), rel=0.03)
        bookkeeping, launch = Own().host(features)
        if says_launches or not depth:
            assert host == pytest.approx(bookkeeping + launch, rel=0.1)
        else:
            assert bookkeeping * 0.9 < host < (bookkeeping + launch) * 1.1, "a launch that was hidden is not guessed"
        assert lead == 0
    assert model.data["kernels"] == KERNELS.as_dict() and not model.drift


def test_a_launch_that_is_null_was_not_seen_as_one_that_is_not_there(own_record):
    absent, null = own_record(1, says_launches=False), own_record(1)
    for row in null.steps:
        row["launched_ns"] = None
    assert fit_records([null], {}).data == fit_records([absent], {}).data


def test_the_run_that_was_fitted_on_comes_out_as_it_was(own_record, own_model):
    record = own_record(1)
    core = Settings.load(record.run["settings"]).build_core()
    ended: list[Sequence] = []
    simulate(requests(250), core, own_model(1), params=SamplingParams(ignore_eos=True), progress=ended.append)
    measured = sum(row["finish_ns"] - row["arrival_ns"] for row in record.requests)
    assert sum(seq.finish_ns - seq.arrival_ns for seq in ended) == pytest.approx(measured, rel=0.01)


def test_runs_whose_steps_have_other_sizes_are_not_fitted_together(own_record):
    one, other = own_record(1), own_record(1)
    other.run["facts"]["kernels"] = Kernels().as_dict()
    with pytest.raises(InputError, match="expected runs of one engine, with the same sizes of steps"):
        fit_records([one, other], {})


def test_a_step_that_something_held_up_is_left_out(own_record, own_model):
    record, before = own_record(0), own_model(0)
    late = record.steps[len(record.steps) // 2]
    late["end_ns"] += 100 * MS
    features = features_of(record)[late["decision"]]
    assert fit_records([record], {}).step_cost(features).device_ns == before.step_cost(features).device_ns


def own_profile(kernels: Kernels = KERNELS) -> Profile:
    """Measured steps of the engine of `Own`, with contexts far beyond those of its run."""
    samples = []
    for decodes in (0, 1, 6, 20, 48):
        for context in (700, 3000):
            for prompts in ((), ((0, 30),), ((2000, 120), (400, 9))):
                tokens, ends = sum(length for _, length in prompts), sum(map(sum, prompts))
                kv_tokens, rows = decodes * context + ends, decodes + len(prompts)
                step = StepFeatures(
                    0, rows, tokens, decodes, kv_tokens, kv_tokens, rows,
                    longest_decode=context if decodes else 0, prompts=prompts,
                )  # fmt: skip
                if rows:
                    bookkeeping, launch = Own().host(step)
                    samples.append(
                        StepSample(step, bookkeeping + launch, Own().device(step), None, launch, bookkeeping)
                    )
    return Profile({"model": "ours"}, kernels, samples)


def test_a_profile_and_a_run_are_fitted_together_and_each_says_what_the_other_does_not(own_record, own_model):
    record, profile = own_record(1), own_profile()
    alone, together = own_model(1), fit_records([record], {}, profile)
    made = [features for features in features_of(record) if features.seqs]
    for features in [*made[::50], *(sample.features for sample in profile.samples)]:
        assert together.step_cost(features).device_ns == pytest.approx(Own().device(features), rel=0.03)
    for regime, samples in (("decode", 8), ("prompt", 20)):
        one, both = (model.data["residuals"][regime]["samples"] for model in (alone, together))
        assert both == one + samples
        assert both > 100, "the run has many"
    assert (
        together.data["range"]["decode"]["longest_decode"][1]
        == 3000
        > alone.data["range"]["decode"]["longest_decode"][1]
    )


def test_a_profile_of_another_engine_is_not_fitted_with_a_run(own_record):
    record = own_record(1)
    with pytest.raises(InputError, match="expected a profile of the engine of the runs, with the same sizes"):
        fit_records([record], {}, own_profile(Kernels()))
