"""Sampling: against reference distributions, and repeatable whatever else is in the batch."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from engine_judge import GREEDY
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from twinserve.engine.online import NOT_SAMPLED
from twinserve.engine.sampler import (
    GeneratedTokens,
    SamplingPlan,
    greedy_sample,
    is_plain,
    mixed,
    sample,
    sample_with_temperature,
    uniform,
)
from twinserve.policies import Row, SamplingParams, Sequence

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.0, 0.5])


def frequencies(params: SamplingParams, draws: int = 20_000) -> torch.Tensor:
    """How often each token is drawn from LOGITS."""
    tokens = sample(LOGITS.expand(draws, -1), [params] * draws, range(draws), generator=random.Random(3))
    return torch.bincount(tokens, minlength=len(LOGITS)) / draws


def expected(params: SamplingParams) -> torch.Tensor:
    """The distribution by its definition: temperature, then min-p, then top-k, then top-p, then renormalised."""
    probabilities = (LOGITS.double() / params.temperature).softmax(-1).tolist()
    ranked = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    ranked = [token for token in ranked if probabilities[token] >= params.min_p * max(probabilities)]
    if params.top_k:
        last = probabilities[ranked[: params.top_k][-1]]
        ranked = [token for token in ranked if probabilities[token] >= last]
    total = sum(probabilities[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass < params.top_p:
            kept.append(token)
        mass += probabilities[token] / total
    result = torch.zeros(len(probabilities))
    for token in kept:
        result[token] = probabilities[token]
    return result / result.sum()


def test_greedy_takes_the_best_of_one_or_two_dimensions():
    assert greedy_sample(LOGITS) == greedy_sample(LOGITS[None]) == 1


def test_the_guides_temperature():
    assert sample_with_temperature(LOGITS, 0.0) == sample_with_temperature(LOGITS[None], 1e-6) == 1
    assert len({sample_with_temperature(LOGITS, 5.0) for _ in range(200)}) > 3
    assert len({sample_with_temperature(LOGITS, 5.0, seed=4) for _ in range(20)}) == 1
    assert len({sample_with_temperature(LOGITS, 5.0, seed=seed) for seed in range(100)}) > 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0, top_k=3),
        SamplingParams(top_k=1),
        SamplingParams(top_k=2),
        SamplingParams(top_k=100),
        SamplingParams(top_p=0.8),
        SamplingParams(top_p=1e-9),
        SamplingParams(temperature=2.0, top_k=4, top_p=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=3.0, min_p=0.5, top_k=3),
        SamplingParams(temperature=2.0, min_p=0.3, top_p=0.6),
    ],
)
@pytest.mark.parametrize("seed", [None, 11])
def test_tokens_follow_the_distribution(params, seed):
    params = replace(params, seed=seed)
    found, exact = frequencies(params), expected(params)
    assert torch.all(found[exact == 0] == 0)
    assert (found - exact).abs().max() < 0.015


@pytest.mark.parametrize("penalty", [0.6, 1.0, 1.4, 8.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3])
def test_penalty_temperature_min_p_and_top_k_are_those_of_transformers(penalty, min_p):
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2)) * 3
    before = torch.randint(0, 300, (5, 80), generator=torch.Generator().manual_seed(3))
    before[:, :4] = torch.cat((logits.topk(2).indices, logits.topk(2, largest=False).indices), 1)
    steps = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(1.7)]
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    processed = LogitsProcessorList([*steps, TopKLogitsWarper(20)])(before, logits.clone())
    cumulative = processed.double().softmax(-1).cumsum(-1)
    params = SamplingParams(1.7, top_k=20, min_p=min_p, repetition_penalty=penalty, seed=4)
    seen = torch.zeros(5, 300, dtype=torch.bool).scatter_(1, before, True)
    kept = torch.zeros(5, 300, dtype=torch.bool)
    for position in range(400):
        tokens = sample(logits, [params] * 5, [position] * 5, seen=seen if penalty != 1.0 else None)
        expected = (cumulative <= uniform(4, position)).sum(-1)
        assert tokens.tolist() == expected.tolist()
        kept[torch.arange(5), tokens] = True
    assert 1 < kept.sum(-1).float().mean() < 21
    greedy = replace(params, temperature=0.0)
    tokens = sample(logits, [greedy] * 5, [0] * 5, seen=seen if penalty != 1.0 else None)
    assert tokens.tolist() == RepetitionPenaltyLogitsProcessor(penalty)(before, logits.clone()).argmax(-1).tolist()


def test_a_penalty_is_of_its_own_row():
    logits = torch.tensor([[2.0, 1.5, -1.0]] * 3)
    penalised = replace(GREEDY, repetition_penalty=2.0)
    seen = torch.tensor([[True, False, False]])
    assert sample(logits, [GREEDY, penalised, GREEDY], [0] * 3, seen=seen).tolist() == [0, 1, 0]


def test_a_penalty_without_the_tokens_before_is_refused():
    penalised = replace(GREEDY, repetition_penalty=2.0)
    with pytest.raises(ValueError, match=r"seen is of shape None, expected \(1, 6\)"):
        sample(LOGITS[None], [penalised], [0])
    with pytest.raises(ValueError, match=r"seen is of shape \(2, 6\), expected \(1, 6\)"):
        sample(LOGITS[None], [penalised], [0], seen=torch.zeros(2, 6, dtype=torch.bool))


def test_tokens_as_probable_as_the_last_of_top_k_are_kept():
    logits = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    tokens = sample(logits.expand(500, -1), [SamplingParams(top_k=2)] * 500, range(500), generator=random.Random(0))
    assert set(tokens.tolist()) == {0, 2, 3, 4}


def test_a_seeded_row_draws_alike_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 1000, generator=generator)
    params = [
        SamplingParams(temperature=1.5, seed=5),
        GREEDY,
        SamplingParams(seed=5, top_k=50),
        SamplingParams(temperature=2.0),
        SamplingParams(seed=6, top_p=0.9),
        SamplingParams(temperature=0.7, seed=-1, top_k=7, top_p=0.5),
        GREEDY,
        SamplingParams(),
        SamplingParams(seed=(1 << 64) - 1),
        SamplingParams(seed=8, min_p=0.1, repetition_penalty=1.5),
    ]
    logits = torch.cat((logits, logits[:1]))
    seen = torch.rand(1, 1000, generator=generator) < 0.5
    positions = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    together = sample(logits, params, positions, seen=seen).tolist()
    assert together[1] == logits[1].argmax() and together[6] == logits[6].argmax()
    for row in (0, 1, 2, 4, 5, 6, 8):
        assert sample(logits[row : row + 1], [params[row]], [positions[row]]).tolist() == [together[row]]
    assert sample(logits[9:], params[9:], positions[9:], seen=seen).tolist() == together[9:]


def test_another_position_is_another_draw():
    draws = {uniform(5, position) for position in range(1000)} | {uniform(6, position) for position in range(1000)}
    assert len(draws) == 2000
    assert all(0.0 <= draw < 1.0 for draw in draws)
    assert abs(sum(draws) / 2000 - 0.5) < 0.02


def test_rows_without_a_seed_draw_from_the_generator_in_order():
    logits = torch.zeros(4, 1000)
    params = [SamplingParams(), GREEDY, SamplingParams(seed=1), SamplingParams()]
    one, two = (sample(logits, params, [0] * 4, generator=random.Random(9)).tolist() for _ in range(2))
    first, last = (int(1000 * draw) for draw in (random.Random(9).random(), list(iter_draws(9, 2))[1]))
    assert one == two
    assert (one[0], one[3]) == (first, last)


def iter_draws(seed: int, count: int):
    generator = random.Random(seed)
    return (generator.random() for _ in range(count))


def test_biases_are_added_and_stop_tokens_wait_for_the_least_length():
    params = [replace(GREEDY, logit_bias=((3, 5.0), (1, -1.5))), replace(GREEDY, stop_token_ids=(1,), min_tokens=3)]
    assert sample(LOGITS.expand(2, -1), params, [0, 0], generated=[0, 2]).tolist() == [3, 2]
    assert sample(LOGITS.expand(2, -1), params, [0, 0], generated=[0, 3]).tolist() == [3, 1]
    near = [replace(GREEDY, logit_bias=((2, bias),)) for bias in (1.5, 0.5)]
    assert sample(LOGITS.expand(2, -1), near, [0, 0]).tolist() == [2, 1], "to what the logit is"


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, 0.7), (-1.0, 0.3), (-1.0, 0.0), (0.0, -0.7)])
def test_presence_and_frequency_penalties_are_by_their_definition(frequency, presence):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    counts = torch.randint(0, 4, (4, 50), generator=torch.Generator().manual_seed(3)).float()
    params = SamplingParams(temperature=0.0, frequency_penalty=frequency, presence_penalty=presence)
    exact = logits - frequency * counts - presence * (counts > 0)
    rows = sample(torch.cat((logits, logits)), [params] * 4 + [GREEDY] * 4, range(8), counts=counts)
    assert rows.tolist() == [*exact.argmax(-1).tolist(), *logits.argmax(-1).tolist()]
    with pytest.raises(ValueError, match=r"counts is of shape None, expected \(4, 50\)"):
        sample(logits, [params] * 4, range(4))


def test_a_repetition_penalty_lowers_every_token_that_was_seen_below_nothing_too():
    logits = torch.tensor([[-1.0, -1.5, 1.0, 0.9]])
    seen = torch.tensor([[True, False, True, False]])
    for seen_now, best in ((seen, 3), (torch.tensor([[True, False, True, True]]), 2)):
        assert sample(logits, [replace(GREEDY, repetition_penalty=1.2)], [0], seen=seen_now).tolist() == [best]
    below = torch.tensor([[-1.0, -1.5]])
    assert sample(below, [replace(GREEDY, repetition_penalty=2.0)], [0], seen=seen[:, :2]).tolist() == [1]


def test_top_k_of_minus_1_is_the_whole_vocabulary():
    rows = [SamplingParams(seed=seed, top_k=top_k) for top_k in (-1, 0) for seed in range(50)]
    tokens = sample(LOGITS.expand(100, -1), rows, [0] * 100).tolist()
    assert tokens[:50] == tokens[50:] and len(set(tokens)) > 2
    assert is_plain(rows[0]) and not is_plain(replace(rows[0], logprobs=0))


def test_a_temperature_that_is_next_to_none_is_none_however_near_the_next_token_is():
    params = [SamplingParams(temperature=5e-6, seed=seed) for seed in range(30)]
    assert set(sample(torch.tensor([1.0, 3.0, 3.000001]).expand(30, -1), params, [0] * 30).tolist()) == {2}


def test_draws_are_those_of_splitmix64_whatever_the_seed():
    """The first two numbers of the generator's published sequence from 1234567."""
    assert mixed(1234567) == 6457827717110365317
    assert mixed(1234567 + 0x9E3779B97F4A7C15) == 3203168211198807973
    assert mixed(-1) == mixed((1 << 64) - 1) and mixed((1 << 64) + 5) == mixed(5)


