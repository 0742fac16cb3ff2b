"""Tiny random models made by transformers, and the judge that holds generated tokens against transformers itself."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from twinserve.policies import Batch, SamplingParams, Sequence
from twinserve.traces.request import Request

NEAR_TIE = 1e-4
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "eos_token_id": 2,
}


def tiny(model_class: type[nn.Module], config_class: type, *, seed: int = 0, **fields) -> nn.Module:
    """A model with random weights large enough that its outputs vary and its best two logits lie apart.

    Norms and biases are random too: as transformers makes them, all 1 and 0, one in another's place would go unseen.
    """
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, "initializer_range": 0.4, **fields})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.5)
    return model


# Of 16 frequencies (head_dim 32) some are kept, some slowed down and some blended.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LINEAR = {"rope_type": "linear", "factor": 3.0}
# Of 16 frequencies some are kept, some slowed down and some blended; sines and cosines are 1.14 times as long.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
YARN_SCALED = YARN | {"beta_fast": 8, "beta_slow": 2, "truncate": False, "mscale": 1.5, "mscale_all_dim": 0.5}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny(LlamaForCausalLM, LlamaConfig),
    "llama-tied": lambda: tiny(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True, head_dim=16),
    "llama-bias": lambda: tiny(LlamaForCausalLM, LlamaConfig, attention_bias=True, num_key_value_heads=1),
    "qwen3": lambda: tiny(Qwen3ForCausalLM, Qwen3Config, head_dim=64),
    "qwen3-tied": lambda: tiny(Qwen3ForCausalLM, Qwen3Config, tie_word_embeddings=True, num_key_value_heads=4, seed=1),
    "mistral": lambda: tiny(MistralForCausalLM, MistralConfig, sliding_window=None),
    "llama-biases": lambda: tiny(LlamaForCausalLM, LlamaConfig, attention_bias=True, mlp_bias=True, seed=4),
    "llama-llama3": lambda: tiny(LlamaForCausalLM, LlamaConfig, rope_scaling=dict(LLAMA3), rope_theta=500.0),
    "llama-linear": lambda: tiny(LlamaForCausalLM, LlamaConfig, rope_scaling=dict(LINEAR), tie_word_embeddings=True),
    "qwen3-bias": lambda: tiny(Qwen3ForCausalLM, Qwen3Config, attention_bias=True, rope_scaling=dict(LINEAR)),
    "qwen3-llama3": lambda: tiny(Qwen3ForCausalLM, Qwen3Config, rope_scaling=dict(LLAMA3), tie_word_embeddings=True),
    "mistral-tied": lambda: tiny(MistralForCausalLM, MistralConfig, sliding_window=1024, tie_word_embeddings=True),
    "mistral-llama3": lambda: tiny(MistralForCausalLM, MistralConfig, sliding_window=None, rope_scaling=dict(LLAMA3)),
    "mistral-linear": lambda: tiny(
        MistralForCausalLM, MistralConfig, sliding_window=None, rope_scaling=dict(LINEAR), seed=2
    ),
    "mistral-window": lambda: tiny(MistralForCausalLM, MistralConfig, sliding_window=37),
    "qwen2": lambda: tiny(Qwen2ForCausalLM, Qwen2Config),
    "qwen2-windows": lambda: tiny(
        Qwen2ForCausalLM,
        Qwen2Config,
        use_sliding_window=True,
        sliding_window=20,
        max_window_layers=2,
        tie_word_embeddings=True,
        head_dim=64,
    ),  # fmt: skip
    "qwen3-windows": lambda: tiny(
        Qwen3ForCausalLM,
        Qwen3Config,
        use_sliding_window=True,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),  # fmt: skip
    "llama-yarn": lambda: tiny(LlamaForCausalLM, LlamaConfig, rope_scaling=dict(YARN), rope_theta=500.0),
    "qwen2-yarn": lambda: tiny(Qwen2ForCausalLM, Qwen2Config, rope_scaling=dict(YARN_SCALED), seed=4),
    "qwen3-yarn": lambda: tiny(
        Qwen3ForCausalLM, Qwen3Config, rope_scaling=YARN | {"attention_factor": 0.8}, tie_word_embeddings=True
    ),
}


@dataclass
class Judge:
    """Holds greedy tokens against transformers, which is given all of a text at once or generates it.

    Where the reference's two best logits are closer than NEAR_TIE, either of them is right: the difference is counted,
    and the reference goes on from the token that was taken. What was found right in one batch is not held against
    it again in another.
    """

    model: nn.Module
    near_ties: int = 0
    _generated: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    _right: set[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The reference's next tokens, whatever ends a text."""
        known = self._generated.get(tuple(prompt), [])
        if len(known) < num_tokens:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            known = self._generated[tuple(prompt)] = out[0, len(prompt) :].tolist()
        return known[:num_tokens]

    def best_two(self, prompt: list[int]) -> tuple[list[int], float]:
        """The two most probable next tokens, and by how much their logits differ."""
        values, ids = self.model(torch.tensor([prompt])).logits[0, -1].topk(2)
        return ids.tolist(), (values[0] - values[1]).item()

    def check(self, prompt: list[int], tokens: list[int]) -> None:
        """Assert that each of `tokens` is what the reference finds most probable after `prompt` and those before it."""
        if (tuple(prompt), tuple(tokens)) in self._right:
            return
        logits = self.model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :][: len(tokens)]
        best, margins = logits.topk(2).indices.tolist(), logits.topk(2).values.diff().neg()[:, 0].tolist()
        for place, (token, two, margin) in enumerate(zip(tokens, best, margins, strict=True)):
            if token == two[0]:
                continue
            assert margin < NEAR_TIE and token == two[1], (
                f"token {place} after a prompt of {len(prompt)} is {token}, the reference has {two[0]}, "
                f"{margin:.2e} above {two[1]}"
            )
            self.near_ties += 1
            print(f"near tie at token {place} after a prompt of {len(prompt)}: {margin:.2e}")
        self._right.add((tuple(prompt), tuple(tokens)))

    def check_all(self, sequences: list[Sequence], num_tokens: int | None = None) -> None:
        """Assert that each sequence's tokens are the reference's, and that there are `num_tokens` of them."""
        for seq in sequences:
            tokens = seq.completion_token_ids
            assert len(tokens) == (seq.sampling_params.max_tokens if num_tokens is None else num_tokens), seq
            self.check(seq.token_ids[: seq.num_prompt_tokens], tokens)


