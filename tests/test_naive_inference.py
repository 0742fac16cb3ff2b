"""Cycle 1: generation without a KV cache, the whole text going through the model at every step."""

from __future__ import annotations

import pytest
import torch
from guide_models import SUBJECTS, calls_of, subject

from twinserve.engine.inference import generate_naive, generate_with_kv_cache
from twinserve.settings.errors import InputError


@pytest.mark.parametrize("name", SUBJECTS)
def test_naive_inference(name):
    """A text is generated; it stops at the end-of-sequence token; it never has more than max_new_tokens."""
    of = subject(name)
    prompt = of.prompts[0]
    num_prompt = len(of.tokenizer.encode(prompt))
    with calls_of(of.model) as calls:
        text = generate_naive(of.model, of.tokenizer, prompt, max_new_tokens=6, temperature=0.0)
    assert of.num_new(prompt, text) == 6
    assert text != generate_naive(of.model, of.tokenizer, prompt, max_new_tokens=6, temperature=20.0), "drawn"
    assert [call.num_tokens for call in calls] == list(range(num_prompt, num_prompt + 6)), "the whole text, every time"
    assert all(call.past_key_values is None for call in calls), "nothing is cached"

    expected = of.greedy(of.ending_prompt, 50)
    num_new = len(expected) - len(of.tokenizer.encode(of.ending_prompt))
    assert expected[-1] == of.tokenizer.eos_token_id and num_new < 50
    with calls_of(of.model) as calls:
        text = generate_naive(of.model, of.tokenizer, of.ending_prompt, max_new_tokens=50, temperature=0.0)
    assert text == of.tokenizer.decode(expected), "up to the end-of-sequence token and not beyond"
    assert len(calls) == num_new, "nothing is computed beyond it either"

    for max_new_tokens in (0, 1, num_new - 1):
        text = generate_naive(of.model, of.tokenizer, of.ending_prompt, max_new_tokens, temperature=0.0)
        assert of.num_new(of.ending_prompt, text) == max_new_tokens


@pytest.mark.parametrize("name", SUBJECTS)
def test_compare_with_hf_generate(name):
    """At a temperature near 0, every token is the one of transformers' own greedy `generate`."""
    of = subject(name)
    for prompt in (*of.prompts, of.ending_prompt):
        text = generate_naive(of.model, of.tokenizer, prompt, max_new_tokens=8, temperature=1e-6)
        assert text == of.tokenizer.decode(of.greedy(prompt, 8))


@pytest.mark.parametrize("generate", [generate_naive, generate_with_kv_cache])
def test_a_seed_makes_the_draws_repeatable(generate):
    of = subject("tiny")
    arguments = of.model, of.tokenizer, of.prompts[0], 8

    seeded = [generate(*arguments, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert generate(*arguments, temperature=0.0, seed=1) == of.tokenizer.decode(of.greedy(of.prompts[0], 8))

    torch.manual_seed(0)
    unseeded = [generate(*arguments, temperature=2.0) for _ in range(2)]
    torch.manual_seed(0)
    assert unseeded[0] != unseeded[1]
    assert unseeded[0] == generate(*arguments, temperature=2.0)


@pytest.mark.parametrize("generate", [generate_naive, generate_with_kv_cache])
def test_the_models_own_end_tokens_end_a_text_too(generate, monkeypatch):
    of = subject("tiny")
    prompt = of.prompts[1]
    tokens = of.greedy(prompt, 10)
    num_prompt = len(of.tokenizer.encode(prompt))
    monkeypatch.setattr(of.model.generation_config, "eos_token_id", [2, tokens[num_prompt + 4]])
    assert generate(of.model, of.tokenizer, prompt, 10, 0.0) == of.tokenizer.decode(tokens[: num_prompt + 5])


@pytest.mark.parametrize("generate", [generate_naive, generate_with_kv_cache])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": ""}, "prompt is '', expected a text of at least one token"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected an integer >= 0"),
        ({"temperature": -0.5}, "temperature is -0.5, expected a number >= 0"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_a_line(generate, change, problem):
    of = subject("tiny")
    with pytest.raises(InputError, match=problem):
        generate(of.model, of.tokenizer, **{"prompt": of.prompts[0], **change})
