"""Wrong versions of cycle 2: generation with the model's own KV cache."""

from __future__ import annotations

import torch
from models import calling, endless, one_token_more
from plants import planted

GENERATE = "twinserve.engine.inference:generate_with_kv_cache"
INSPECT = "twinserve.engine.inference:inspect_past_key_values"


def with_the_tokens_before(generate, num_before):
    """`generate`, which gives the model tokens again that the cache has already: `num_before` of them, or None: all."""

    def wrong(model, *args, **kwargs):
        seen = []

        def call(model, input_ids, **kwargs):
            seen.append(input_ids)
            known = torch.cat(seen, dim=1)
            first = 0 if num_before is None or len(seen) == 1 else known.shape[1] - 1 - num_before
            return model(known[:, first:], **kwargs)

        return calling(generate, call)(model, *args, **kwargs)

    return wrong


@planted(GENERATE, "computes the whole text every time, without a cache", "test_kv_cache_correctness")
def _(right):
    from twinserve.engine.inference import generate_naive

    return generate_naive


@planted(GENERATE, "gives the whole text again beside the cache", "test_kv_cache_correctness")
def _(right):
    return with_the_tokens_before(right, None)


@planted(GENERATE, "gives the last token alone and drops the cache", "test_kv_cache_correctness")
def _(right):
    return calling(right, lambda model, input_ids, use_cache, **cache: model(input_ids, use_cache=use_cache))


@planted(GENERATE, "does not stop at the end-of-sequence token", "test_kv_cache_correctness")
def _(right):
    return endless(right)


@planted(GENERATE, "generates one token too many", "test_kv_cache_correctness")
def _(right):
    return one_token_more(right)


@planted(GENERATE, "gives the last two tokens beside the cache", "test_past_key_values_growth")
def _(right):
    return with_the_tokens_before(right, 1)


@planted(INSPECT, "prints nothing", "test_past_key_values_growth")
def _(right):
    return lambda past_key_values: None


@planted(INSPECT, "shows the key's shape as the value's", "test_past_key_values_growth")
def _(right):
    def wrong(past_key_values):
        layers = getattr(past_key_values, "layers", None)
        pairs = past_key_values if layers is None else [(layer.keys, layer.values) for layer in layers]
        right(tuple((key, key) for key, _ in pairs))

    return wrong


@planted(INSPECT, "counts the layers one short", "test_past_key_values_growth")
def _(right):
    def wrong(past_key_values):
        layers = getattr(past_key_values, "layers", None)
        pairs = past_key_values if layers is None else [(layer.keys, layer.values) for layer in layers]
        right(tuple(pairs)[1:] or pairs)

    return wrong
