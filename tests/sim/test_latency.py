"""What a step is said to cost depends on what it computes, and is asked for when the step is decided."""

import numpy as np
import pytest

from twinserve.policies import BlockManager, PrefixCache, SamplingParams, Scheduler, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.fit import FittedLatency, StepSample, fit
from twinserve.sim.latency import RecordedLatency, StepCost, StepFeatures
from twinserve.sim.replica import simulate
from twinserve.traces.request import Part, Request


def prompts(*lengths: int) -> StepFeatures:
    """The features of a step that computes prompts of these lengths."""
    scheduler = Scheduler(BlockManager(1000, 16))
    for number, length in enumerate(lengths):
        scheduler.add(Sequence([number * 10_000 + k for k in range(length)], SamplingParams()))
    return StepFeatures.of(scheduler.schedule())


def decodes(*contexts: int) -> StepFeatures:
    """The features of a step in which sequences with these contexts decode."""
    scheduler = Scheduler(BlockManager(1000, 16))
    for number, context in enumerate(contexts):
        scheduler.add(Sequence([number * 10_000 + k for k in range(context - 1)], SamplingParams(max_tokens=9)))
    batch = scheduler.schedule()
    scheduler.postprocess(batch, [1] * len(batch.sampled))
    return StepFeatures.of(scheduler.schedule())


def test_unequal_contexts_are_added_up_and_not_averaged():
    even, uneven = prompts(20, 20), prompts(10, 30)
    assert even.tokens == uneven.tokens == 40
    assert even.attention_pairs == 2 * 20 * 21 // 2
    assert uneven.attention_pairs == 10 * 11 // 2 + 30 * 31 // 2
    assert decodes(100, 1900).kv_tokens == decodes(1000, 1000).kv_tokens == 2000


def test_rows_are_told_apart_by_what_they_compute():
    assert prompts(20, 30).prompts == ((0, 20), (0, 30))
    assert prompts(20).longest_decode == 0
    step = decodes(100, 1900)
    assert (step.longest_decode, step.prompts, step.decode_kv_tokens) == (1900, (), 2000)
    assert step.repeated(3, 0).longest_decode == 1903
    assert prompts(20, 30).repeated(1, 5)[7:] == (0, 0, 5, 0, ((20, 20), (30, 30)), 0, 0, 0, 0, 0, 0)


def test_one_block_that_two_decodes_read_is_shared():
    scheduler = Scheduler(BlockManager(1000, 16), prefix_cache=PrefixCache(), composition="mixed")
    for number in range(2):
        scheduler.add(Sequence([*range(16), 1000 + number, 7], SamplingParams(max_tokens=9)))
    scheduler.postprocess(scheduler.schedule(), [1] * 2)
    assert StepFeatures.of(scheduler.schedule()).shared_tokens == 16


def test_time_behind_a_step_of_a_pipeline_is_that_of_its_last_stage():
    assert StepCost(1, 40, stages=(10, 30)).followed(5) == StepCost(1, 45, stages=(10, 35))
    assert StepCost(1, 40).followed(5) == StepCost(1, 45)


@pytest.mark.parametrize(("has_cache", "shared"), [(True, 2 * 96), (False, 0)])
def test_blocks_that_several_decodes_read_are_shared_but_for_the_first_of_them(has_cache, shared):
    cache = PrefixCache() if has_cache else None
    scheduler = Scheduler(BlockManager(1000, 16), prefix_cache=cache, composition="mixed")
    for number in range(3):
        alike = list(range(100))  # six whole blocks
        scheduler.add(Sequence(alike + [1000 + number] * (20 * number + 1), SamplingParams(max_tokens=9)))
    batch = scheduler.schedule()
    assert StepFeatures.of(batch).shared_tokens == 0, "prompts are not decodes"
    scheduler.postprocess(batch, [1] * 3)
    step = StepFeatures.of(scheduler.schedule())
    assert step.shared_tokens == shared and step.decode_kv_tokens == 102 + 122 + 142
    assert step.repeated(5, 0).shared_tokens == shared