def test_top_k_of_all_tokens_or_more_keeps_them_all_beside_rows_that_keep_few():
    flat = [SamplingParams(temperature=1000.0, seed=seed, top_k=top_k) for top_k in (6, 7) for seed in range(60)]
    tokens = sample(LOGITS.expand(121, -1), [*flat, SamplingParams(top_k=1)], [0] * 121).tolist()
    assert set(tokens[:60]) == set(tokens[60:120]) == set(range(6)) and tokens[120] == 1


def test_a_row_whose_top_p_is_1_keeps_its_tail_beside_one_that_has_none():
    """Three thirds add up to 1 in float32, and the tokens behind them are there all the same."""
    logits = torch.tensor([0.0, 0.0, 0.0, -20.0]).expand(2, -1)
    params = [SamplingParams(top_p=1.0), SamplingParams(top_p=0.5)]
    plan = SamplingPlan.of(params, [1 - 2.0**-40] * 2, logits.device)
    assert plan.sample(logits).tolist() == [3, 1]


def test_top_p_is_a_share_of_what_top_k_left():
    logits = torch.tensor([3.0, 2.0, 2.0 - 1e-3, 1.9, 1.8, 1.7])
    params = SamplingParams(top_k=2, top_p=0.7)
    tokens = sample(logits.expand(2000, -1), [params] * 2000, range(2000), generator=random.Random(0))
    # Of the two, the first has 73%; of all, the two together have 57%.
    assert set(tokens.tolist()) == {0}


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}], ids=["top_k", "top_p", "min_p"])
def test_a_draw_of_exactly_0_takes_no_token_that_was_left_out(params):
    logits = torch.tensor([[-2.0, 5.0, 4.99, -3.0]])
    plan = SamplingPlan.of([SamplingParams(**params)], [0.0], logits.device)
    assert plan.sample(logits).tolist() == [1]


