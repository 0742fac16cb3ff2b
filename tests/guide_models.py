"""What the guide's tests generate with: a tiny random Llama with a tokenizer of words, and SmolLM2 where it is cached."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_judge import NEAR_TIE, judge_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from twinserve.engine.hub.package_index import PACKAGED_MODELS, is_fetched
from twinserve.engine.hub.resolve import resolve_model

SMOLLM2 = "smollm2-135m"
SUBJECTS = ["tiny", "smollm2"]


@dataclass(frozen=True)
class Subject:
    """A model, its tokenizer and prompts for them."""

    model: nn.Module
    tokenizer: Any
    prompts: tuple[str, ...]

    def greedy(self, prompt: str, max_new_tokens: int, eos_token_id: int | None = None) -> list[int]:
        """The tokens of `prompt` and of transformers' own greedy completion, which hang on no rounding."""
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos_token_id,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.cat(out.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > NEAR_TIE, f"equality after {prompt!r} would mean nothing"
        return out.sequences[0].tolist()

    def completion(self, prompt: str, text: str) -> list[int]:
        """The tokens that `text` has beyond `prompt`, with which it begins."""
        prompt_ids, ids = self.tokenizer.encode(prompt), self.tokenizer.encode(text)
        assert ids[: len(prompt_ids)] == prompt_ids, f"{text!r} does not begin with {prompt!r}"
        return ids[len(prompt_ids) :]


def word(token_id: int) -> str:
    """The word of a token of the tiny tokenizer; all are of one length, so none lies within another."""
    return f"w{token_id:03}"


def words(*token_ids: int) -> str:
    """A text of these tokens."""
    return " ".join(map(word, token_ids))


def word_tokenizer(eos_token_id: int = 2) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w000 to w511, one token each; every text it makes becomes the same tokens again."""
    tokenizer = Tokenizer(WordLevel({word(token_id): token_id for token_id in range(512)}, unk_token=word(0)))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=word(eos_token_id))


@functools.cache
def subject(name: str) -> Subject:
    """One of SUBJECTS; skips the test that asks for SmolLM2 where it is not in the cache."""
    if name == "tiny":
        prompts = (words(5, 6, 7), words(*[9] * 20), words(300), words(11, 400, 13, 12, 15, 16, 17))
        return Subject(judge_of("llama").model, word_tokenizer(), prompts)
    if not is_fetched(SMOLLM2):
        pytest.skip(f"{SMOLLM2} is not in the cache: `twinserve model fetch {SMOLLM2}` brings it")
    assert SMOLLM2 in PACKAGED_MODELS
    folder = resolve_model(SMOLLM2)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    prompts = ("The capital of France is", "def add(a, b):\n", "1, 2, 3, 4,")
    return Subject(model, AutoTokenizer.from_pretrained(folder), prompts)


@dataclass(frozen=True)
class Call:
    """A call of a model: tokens given, tokens in the KV cache before and after it (None without a cache)."""

    num_tokens: int
    cached_before: int | None
    cached_after: int | None
    past_key_values: Any


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[Call]]:
    """Notes how a transformers model is called."""
    calls: list[Call] = []
    before: list[int | None] = []

    def length(cache: Any) -> int | None:
        return None if cache is None else cache.get_seq_length()

    def called(module: nn.Module, args: tuple, kwargs: dict) -> None:
        before.append(length(kwargs.get("past_key_values")))

    def returned(module: nn.Module, args: tuple, kwargs: dict, outputs: Any) -> None:
        input_ids = args[0] if args else kwargs["input_ids"]
        cache = outputs.past_key_values
        calls.append(Call(input_ids.shape[-1], before.pop(), length(cache), cache))

    hooks = [
        model.register_forward_pre_hook(called, with_kwargs=True),
        model.register_forward_hook(returned, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
