"""Generation by calling a transformers model: from the whole text for each token, with its KV cache, or with drafts.

The first two cycles of the learning guide, and speculative decoding beside them. Nothing is paged or batched here: this
is what the engine is measured against.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from twinserve.engine.sampler import GREEDY_BELOW, sample, sample_with_temperature
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


@torch.inference_mode()
def generate_speculative(
    model: Any,
    draft: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 50,
    temperature: float = 1.0,
    *,
    num_drafts: int = 4,
    seed: int | None = None,
) -> str:
    """Complete `prompt`, a smaller model guessing tokens that the model then verifies in one pass (arXiv:2211.17192).

    A pass over a few tokens takes about as long as one over a single token, as the weights are read once either way; so
    every guess that is right is a pass less. The text is as likely as without guesses: a guess that `draft` drew with
    probability q and that the model gives p is accepted with probability min(1, p / q), and the first that is not is
    replaced by a token drawn from what the model gives beyond q. Without temperature it is the very same text.

    Args:
        model: a transformers causal language model, in eval mode.
        draft: a smaller one with the same tokens.
        num_drafts: tokens that are guessed for each pass.
        others: as of `generate_naive`.

    Returns:
        The prompt and what was generated, decoded together, special tokens included.

    Raises:
        InputError: the prompt has no tokens, a number is negative, there are no drafts, or `draft` has other tokens.
    """
    token_ids = _prompt_token_ids(tokenizer, prompt, max_new_tokens, temperature)
    if num_drafts < 1:
        raise InputError("expected an integer >= 1", field="num_drafts", value=num_drafts)
    sizes = draft.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(f"expected {sizes[1]}, as the model's", field="vocab_size of the draft", value=sizes[0])
    uniform = (lambda: torch.rand(()).item()) if seed is None else random.Random(seed).random
    end_token_ids, end = _end_token_ids(model, tokenizer), len(token_ids) + max_new_tokens
    verifying, guessing = _WithCache(model), _WithCache(draft)
    while len(token_ids) < end:
        guesses: list[int] = []
        chances: list[Tensor] = []
        for _ in range(min(num_drafts, end - len(token_ids) - 1)):
            chances.append(_probabilities(guessing.logits([*token_ids, *guesses], 1), temperature)[0])
            guesses.append(_drawn_from(chances[-1], uniform()))
        logits = verifying.logits([*token_ids, *guesses], 1 + len(guesses))
        run = accepted_run(_probabilities(logits, temperature), chances, guesses, uniform)
        ends = [number for number, token in enumerate(run) if token in end_token_ids]
        token_ids += run[: ends[0] + 1] if ends else run
        if ends:
            break
        for cached in (verifying, guessing):
            cached.keep(len(token_ids) - 1)
    return tokenizer.decode(token_ids)


def accepted_run(
    probabilities: Tensor, chances: Seq[Tensor], guesses: Seq[int], uniform: Callable[[], float]
) -> list[int]:
    """The tokens that come of a pass over guesses: those that are accepted, and one more.

    Args:
        probabilities: [guesses + 1, vocab], what the model gives in the place of each guess, and behind the last.
        chances: for each guess [vocab], what it was drawn from.
        uniform: draws a number in [0, 1).
    """
    run: list[int] = []
    for own, chance, guess in zip(probabilities, chances, guesses, strict=False):
        if uniform() * chance[guess] >= own[guess]:
            left = (own - chance).clamp(min=0)
            return [*run, _drawn_from(left / left.sum(), uniform())]
        run.append(guess)
    return [*run, _drawn_from(probabilities[len(guesses)], uniform())]


class _WithCache:
    """A model, and its KV of the tokens that it was given."""

    def __init__(self, model: Any) -> None:
        self._model, self._name, self._cache, self._length = model, cache_name(model), None, 0

    def logits(self, token_ids: list[int], count: int) -> Tensor:
        """The logits [count, vocab] behind each of the last `count` tokens of a text that begins as what is kept."""
        input_ids = torch.tensor([token_ids[self._length :]], device=self._model.device)
        outputs = self._model(input_ids, use_cache=True, **{self._name: self._cache})
        self._cache, self._length = getattr(outputs, self._name), len(token_ids)
        logits: Tensor = outputs.logits[0, -count:]
        return logits

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if self._cache is not None and length < self._length:
            self._cache.crop(length - self._length)
            self._length = length


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    """What tokens are drawn from [tokens, vocab]; without temperature the most probable one is certain."""
    if temperature < GREEDY_BELOW:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
    return (logits.double() / temperature).softmax(dim=-1)


def _drawn_from(probabilities: Tensor, uniform: float) -> int:
    """The token at which the cumulative probabilities [vocab] pass a number in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).item())


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