_judges: dict[str, Judge] = {}


def judge_of(name: str) -> Judge:
    """The judge of a tiny model, made once; its outputs vary and its own margin is far above rounding."""
    if name not in _judges:
        judge = Judge(MODELS[name]())
        generator = random.Random(1)
        margins, seen = [], set()
        for length in (1, 20, 60):
            text = [generator.randrange(3, 512) for _ in range(length)]
            end = len(text) + 30
            text += judge.generate(text, 30)
            values = judge.model(torch.tensor([text])).logits[0].topk(2).values
            margins += (values[:, 0] - values[:, 1])[length - 1 : end - 1].tolist()
            seen |= set(text[length:])
        assert min(margins) > 10 * NEAR_TIE, f"{name}: smallest margin {min(margins):.1e}"
        assert len(seen) > 30, f"{name}: only {len(seen)} different tokens in 90"
        _judges[name] = judge
    return _judges[name]


class Watcher:
    """A listener that notes what happened in a run, so that a test can say that its case came up."""

    def __init__(self) -> None:
        self.chunks = 0
        self.mixed_steps = 0
        self.hit_tokens = 0
        self.same_step_hits = 0
        self.preemptions = 0
        self.largest_batch = 0
        self.expected: list[int] = []
        self.ten_decided = threading.Event()

    def expect(self, request: Request, sampling: SamplingParams) -> None:
        self.expected.append(request.id)

    def ingested(self, seq: Sequence, number: int) -> None: ...

    def decided(self, batch: Batch) -> None:
        rows = batch.rows
        if batch.decision == 9:
            self.ten_decided.set()
        self.largest_batch = max(self.largest_batch, len(rows))
        self.chunks += sum(row.is_prompt and not row.samples for row in rows)
        self.mixed_steps += any(row.is_prompt for row in rows) and any(not row.is_prompt for row in rows)
        self.hit_tokens += sum(row.start for row in batch.admitted)
        self.preemptions += len(batch.preempted)
        written: set[int] = set()
        for row in rows:
            hit = row.start // row.seq.block_size if row in batch.admitted else 0
            self.same_step_hits += bool(written & set(row.seq.block_table[:hit]))
            written |= set(row.seq.block_table[hit:])

    def committed(self, batch: Batch) -> None: ...

    def finished(self, seq: Sequence) -> None: ...
