"""Models and tokenizers that are wrong in one way and right in all others, to make wrong generation loops of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Altered:
    """Everything of `right`, apart from `changes`; called, it calls `call(right, ...)` if that is given."""

    def __init__(self, right: Any, call: Callable | None = None, **changes: Any):
        self._right = right
        self._call = call
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._right, *args, **kwargs) if self._call else self._right(*args, **kwargs)


def endless(generate: Callable) -> Callable:
    """`generate`, for which no token ends a text."""

    def wrong(model, tokenizer, *args, **kwargs):
        return generate(Altered(model, generation_config=None), Altered(tokenizer, eos_token_id=None), *args, **kwargs)

    return wrong


def one_token_more(generate: Callable) -> Callable:
    """`generate`, which goes one token beyond `max_new_tokens`."""

    def wrong(model, tokenizer, prompt, max_new_tokens=50, temperature=1.0, *, seed=None):
        return generate(model, tokenizer, prompt, max_new_tokens + 1, temperature, seed=seed)

    return wrong


def calling(generate: Callable, call: Callable) -> Callable:
    """`generate`, in which `call(model, input_ids, **kwargs)` stands for a call of the model."""

    def wrong(model, *args, **kwargs):
        return generate(Altered(model, call), *args, **kwargs)

    return wrong
