"""verify: a model's folder as this engine runs it, held against transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twinserve.engine.device_queue import to_device, usable_device
from twinserve.engine.kv_cache import KVCache
from twinserve.engine.layers import AttentionChoice, AttentionMetadata, PagedAttention, choose_attention
from twinserve.engine.layers.attention import slots_of
from twinserve.engine.llm import LLM
from twinserve.engine.models import Decoder, ModelConfig, load_model
from twinserve.engine.models.loader import DTYPES
from twinserve.engine.models.source import load_tokenizer
from twinserve.engine.options import EngineOptions
from twinserve.engine.prompts import encode_prompt
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError

NEAR_TIE = 1e-4
"""Where the reference's logits of two tokens are closer than this, rounding decides between them."""
LOG_PROB_LIMIT = 1e-2
"""The largest difference of a token's log-probability that rounding in float32 explains, with room to spare."""

TEXT = Path(__file__).parent / "data" / "verify.txt"
WINDOW = 512
MAX_NUM_SEQS = 8
STEP_TOKENS = 64
# Prompts as pieces (start, length) of the text: many lengths, most of more than a step's tokens, one begun by another.
PROMPTS = [(0, 300), (40, 3), (100, 150), (0, 341), (330, 1), (400, 90), (500, 33), (620, 70)]
_HEAD_ROWS = 128

Progress = Callable[[str], None]
"""Told in a line what begins."""


@dataclass(frozen=True)
class Difference:
    """A token that transformers would not have taken.

    Attributes:
        prompt: which prompt, from 0.
        position: which of its generated tokens, from 0.
        ours, theirs: the token taken and the one that transformers finds most probable.
        margin: by how much transformers' logit of its own is larger.
    """

    prompt: int
    position: int
    ours: int
    theirs: int
    margin: float


@dataclass(frozen=True)
class VerifyReport:
    """How a model as this engine runs it compares with transformers, both in the same dtype.

    Attributes:
        model: the folder.
        device: what executed both, in words.
        attention: the engine's attention backend.
        transformers: the version of the reference.
        sequences: greedy sequences generated, all in one batch.
        equal: those of them whose every token is the reference's, near ties aside.
        tokens: generated, in all sequences.
        near_ties: tokens that are not the reference's, but less than `NEAR_TIE` below it.
        first_difference: the first token, in the order of prompts, that is neither; None if all are.
        chunked_prompts: prompts that were longer than a step, so that they were computed in chunks.
        cached_tokens: prompt tokens whose KV was found in the prefix cache.
        log_prob_difference: the largest difference between the two of log p(token | all before it), over every token of
            prompts, answers and text, both given the same tokens.
        text_tokens: tokens of the shipped text that were predicted.
        perplexity, reference_perplexity: of that text, in windows of up to `WINDOW` tokens.
    """

    model: str
    device: str
    dtype: str
    attention: str
    transformers: str
    sequences: int
    equal: int
    tokens: int
    near_ties: int
    first_difference: Difference | None
    chunked_prompts: int
    cached_tokens: int
    log_prob_difference: float
    text_tokens: int
    perplexity: float
    reference_perplexity: float

    @property
    def agrees(self) -> bool | None:
        """Whether rounding explains every difference; None in bfloat16, where it explains nearly any."""
        if self.dtype != "float32":
            return None
        # Written so that a NaN does not agree.
        return self.equal == self.sequences and self.log_prob_difference <= LOG_PROB_LIMIT

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, `agrees` among them."""
        return asdict(self) | {"agrees": self.agrees}


def verify(
    folder: str | Path,
    *,
    prompts: Seq[str | list[int]] | None = None,
    max_tokens: int = 32,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> VerifyReport:
    """Hold a model as this engine runs it against transformers: greedy tokens, log-probabilities and perplexity.

    The engine generates over paged KV in one mixed batch: prompts in chunks beside decodes, prefixes found in the
    cache. Then each of the two, one at a time in memory, is given the same tokens: those that the engine generated
    after their prompts, and a text. So a sequence is equal exactly if greedy generation by transformers gives it.
    The engine is given them in chunks over paged KV, transformers all at once.

    Args:
        folder: a Hugging Face folder.
        prompts: texts, or token ids; None takes pieces of the shipped text.
        max_tokens: generated after each prompt, whatever ends a text.
        device: "cpu", "cuda", ...
        dtype: "float32" or "bfloat16", of both.
        progress: called with a line as each part of the work begins.

    Raises:
        InputError: an option or the folder cannot be used, transformers cannot load it, or a prompt or `max_tokens`
            does not fit.
    """
    EngineOptions.load({"device": device, "dtype": dtype})
    usable_device(device)
    folder, say = Path(folder), progress or (lambda line: None)
    config, tokenizer = ModelConfig.load(folder), load_tokenizer(folder)
    text, limit = _text_ids(tokenizer, config.vocab_size), config.max_position_embeddings
    if not 1 <= max_tokens < limit:
        problem = f"expected 1 or more, and less than the model's max_position_embeddings ({limit})"
        raise InputError(problem, field="max_tokens", value=max_tokens)
    if prompts is None:
        token_prompts = [text[start : start + min(length, limit - max_tokens)] for start, length in PROMPTS]
    else:
        token_prompts = _encoded(prompts, tokenizer, config.vocab_size)
    window = min(WINDOW, limit)
    windows = [text[start : start + window] for start in range(0, len(text) - 1, window)]
    say(f"{folder}: generating and scoring with this engine")
    ours = _run_ours(folder, token_prompts, windows, max_tokens, device, dtype)
    gc.collect()
    say(f"{folder}: scoring the same tokens with transformers")
    theirs = _run_theirs(folder, [*ours.sequences, *windows], device, dtype)
    return _report(str(folder), dtype, [len(prompt) for prompt in token_prompts], ours, theirs)


@dataclass(frozen=True)
class _Scores:
    """What a model says of a given text, token by token from the second on; each [tokens - 1].

    Attributes:
        log_probs: log p(token | all before it).
        best: the most probable token.
        margins: by how much the logit of the best one is larger than the token's.
    """

    log_probs: Tensor
    best: Tensor
    margins: Tensor


@dataclass(frozen=True)
class _Ours:
    """The engine's side: `sequences` are prompts with what was generated; `scores` are of them, then of the windows."""

    sequences: list[list[int]]
    scores: list[_Scores]
    chunked_prompts: int
    cached_tokens: int
    attention: str
    device: str