def test_a_token_that_came_often_is_present_once_and_stops_are_free_at_the_least_length():
    often = SamplingParams(temperature=0.0, presence_penalty=1.0)
    logits, counts = torch.tensor([[2.0, 1.9, 0.5]]), torch.tensor([[3.0, 3.0, 0.0]])
    plan = SamplingPlan.of([often], [0.0], torch.device("cpu"))
    assert plan.sample(logits, counts=counts).tolist() == [0], "1.0, 0.9 and 0.5: three times the penalty would take 2"
    stops = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(0,))
    for generated, token in ((1, 1), (2, 0)):
        plan = SamplingPlan.of([stops], [0.0], torch.device("cpu"), [generated])
        assert plan.sample(torch.tensor([[2.0, 1.0]])).tolist() == [token]


def test_top_p_keeps_no_token_more_once_it_is_reached():
    half = SamplingParams(temperature=1.0, top_p=0.5)
    plan = SamplingPlan.of([half], [0.9], torch.device("cpu"))
    assert plan.sample(torch.zeros(1, 2)).tolist() == [0], "the first has half of the probability"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_largest_logit_is_no_finite_number_is_not_sampled(temperature):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[1.0, inf, 0.0], [1.0, nan, 2.0], [-inf, -inf, -inf], [1.0, -inf, -inf]])
    tokens = sample(logits, [SamplingParams(temperature, seed=1)] * 4, [0] * 4).tolist()
    assert tokens == [NOT_SAMPLED] * 3 + [0]


def test_what_was_generated_is_counted_once_each_and_nothing_of_the_prompt():
    """Of two rows, the last token of the second is not known to the host yet, and comes from the flat batch."""
    seqs = [Sequence([5, 6], SamplingParams(frequency_penalty=1.0)) for _ in range(2)]
    for seq in seqs:
        for token in (7, 3, 7):
            seq.append_token(token)
    known = {seqs[0]: seqs[0].token_ids, seqs[1]: seqs[1].token_ids[:4]}
    sampled = [(Row(seq, 4, 1, True, False), place) for place, seq in enumerate(seqs)]
    generated = GeneratedTokens.of(sampled, torch.device("cpu"), lambda row: known[row.seq])
    counts = generated.counts(torch.tensor([7, 7]), 8).tolist()
    assert counts == [[0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 2.0]] * 2
