"""What drafting costs in a simulation."""

from __future__ import annotations

import pytest

from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.drafting import DraftedLatency, LookupDrafting, ModelDrafting
from twinserve.sim.fit import StepSample, fit
from twinserve.sim.latency import RecordedLatency, StepCost, StepFeatures
from twinserve.sim.replica import simulate
from twinserve.sim.speculation import AcceptanceLaw
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.record import RunRecorder, load_record
from twinserve.worlds.run import with_drafting

NGRAM = {"method": "ngram", "num_speculative_tokens": 3}
STEP = StepFeatures(7, 3, 6, 1, 640, 700, 6, asked=3, drafting=2, drafting_tokens=500, prompts=((300, 4), (200, 2)))


STEPS = [{"decided_ns": 0, "start_ns": 5, "end_ns": 9}]


class Watched:
    """Steps of 1,000 ns and 10 more for each token, on which it keeps an eye."""

    def __init__(self, lead_ns: int = 0):
        self.asked: list[StepFeatures] = []
        self.told = 0
        self._lead_ns = lead_ns

    def step_cost(self, features: StepFeatures) -> StepCost:
        self.asked.append(features)
        return StepCost(100, 1_000 + 10 * features.tokens, self._lead_ns)

    def watch(self, features: StepFeatures, count: int = 1) -> None:
        self.told += count


def test_prompt_lookup_costs_by_sequences_and_by_the_tokens_of_their_texts():
    assert LookupDrafting(50, 2).drafting_ns(STEP) == 2 * 50 + 500 * 2
    own = DraftedLatency(Watched(), LookupDrafting(50, 2)).step_cost(STEP)
    assert own == StepCost(100, 1_070 + 1_100)


def test_a_model_computes_the_rows_of_the_step_and_then_a_token_of_each_sequence_for_every_further_draft():
    draft = Watched()
    assert ModelDrafting(draft).drafting_ns(STEP) == 1_070 + 2 * 1_020
    first, *others = draft.asked
    assert (first.asked, first.drafting, first.drafting_tokens) == (0, 0, 0), "it proposes nothing itself"
    assert (first.prompts, first.decode_tokens, first.sampled) == (STEP.prompts, STEP.decode_tokens, 2)
    assert [(one.seqs, one.tokens, one.kv_tokens, one.sampled) for one in others] == [(2, 2, 502, 2), (2, 2, 504, 2)]
    assert ModelDrafting(Watched(lead_ns=4_000)).drafting_ns(STEP) == 3 * 4_000, "kernel by kernel"


def test_a_step_that_asks_for_no_drafts_costs_what_it_costs_alone():
    inner = Watched()
    latency = DraftedLatency(inner, LookupDrafting(50, 2))
    for none in (STEP._replace(asked=0), STEP._replace(drafting=0)):
        assert latency.step_cost(none) == StepCost(100, 1_070)
    latency.watch(STEP, 5)
    assert inner.told == 5
    DraftedLatency(RecordedLatency(STEPS), LookupDrafting(50, 2)).watch(STEP)  # which does not want to know


def test_steps_of_a_simulation_are_longer_by_what_drafting_costs(tmp_path):
    """A chunk of a prompt is no sequence that drafts."""
    settings = Settings.load(
        {"num_gpu_blocks": 64, "max_num_batched_tokens": 64, "max_num_seqs": 8, "speculative_config": NGRAM}
    )
    requests = [Request(0, 0, (Part(0, 0, 100),), 9), Request(1, 0, (Part(1, 0, 20),), 9)]
    took: list[list[int]] = []
    for name, drafting in (("plain", None), ("lookup", LookupDrafting(50, 2))):
        params = SamplingParams(ignore_eos=True)
        with RunRecorder(tmp_path / name, world="sim", settings=settings.model_dump(), facts={}) as recorder:
            simulate(
                requests,
                settings.build_core(listener=recorder),
                DraftedLatency(Watched(), drafting) if drafting else Watched(),
                params=params,
                announce=lambda request, to=recorder, how=params: to.expect(request, how),
                acceptance=AcceptanceLaw((0.0,)),
            )
            recorder.close()
        steps = load_record(tmp_path / name).steps
        took.append([step["end_ns"] - step["start_ns"] for step in steps])
    longer = [drafted - plain for plain, drafted in zip(*took, strict=True)]
    assert longer[:2] == [0, 2 * 50 + 2 * (100 + 20)], "the first step computes a chunk of the first prompt alone"
    assert longer[2] == 2 * 50 + 2 * (100 + 20 + 2 * 4), "and then rows of a token and three drafts"


def test_the_settings_say_what_drafting_costs():
    def chosen(latency=None, **values):
        return with_drafting(latency or Watched(), Settings.load({"speculative_config": NGRAM | values}))

    assert isinstance(chosen(), Watched)
    assert isinstance(chosen(lookup_ns=[50, 2]), DraftedLatency)
    assert isinstance(chosen(method="draft_model", model="x", draft_latency="roofline:qwen3-0.6b@h200"), DraftedLatency)
    recorded = RecordedLatency(STEPS)
    assert chosen(recorded, lookup_ns=[50, 2]) is recorded, "in whose times it is"
    with pytest.raises(InputError, match="expected a file, roofline:MODEL@DEVICE"):
        chosen(method="draft_model", model="x", draft_latency="nowhere")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"draft_latency": "x"}, "draft_latency is x, expected none with the method ngram"),
        ({"method": "draft_model", "lookup_ns": [1, 2]}, "lookup_ns is .*, expected none with the method draft_model"),
        ({"lookup_ns": [1]}, "lookup_ns"),
        ({"lookup_ns": [1, -2]}, "lookup_ns"),
    ],
)
def test_costs_that_cannot_be_are_refused_in_a_line(values, problem):
    with pytest.raises(InputError, match=problem) as caught:
        Settings.load({"speculative_config": NGRAM | values})
    assert "\n" not in str(caught.value)


def test_the_longest_of_the_texts_that_are_drafted_is_no_shorter_than_their_mean():
    draft = Watched()
    ModelDrafting(draft).drafting_ns(STEP._replace(asked=2, drafting_tokens=501))
    assert draft.asked[1].longest_decode == 251 + 1, "as 250 would be a token too few of one of the two"


def test_what_was_measured_with_drafts_does_not_cost_them_again():
    """Nor is it longer by them; and a latency of an engine without them is."""
    shapes = [StepFeatures(0, n, 0, n, 100 * n, 100 * n, n, longest_decode=100) for n in (1, 2, 4)]
    shapes += [StepFeatures(0, 1, n, 0, n, n * (n + 1) // 2, 1, prompts=((0, n),)) for n in (8, 16)]
    samples = [StepSample(shape, 1_000, 1_000_000) for shape in shapes]
    own, plain = (fit(samples, about) for about in ({"speculative_config": NGRAM}, {}))

    def chosen(latency, **values):
        return with_drafting(latency, Settings.load({"speculative_config": NGRAM | values}))

    assert chosen(own) is own
    assert isinstance(chosen(plain, lookup_ns=[50, 2]), DraftedLatency)
    for values in ({"lookup_ns": [50, 2]}, {"method": "draft_model", "model": "x", "draft_latency": "nowhere"}):
        with pytest.raises(InputError, match="expected none, as the latency was measured with drafts"):
            chosen(own, **values)