def _text_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    """The shipped text in tokens; without a tokenizer, its bytes, folded into the vocabulary."""
    text = TEXT.read_text(encoding="utf-8")
    return tokenizer.encode(text) if tokenizer is not None else [byte % vocab_size for byte in text.encode()]


def _encoded(prompts: Seq[str | list[int]], tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Token ids of the prompts that a user gave."""
    if not prompts:
        raise InputError("expected at least one prompt", field="prompts", value=prompts)
    encoded = []
    for index, prompt in enumerate(prompts):
        encoded.append(encode_prompt(prompt, tokenizer, vocab_size, index))
        if not encoded[-1]:
            raise InputError("expected at least one token", field=f"prompts[{index}]", value=prompt)
    return encoded


def _run_ours(
    folder: Path, prompts: list[list[int]], windows: list[list[int]], max_tokens: int, device: str, dtype: str
) -> _Ours:
    """Generate greedily in one batch, then score what came out, and the windows."""
    decoder = load_model(folder, dtype=DTYPES[dtype], device=device)
    choice = choose_attention("auto", decoder.config.head_dim, decoder.dtype, decoder.device)
    size = choice.block_size
    settings = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": STEP_TOKENS,
        "block_size": size,
        "num_gpu_blocks": sum(-(-(len(prompt) + max_tokens) // size) for prompt in prompts),
    }
    llm = LLM(decoder, name=folder.name, device=device, dtype=dtype, settings=Settings.load(settings))
    try:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        completions = llm.generate(prompts, params)
    finally:
        llm.close()
    for index, completion in enumerate(completions):
        if completion.refusal is not None:
            raise InputError(completion.refusal, field=f"prompts[{index}]", value=prompts[index])
    sequences = [prompt + done.token_ids for prompt, done in zip(prompts, completions, strict=True)]
    hidden_of = partial(_paged_hidden, decoder, choice)
    return _Ours(
        sequences,
        [_score(hidden_of, decoder.logits, text, device) for text in chain(sequences, windows)],
        chunked_prompts=sum(done.num_prompt_tokens - done.num_cached_tokens > STEP_TOKENS for done in completions),
        cached_tokens=sum(done.num_cached_tokens for done in completions),
        attention=llm.attention.name,
        device=llm.device_name,
    )


def _paged_hidden(decoder: Decoder, choice: AttentionChoice, token_ids: Tensor) -> Tensor:
    """Hidden states [tokens, hidden_size] of `token_ids` [tokens], in steps over paged KV, as the engine has them."""
    backend, size, device = choice.make(), choice.block_size, decoder.device
    # Blocks in falling order, so that a slot is not by chance the position.
    table = np.arange(-(-len(token_ids) // size) - 1, -1, -1)
    cache = KVCache(decoder.config, len(table), size, decoder.dtype, device)
    parts = []
    for start in range(0, len(token_ids), STEP_TOKENS):
        chunk = token_ids[start : start + STEP_TOKENS]
        end = start + len(chunk)
        metadata = AttentionMetadata(int(len(chunk) == 1), [len(chunk)], [end], [table], size)
        positions = np.arange(start, end)
        slots = to_device(slots_of(table, positions, size), device)
        attention = PagedAttention(backend, cache, slots, backend.plan(metadata, decoder.dtype, device))
        parts.append(decoder(chunk, to_device(positions, device), attention))
    return torch.cat(parts)


def _run_theirs(folder: Path, texts: list[list[int]], device: str, dtype: str) -> list[_Scores]:
    """Score texts with transformers."""
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"transformers cannot load it: {reason}", path=folder) from error
    model = model.to(device).eval()

    def hidden_of(token_ids: Tensor) -> Tensor:
        return model.base_model(token_ids[None], use_cache=False).last_hidden_state[0]

    return [_score(hidden_of, model.get_output_embeddings(), text, device) for text in texts]


@torch.inference_mode()
def _score(
    hidden_of: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], text: list[int], device: str
) -> _Scores:
    """What a model says of `text`.

    Args:
        hidden_of: the last hidden states [tokens, hidden_size] of token ids [tokens].
        head: makes logits of hidden states; a few rows at a time, as a whole text's would fill the memory.
    """
    token_ids = torch.tensor(text, device=device)
    log_probs, best, margins = [], [], []
    hidden = hidden_of(token_ids[:-1])
    for rows, targets in zip(hidden.split(_HEAD_ROWS), token_ids[1:].split(_HEAD_ROWS), strict=True):
        logits = head(rows).float()
        own = logits.gather(1, targets[:, None])[:, 0]
        highest = logits.max(dim=1)
        log_probs.append(own - logits.logsumexp(dim=1))
        best.append(highest.indices)
        margins.append(highest.values - own)
    return _Scores(*(torch.cat(parts).cpu() for parts in (log_probs, best, margins)))


def _report(folder: str, dtype: str, prompt_lens: list[int], ours: _Ours, theirs: list[_Scores]) -> VerifyReport:
    """What the two sides' scores say."""
    import transformers

    num = len(ours.sequences)
    near_ties, differences = 0, []
    for index, (prompt_len, sequence, scores) in enumerate(zip(prompt_lens, ours.sequences, theirs[:num], strict=True)):
        answer = torch.tensor(sequence[prompt_len:])
        best, margins = scores.best[prompt_len - 1 :], scores.margins[prompt_len - 1 :]
        other = best != answer
        # Written so that a NaN is no near tie.
        wrong = other & ~(margins < NEAR_TIE)
        near_ties += int((other & ~wrong).sum())
        for place in wrong.nonzero()[:1, 0].tolist():
            found = int(answer[place]), int(best[place]), float(margins[place])
            differences.append(Difference(index, place, *found))
    gaps = [(mine.log_probs - other.log_probs).abs() for mine, other in zip(ours.scores, theirs, strict=True)]
    mine, reference = (torch.cat([scores.log_probs for scores in side[num:]]) for side in (ours.scores, theirs))
    return VerifyReport(
        model=folder,
        device=ours.device,
        dtype=dtype,
        attention=ours.attention,
        transformers=transformers.__version__,
        sequences=num,
        equal=num - len(differences),
        tokens=sum(map(len, ours.sequences)) - sum(prompt_lens),
        near_ties=near_ties,
        first_difference=differences[0] if differences else None,
        chunked_prompts=ours.chunked_prompts,
        cached_tokens=ours.cached_tokens,
        log_prob_difference=torch.cat(gaps).max().item(),
        text_tokens=len(mine),
        perplexity=mine.double().mean().neg().exp().item(),
        reference_perplexity=reference.double().mean().neg().exp().item(),
    )
