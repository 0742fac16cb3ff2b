"""What the guide's tests generate with: a tiny random Llama and its tokenizer of words, and SmolLM2 if it is cached."""

from __future__ import annotations

import functools
import os
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

from twinserve.engine.hub import fetch
from twinserve.engine.hub.package_index import is_fetched

SUBJECTS = ["tiny", "smollm2"]


@dataclass(frozen=True)
class Subject:
    """A model, its tokenizer and prompts for them.

    Attributes:
        prompts: their greedy completions have 50 tokens and more (SmolLM2's: 12).
        ending_prompt: its greedy completion ends with the tokenizer's end-of-sequence token before that.
    """

    model: nn.Module
    tokenizer: Any
    prompts: tuple[str, ...]
    ending_prompt: str

    def greedy(self, prompt: str, max_new_tokens: int) -> list[int]:
        """The tokens of `prompt` and of transformers' own greedy completion, which hang on no rounding."""
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.cat(out.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > NEAR_TIE, f"equality after {prompt!r} would mean nothing"
        return out.sequences[0].tolist()

    def num_new(self, prompt: str, text: str) -> int:
        """How many tokens `text` has beyond `prompt`, with which it begins."""
        assert text.startswith(prompt), f"{text!r} does not begin with {prompt!r}"
        return len(self.tokenizer.encode(text)) - len(self.tokenizer.encode(prompt))


@functools.cache
def subject(name: str) -> Subject:
    """One of SUBJECTS; the test that asks for SmolLM2 is skipped where it is not in the cache."""
    return _tiny() if name == "tiny" else _smollm2()


def _tiny() -> Subject:
    """The end-of-sequence token is one that the completion of one prompt has and those of the others have not."""
    judge = judge_of("llama")
    prompts = [[9] * 20, [300], [11, 400, 13, 12, 15, 16, 17]]
    unending = {token_id for prompt in prompts for token_id in judge.generate(prompt, 50)}
    ending_prompt = [5, 6, 7]
    answer = judge.generate(ending_prompt, 20)
    eos = next(token_id for token_id in answer[3:] if token_id not in unending | set(answer[:3]))
    return Subject(judge.model, word_tokenizer(eos), tuple(words(*prompt) for prompt in prompts), words(*ending_prompt))


def _smollm2() -> Subject:
    name = "smollm2-135m"
    if not is_fetched(name) and os.environ.get("TWINSERVE_FETCH") != "1":
        pytest.skip(f"{name} is not in the cache: TWINSERVE_FETCH=1 lets the tests fetch it")
    folder = fetch(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Subject(
        model=LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False),
        tokenizer=tokenizer,
        prompts=("The capital of France is",),
        ending_prompt="<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    )


def word(token_id: int) -> str:
    """The word of a token of the tiny tokenizer; all are of one length, so none lies within another."""
    return f"w{token_id:03}"


def words(*token_ids: int) -> str:
    """A text of these tokens."""
    return " ".join(map(word, token_ids))


def word_tokenizer(eos_token_id: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w000 to w511, one token each: a text of them becomes the same tokens again."""
    tokenizer = Tokenizer(WordLevel({word(token_id): token_id for token_id in range(512)}, unk_token=word(0)))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=word(eos_token_id))


@dataclass(frozen=True)
class Call:
    """A call of a model: tokens given, tokens in the KV cache before and after it (None without a cache), the cache."""

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
        before.append(length(kwargs.get("cache", kwargs.get("past_key_values"))))

    def returned(module: nn.Module, args: tuple, kwargs: dict, outputs: Any) -> None:
        cache = outputs.cache if hasattr(outputs, "cache") else outputs.past_key_values
        calls.append(Call(args[0].shape[-1], before.pop(), length(cache), cache))

    hooks = [
        model.register_forward_pre_hook(called, with_kwargs=True),
        model.register_forward_hook(returned, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
