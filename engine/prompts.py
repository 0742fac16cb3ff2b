"""Prompts as token ids: those that somebody gives, and those that are made for the requests of a trace."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from twinserve.engine.models.source import ModelSource
from twinserve.settings.errors import InputError
from twinserve.traces.request import TokenMaker


def encode_prompt(prompt: str | list[int], tokenizer: Any, vocab_size: int, index: int) -> list[int]:
    """Token ids of a prompt, the `index`th of those given.

    Args:
        tokenizer: None if the model has none.
        vocab_size: of the model.

    Raises:
        InputError: a text without a tokenizer, or a token id that the model has not, a tokenizer's or a given one.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            problem = "expected token ids, as the model has no tokenizer"
            raise InputError(problem, field=f"prompts[{index}]", value=prompt)
        token_ids: list[int] = list(tokenizer.encode(well_formed(prompt)))
    else:
        token_ids = prompt
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            problem = f"expected an id from 0 to {vocab_size - 1}"
            raise InputError(problem, field=f"a token of prompts[{index}]", value=token_id)
    return token_ids


def well_formed(text: str) -> str:
    """A text with U+FFFD in place of each half of a surrogate pair that stands alone, which no UTF-8 can say."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def default_token_maker(source: ModelSource) -> TokenMaker:
    """Makes tokens from the longest run of a model's ids that do not end a text."""
    bounds = [-1, *sorted(source.eos_token_ids), source.config.vocab_size]
    _, first, end = max((end - start - 1, start + 1, end) for start, end in pairwise(bounds))
    return TokenMaker(end, first)


def check_token_maker(maker: TokenMaker, source: ModelSource) -> None:
    """Refuse a maker one of whose tokens is beyond a model's vocabulary or ends a text.

    Raises:
        InputError: there is such a token, or none at all.
    """
    vocab_size = source.config.vocab_size
    if not 0 <= maker.first_id < maker.vocab_size <= vocab_size:
        raise InputError(f"expected 0 <= first_id < vocab_size <= {vocab_size}", field="token_maker", value=maker)
    inside = [token_id for token_id in source.eos_token_ids if maker.first_id <= token_id < maker.vocab_size]
    if inside:
        raise InputError(f"expected ids without {inside[0]}, which ends a text", field="token_maker", value=maker)