def fitted(ns_per_token: int) -> FittedLatency:
    shapes = [
        StepFeatures(0, n, 0, n, n * c, n * c, n, longest_decode=c) for n in (1, 2, 4, 8) for c in (64, 256, 1200)
    ]
    shapes += [StepFeatures(0, 1, p, 0, p, p * (p + 1) // 2, 1, prompts=((0, p),)) for p in (8, 16, 32, 64)]
    samples = [StepSample(shape, 1000, 10_000 + ns_per_token * shape.tokens) for shape in shapes * 4]
    return fit(samples, {"model": "tiny", "device": "a test's"})


def test_a_file_that_changes_under_its_name_is_read_again(tmp_path):
    path = tmp_path / "latency.json"
    fitted(1000).save(path)
    first = FittedLatency.load(path)
    path.unlink()
    fitted(3000).save(path)
    second = FittedLatency.load(path)
    assert first.identity != second.identity
    before, after = (model.step_cost(prompts(50))[1] for model in (first, second))
    assert after == pytest.approx(before + 2000 * 50, rel=0.02)


class Counting:
    """Counts how often it is asked, and by which decision."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def step_cost(self, features: StepFeatures) -> tuple[int, int]:
        self.asked.append(features.decision)
        return 1000, 1000


def test_a_cost_is_asked_for_once_a_step_and_not_before_it():
    latency = Counting()
    core = Settings.load({"num_gpu_blocks": 64}).build_core()
    assert latency.asked == []
    simulate([Request(i, 0, (Part(i, 0, 20 + i),), 3) for i in range(3)], core, latency)
    assert latency.asked == [0, 1, 2]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("gap_ns", [7_000, 10_000, 1_000_000])
def test_no_more_than_two_costs_are_asked_for_a_decision_however_often_requests_come_in(depth, gap_ns):
    latency = Counting()
    core = Settings.load({"num_gpu_blocks": 4096, "pipeline_depth": depth}).build_core()
    simulate([Request(i, i * gap_ns, (Part(i, 0, 20),), 2000) for i in range(100)], core, latency)
    assert core.num_decisions > 2000
    assert len(latency.asked) <= 2 * core.num_decisions


def test_steps_beyond_what_was_measured_are_counted_when_they_are_made():
    requests = [Request(0, 0, (Part(0, 0, 900),), 500)]
    requests += [Request(i, i * 150_000, (Part(i, 0, 5),), 1 + i % 3) for i in range(1, 40)]
    counts = []
    for step_by_step in (True, False):
        latency = fitted(1000)
        core = Settings.load({"num_gpu_blocks": 4096}).build_core()
        simulate(requests, core, latency, step_by_step=step_by_step)
        counts.append((latency.num_outside, latency.worst_excess))
        assert 0 < latency.num_outside < core.num_decisions
    assert counts[0] == counts[1]


def test_each_token_of_a_short_row_attends_as_a_decode_over_what_the_one_before_it_has_read():
    prompts = ((20, 4), (0, 9), (7, 1))
    step = StepFeatures(3, 4, 14, 1, 24 + 9 + 8 + 30, 90 + 45 + 8 + 30, 6, longest_decode=30, prompts=prompts, drafts=3)
    assert step.attended(0) is step
    found = step.attended(4)
    assert (found.prompts, found.prompt_tokens, found.decode_tokens, found.tokens) == (((0, 9),), 9, 6, step.tokens)
    assert found.decode_kv_tokens == 30 + 8 + (21 + 22 + 23 + 24)
    assert found.decode_kv_tokens - found.shared_tokens == 30 + 8 + 24, "what is read from the pool"
    assert (found.longest_decode, found.seqs, found.sampled, found.drafts) == (30, 4, 6, 3)
    assert found.attended(4) == found
    assert step._replace(longest_decode=0).attended(4).longest_decode == 24


def test_a_step_that_the_host_waits_for_is_launched_when_it_ends():
    cost = StepCost.of_waiting(10, 100)
    assert cost.times(1_000, 0) == (1_110, 1_010, 1_110)
    assert cost.times(1_000, 1_050) == (1_110, 1_050, 1_150), "or later, where the device was not free"


def test_a_recorded_step_with_drafts_that_was_waited_for_costs_its_time_in_its_launch():
    row = {"decided_ns": 0, "start_ns": 10, "end_ns": 100, "launched_ns": 100, "asked": 2}
    assert RecordedLatency([row])._costs == [StepCost.of_waiting(10, 90)]
    for other in ({"launched_ns": 5}, {"launched_ns": None}):
        assert RecordedLatency([row | other])._costs == [(10, 90)]
    assert RecordedLatency([{name: row[name] for name in row if name != "asked"}])._costs == [(10, 90)]


def test_no_step_begins_before_it_is_decided_however_long_its_lead_is():
    assert StepCost(1_000, 10_000, 5_000).times(100_000, 0) == (101_000, 100_000, 110_000)
    assert StepCost(1_000, 10_000, 400).times(100_000, 0) == (101_000, 100_600, 110_600)
    assert StepCost(1_000, 10_000, 5_000).times(100_000, 100_200) == (101_000, 100_200, 110_200)
    assert StepCost(1_000, 10, 400).times(100_000, 0) == (101_000, 100_600, 101_000), "nor ends before it is launched"


ONE = [Request(0, 0, (Part(0, 0, 5),), 2000)]


@pytest.mark.parametrize(
    "given", [(5, -(10**9)), (-5, 10), (5.5, 7), (5, float("nan")), None, (1,), (5, 6, -7), (5, "6"), 3]
)
def test_a_model_that_says_no_costs_is_refused_with_what_it_says(given):
    class Wrong:
        def step_cost(self, features: StepFeatures) -> object:
            return given if features.decode_tokens else (1, 1)

    with pytest.raises(InputError, match="^step_cost of Wrong is .*, expected host_ns and device_ns, integers >= 0$"):
        simulate(ONE, Settings().build_core(), Wrong())  # type: ignore[arg-type]


@pytest.mark.parametrize(("host_ns", "device_ns"), [(-1, 5), (5, -1)])
def test_a_model_whose_repeated_costs_are_below_0_is_refused_too(host_ns, device_ns):
    class Wrong:
        def step_cost(self, features: StepFeatures) -> tuple[int, int]:
            return 5, 5

        def repeated_costs(self, features: StepFeatures, count: int) -> tuple[int, np.ndarray]:
            return host_ns, np.full(count, device_ns)

    with pytest.raises(InputError, match="^repeated_costs of Wrong is .*, expected nanoseconds >= 0$"):
        simulate(ONE, Settings().build_core(), Wrong())
