"""Cycle 2: generation with the model's own KV cache, each token going through the model once."""

from __future__ import annotations

import pytest
import torch
from guide_models import SUBJECTS, calls_of, subject
from transformers import DynamicCache

from twinserve.engine.inference import generate_naive, generate_with_kv_cache, inspect_past_key_values


@pytest.mark.parametrize("name", SUBJECTS)
def test_kv_cache_correctness(name):
    """The text is that of naive generation, greedy or drawn, though only the last token goes through the model."""
    of = subject(name)
    for prompt in (*of.prompts, of.ending_prompt):
        for temperature, seed in ((0.0, None), (1.0, 5)):
            arguments = of.model, of.tokenizer, prompt, 6, temperature
            expected = generate_naive(*arguments, seed=seed)
            with calls_of(of.model) as calls:
                assert generate_with_kv_cache(*arguments, seed=seed) == expected
            num_prompt = len(of.tokenizer.encode(prompt))
            later = range(num_prompt, num_prompt + len(calls) - 1)
            assert [call.num_tokens for call in calls] == [num_prompt] + [1 for _ in later]
            assert [call.cached_before for call in calls[1:]] == list(later)
            assert len(calls) == of.num_new(prompt, expected), "nothing is computed that is not needed"


@pytest.mark.parametrize("name", SUBJECTS)
def test_past_key_values_growth(name, capsys):
    """The cache holds the prompt after the first step, and exactly one token more after every later one."""
    of = subject(name)
    prompt = of.prompts[0]
    with calls_of(of.model) as calls:
        generate_with_kv_cache(of.model, of.tokenizer, prompt, max_new_tokens=8, temperature=0.0)
    num_prompt = len(of.tokenizer.encode(prompt))
    assert [call.cached_after for call in calls] == list(range(num_prompt, num_prompt + 8))

    config = of.model.config
    cache = calls[-1].past_key_values
    shape = torch.Size([1, config.num_key_value_heads, num_prompt + 7, config.head_dim])
    assert all(layer.keys.shape == layer.values.shape == shape for layer in cache.layers), "in every layer"
    lines = [
        f"Number of layers: {config.num_hidden_layers}",
        "Each layer contains: 2 tensors (key, value)",
        f"Key shape: {shape}",
        f"Value shape: {shape}",
    ]
    for form in (cache, tuple((layer.keys, layer.values) for layer in cache.layers)):
        inspect_past_key_values(form)
        assert capsys.readouterr().out.splitlines() == lines
    inspect_past_key_values(((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)),))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "Key shape: torch.Size([1, 2, 3, 4])",
        "Value shape: torch.Size([1, 2, 3, 5])",
    ]


@pytest.mark.parametrize("empty", [(), DynamicCache(), DynamicCache(config=subject("tiny").model.config)])
def test_a_cache_with_nothing_in_it_is_refused(empty):
    with pytest.raises(ValueError, match="nothing is cached yet"):
        inspect_past_key_values(empty)
