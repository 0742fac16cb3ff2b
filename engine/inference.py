"""Generation by calling a transformers model token by token: from the whole text each time, or with its KV cache.

The first two cycles of the learning guide. Nothing is paged or batched here: this is what the engine is measured
against. Both take the same steps and differ in what the model is given at each of them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from twinserve.engine.sampler import sample, sample_with_temperature
from twinserve.policies import SamplingParams
from twinserve.settings.errors import InputError


@torch.inference_mode()
def generate_naive(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 50,
    temperature: float = 1.0,
    *,
    seed: int | None = None,
) -> str:
    """Complete `prompt`, the whole text going through the model again for every new token.

    A text of n tokens costs 1 + 2 + ... + n tokens of computing, nearly all of it done before.

    Args:
        model: a transformers causal language model, in eval mode.
        tokenizer: its tokenizer.
        prompt: the text to complete; at least one token.
        max_new_tokens: the most tokens to generate. A token that ends the text, the tokenizer's or one of the model's
            generation config, ends it sooner.
        temperature: below 1e-5 the most probable token is taken.
        seed: makes the draws repeatable: each is a hash of the seed and the token's position, as in the engine. None
            draws by torch's generator.

    Returns:
        The prompt and what was generated, decoded together, special tokens included.

    Raises:
        InputError: the prompt has no tokens, or a number is negative.
    """
    token_ids = _prompt_token_ids(tokenizer, prompt, max_new_tokens, temperature)
    end_token_ids = _end_token_ids(model, tokenizer)
    for _ in range(max_new_tokens):
        outputs = model(torch.tensor([token_ids], device=model.device), use_cache=False)
        token_ids.append(_next_token(outputs.logits[0, -1], temperature, seed, position=len(token_ids)))
        if token_ids[-1] in end_token_ids:
            break
    return tokenizer.decode(token_ids)


@torch.inference_mode()
def generate_with_kv_cache(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 50,
    temperature: float = 1.0,
    *,
    seed: int | None = None,
) -> str:
    """Complete `prompt`, each token going through the model once: the keys and values before it are kept.

    The first step computes the prompt (prefill), every later one the token that the step before chose (decode).
    Arguments, result and errors are those of `generate_naive`, and so is the text, as far as rounding lets it.
    """
    token_ids = _prompt_token_ids(tokenizer, prompt, max_new_tokens, temperature)
    end_token_ids = _end_token_ids(model, tokenizer)
    past_name = cache_name(model)
    new_token_ids, past_key_values = token_ids, None
    for _ in range(max_new_tokens):
        input_ids = torch.tensor([new_token_ids], device=model.device)
        outputs = model(input_ids, use_cache=True, **{past_name: past_key_values})
        token_ids.append(_next_token(outputs.logits[0, -1], temperature, seed, position=len(token_ids)))
        if token_ids[-1] in end_token_ids:
            break
        new_token_ids, past_key_values = token_ids[-1:], getattr(outputs, past_name)
    return tokenizer.decode(token_ids)


def inspect_past_key_values(past_key_values: Any) -> None:
    """Print the layers of a model's KV cache, and the shapes [batch, kv_heads, tokens, head_dim] of its first layer.

    Args:
        past_key_values: a transformers cache (`DynamicCache`), or a tuple of (key, value) for each layer.

    Raises:
        ValueError: nothing is cached yet.
    """
    layers = past_key_values
    if hasattr(past_key_values, "layers"):
        layers = [(layer.keys, layer.values) for layer in past_key_values.layers]
    if not layers or layers[0][0] is None:
        raise ValueError("nothing is cached yet, expected the past_key_values that a model returned")
    key, value = layers[0]
    print(f"Number of layers: {len(layers)}")
    print(f"Each layer contains: {len(layers[0])} tensors (key, value)")
    print(f"Key shape: {key.shape}")
    print(f"Value shape: {value.shape}")


def _prompt_token_ids(tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float) -> list[int]:
    """The tokens of `prompt`, once it is clear that they can be completed."""
    if max_new_tokens < 0:
        raise InputError("expected an integer >= 0", field="max_new_tokens", value=max_new_tokens)
    if not temperature >= 0.0:
        raise InputError("expected a number >= 0", field="temperature", value=temperature)
    token_ids = list(tokenizer.encode(prompt))
    if not token_ids:
        raise InputError("expected a text of at least one token", field="prompt", value=prompt)
    return token_ids


def _end_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those that end it in transformers' own `generate`."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    return ends - {None}


def cache_name(model: Any) -> str:
    """What the model calls its KV cache: `past_key_values`, or `cache` in newer releases of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _next_token(logits: Tensor, temperature: float, seed: int | None, position: int) -> int:
    """The token at `position`, chosen by its `logits` [vocab]."""
    if seed is None:
        return sample_with_temperature(logits, temperature)
    return int(sample(logits[None], [SamplingParams(temperature=temperature, seed=seed)], [position]).item())
