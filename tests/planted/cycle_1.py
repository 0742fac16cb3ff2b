"""Wrong versions of cycle 1: sampling, and generation without a KV cache."""

from __future__ import annotations

import torch
from models import calling, endless, one_token_more
from plants import planted

SAMPLER = "twinserve.engine.sampler"
GENERATE = "twinserve.engine.inference:generate_naive"


@planted(f"{SAMPLER}:greedy_sample", "takes the least probable token", "test_compare_with_hf_generate")
def _(right):
    return lambda logits: int(logits.argmin())


@planted(f"{SAMPLER}:sample_with_temperature", "ignores the temperature", "test_compare_with_hf_generate")
def _(right):
    return lambda logits, temperature, *, seed=None: right(logits, 1.0, seed=seed)


@planted(f"{SAMPLER}:sample_with_temperature", "multiplies by the temperature", "test_compare_with_hf_generate")
def _(right):
    return lambda logits, temperature: int((logits * temperature).softmax(-1).multinomial(1))


@planted(f"{SAMPLER}:sample_with_temperature", "is always greedy", "test_naive_inference")
def _(right):
    return lambda logits, temperature, *, seed=None: int(logits.argmax())


@planted(GENERATE, "does not stop at the end-of-sequence token", "test_naive_inference")
def _(right):
    return endless(right)


@planted(GENERATE, "generates one token too many", "test_naive_inference")
def _(right):
    return one_token_more(right)


@planted(GENERATE, "returns the completion alone", "test_naive_inference")
def _(right):
    return lambda model, tokenizer, prompt, *args, **kwargs: right(model, tokenizer, prompt, *args, **kwargs)[
        len(prompt) :
    ]


@planted(GENERATE, "uses the KV cache", "test_naive_inference")
def _(right):
    from twinserve.engine.inference import generate_with_kv_cache

    return generate_with_kv_cache


@planted(GENERATE, "gives the model the last token alone", "test_compare_with_hf_generate")
def _(right):
    return calling(right, lambda model, input_ids, **kwargs: model(input_ids[:, -1:], **kwargs))


@planted(GENERATE, "takes the logits of the token before the last", "test_compare_with_hf_generate")
def _(right):
    def call(model, input_ids, **kwargs):
        outputs = model(input_ids, **kwargs)
        outputs.logits = torch.roll(outputs.logits, 1, dims=1)
        return outputs

    return calling(right, call)
