"""Which tokens end a text beside those that a request names."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from twinserve.policies import SamplingParams
from twinserve.settings.errors import InputError


def with_stops(params: SamplingParams, eos_token_ids: Seq[int], vocab_size: int) -> SamplingParams:
    """`params` that also end at what ends a model's texts beside the first of its `eos_token_ids`, and at that where
    the sampler has to know it; unless they ignore the end of a text.

    Raises:
        InputError: they name a token that the model has not, or something that is no token.
    """
    biases: Any = params.logit_bias
    if not isinstance(biases, list | tuple) or not all(map(_is_bias, biases)):
        raise InputError("expected pairs of a token and a number", field="logit_bias", value=biases)
    if not isinstance(params.stop_token_ids, list | tuple):
        raise InputError("expected a tuple of tokens", field="stop_token_ids", value=params.stop_token_ids)
    named = {"logit_bias": [token_id for token_id, _ in biases], "stop_token_ids": params.stop_token_ids}
    for name, token_ids in named.items():
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                problem = f"expected an id from 0 to {vocab_size - 1}"
                raise InputError(problem, field=f"a token of {name}", value=token_id)
    if params.ignore_eos:
        return params
    # A tokenizer may know ids that the model has not: none of them is ever sampled.
    ends = [token_id for token_id in eos_token_ids[0 if params.min_tokens else 1 :] if token_id < vocab_size]
    return replace(params, stop_token_ids=tuple(dict.fromkeys((*params.stop_token_ids, *ends))))


def _is_bias(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and type(pair[1]) in (int, float) and abs(pair[1]) <= 1e30
