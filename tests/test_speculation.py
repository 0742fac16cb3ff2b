"""Speculation: a smaller model guesses, the model verifies; the text is as likely as without."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from engine_judge import tiny
from guide_models import calls_of, subject
from scipy.stats import chi2
from transformers import LlamaConfig, LlamaForCausalLM

from twinserve.engine.inference import accepted_run, generate_speculative, generate_with_kv_cache
from twinserve.settings.errors import InputError


def draft_of(model):
    """A model of one layer with the tokens of another."""
    return tiny(LlamaForCausalLM, LlamaConfig, vocab_size=model.config.vocab_size, num_hidden_layers=1)


@pytest.mark.parametrize("num_drafts", [1, 4])
def test_speculative_greedy_text_is_that_without_guesses(num_drafts):
    of = subject("tiny")
    for drafting in (of.model, draft_of(of.model)):
        for prompt, number in ((of.prompts[0], 12), (of.prompts[-1], 7), (of.ending_prompt, 40)):
            text = generate_speculative(
                of.model, drafting, of.tokenizer, prompt, number, temperature=0.0, num_drafts=num_drafts
            )
            assert text == of.tokenizer.decode(of.greedy(prompt, number))


def test_speculative_greedy_text_of_smollm2_is_that_without_guesses():
    """Guesses that are all right, and, to the end of an answer, guesses that are nearly all wrong."""
    of = subject("smollm2")
    for drafting, prompt, number in ((of.model, of.prompts[0], 9), (draft_of(of.model), of.ending_prompt, 40)):
        text = generate_speculative(of.model, drafting, of.tokenizer, prompt, number, temperature=0.0)
        assert text == of.tokenizer.decode(of.greedy(prompt, number))


def test_guesses_that_are_right_save_passes():
    of = subject("tiny")
    prompt, number = of.prompts[0], 15
    with calls_of(of.model) as calls:
        generate_speculative(of.model, of.model, of.tokenizer, prompt, number, temperature=0.0, num_drafts=4)
    passes = [call.num_tokens for call in calls if call.num_tokens > 1]
    num_prompt = len(of.tokenizer.encode(prompt))
    assert passes[0] == num_prompt, "the first guess"
    assert passes[1:] == [num_prompt + 4, 2, 5, 2, 5], "verified: five tokens a pass; what was guessed last comes first"


def test_texts_of_no_tokens_and_of_one():
    of = subject("tiny")
    for number in (0, 1):
        text = generate_speculative(of.model, of.model, of.tokenizer, of.prompts[0], number, temperature=0.0)
        assert of.num_new(of.prompts[0], text) == number


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0])
def test_what_is_accepted_is_distributed_as_the_model_has_it(sharpness):
    """20,000 runs of two guesses: the first two tokens, by a chi-square test, whatever the guesses are drawn from."""
    generator = torch.Generator().manual_seed(7)

    def drawn(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)

    own, chance = drawn((3, 8), 1.0), drawn((2, 8), sharpness)

    def uniform() -> float:
        return torch.rand((), generator=generator, dtype=torch.float64).item()

    number = 20_000
    firsts: Counter[int] = Counter()
    seconds: Counter[int] = Counter()
    for _ in range(number):
        guesses = [int(torch.multinomial(row, 1, generator=generator)) for row in chance]
        run = accepted_run(own, list(chance), guesses, uniform)
        assert 1 <= len(run) <= 3 and run[:-1] == guesses[: len(run) - 1]
        firsts[run[0]] += 1
        if len(run) > 1:
            seconds[run[1]] += 1
    for place, counts in enumerate((firsts, seconds)):
        total = sum(counts.values())
        statistic = sum((counts[token] - p * total) ** 2 / (p * total) for token, p in enumerate(own[place].tolist()))
        assert chi2.sf(statistic, 7) > 0.001, f"place {place}: {statistic:.1f}"


def test_a_seed_makes_the_draws_repeatable():
    of = subject("tiny")
    arguments = of.model, draft_of(of.model), of.tokenizer, of.prompts[0], 8
    seeded = [generate_speculative(*arguments, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    torch.manual_seed(0)
    unseeded = [generate_speculative(*arguments, temperature=2.0) for _ in range(2)]
    torch.manual_seed(0)
    assert unseeded[0] != unseeded[1] and unseeded[0] == generate_speculative(*arguments, temperature=2.0)


def test_it_needs_fewer_passes_than_tokens_at_a_temperature_too():
    of = subject("tiny")
    with calls_of(of.model) as calls:
        generate_speculative(of.model, draft_of(of.model), of.tokenizer, of.prompts[0], 20, 5.0, seed=3)
    speculative = len(calls)
    with calls_of(of.model) as calls:
        generate_with_kv_cache(of.model, of.tokenizer, of.prompts[0], 20, 5.0, seed=3)
    assert speculative < len(calls)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": ""}, "prompt is '', expected a text of at least one token"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected an integer >= 0"),
        ({"num_drafts": 0}, "num_drafts is 0, expected an integer >= 1"),
    ],
)
def test_bad_input_is_refused(change, problem):
    of = subject("tiny")
    arguments = {"prompt": "x", "max_new_tokens": 1} | change
    with pytest.raises(InputError, match=problem):
        generate_speculative(of.model, of.model, of.tokenizer, **arguments)


def test_a_draft_with_other_tokens_is_refused():
    of = subject("tiny")
    other = tiny(LlamaForCausalLM, LlamaConfig, vocab_size=of.model.config.vocab_size + 1, num_hidden_layers=1)
    with pytest.raises(InputError, match="vocab_size of the draft is"):
        generate_speculative(of.model, other, of.tokenizer, of.prompts[0], 3)
