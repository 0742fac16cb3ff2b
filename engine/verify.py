"""verify: a model's folder as this engine serves it, held against transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.device_queue import usable_device
from twinserve.engine.float8 import FLOAT8
from twinserve.engine.inference import cache_name
from twinserve.engine.llm import LLM
from twinserve.engine.models import ModelConfig
from twinserve.engine.models.loader import DTYPES, dequantised_tensors
from twinserve.engine.models.source import ModelSource, load_tokenizer
from twinserve.engine.options import EngineOptions
from twinserve.engine.prompts import encode_prompt
from twinserve.engine.quantization import AbsMaxQuantizer
from twinserve.policies import SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError

NEAR_TIE = 1e-4
"""Where the reference's logits of two tokens are closer than this, rounding decides between them."""
LOG_PROB_LIMIT = 1e-2
"""The largest difference of a token's log-probability that rounding in float32 explains, with room to spare."""
MEAN_SHARE, LARGEST_SHARE = 1.25, 1.5
"""In 16 bits, how much further from float32 than transformers the engine may be, on average and at most."""

TEXT = Path(__file__).parent / "data" / "verify.txt"
WINDOW = 512
MAX_NUM_SEQS = 64
STEP_TOKENS = 96
PIECE = 32
"""Tokens of a text that are given one a step, behind a prompt of all before them."""
# Prompts as pieces (start, length) of the text: many lengths, most of more than a step's tokens, one begun by another.
PROMPTS = [(0, 300), (40, 3), (100, 150), (0, 341), (330, 1), (400, 90), (500, 33), (620, 70)]
_HEAD_ROWS = 128
_ABOVE_ALL = 1e30

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
    """How a model as this engine serves it compares with transformers.

    The reference is transformers in float32, its weights and its KV rounded as the engine's are where these are int8
    or float8, and what float8 weights are multiplied by, so that what differs is how the engine computes. Beside it is
    transformers in 16 bits: in the engine's dtype, or in bfloat16 beside int8 and float8 in float32, whose layers take
    16 bits and fewer of what they are given.

    Attributes:
        model: the folder.
        device: what executed all, in words.
        dtype, quantization, kv_cache_dtype, attention, execution: the engine's, as in use.
        transformers: the version of the reference.
        sequences: greedy sequences generated, all in one batch.
        equal: those of them whose every token is the reference's, near ties aside.
        tokens: generated, in all sequences.
        near_ties: tokens that are not the reference's, but less than `NEAR_TIE` below it.
        first_difference: the first token, in the order of prompts, that is neither; None if all are.
        chunked_prompts: prompts that were longer than a step, so that they were computed in chunks.
        cached_tokens: prompt tokens whose KV was found in the prefix cache.
        log_prob_difference: the largest difference to the reference of log p(token | all before it), over every token
            of prompts, answers and text, both given the same tokens.
        mean_difference: the mean of these differences.
        beside: the dtype of transformers beside the reference; None where the engine computes in float32 throughout.
        transformers_difference, transformers_mean: the differences of transformers in that; None where there is none.
        text_tokens: tokens of the shipped text that were predicted.
        perplexity, reference_perplexity: of that text, in windows of up to `WINDOW` tokens.
    """

    model: str
    device: str
    dtype: str
    quantization: str
    kv_cache_dtype: str
    attention: str
    execution: str
    transformers: str
    sequences: int
    equal: int
    tokens: int
    near_ties: int
    first_difference: Difference | None
    chunked_prompts: int
    cached_tokens: int
    log_prob_difference: float
    mean_difference: float
    beside: str | None
    transformers_difference: float | None
    transformers_mean: float | None
    text_tokens: int
    perplexity: float
    reference_perplexity: float

    @property
    def agrees(self) -> bool:
        """Whether rounding explains every difference: in float32 each token is the reference's; in 16 bits, where
        rounding changes tokens, log-probabilities are about as near to float32 as those of transformers."""
        # Written so that a NaN does not agree.
        if self.transformers_mean is None or self.transformers_difference is None:
            return self.equal == self.sequences and self.log_prob_difference <= LOG_PROB_LIMIT
        is_near = self.mean_difference <= MEAN_SHARE * self.transformers_mean
        return is_near and self.log_prob_difference <= LARGEST_SHARE * self.transformers_difference

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, `agrees` among them."""
        return asdict(self) | {"agrees": self.agrees}


def verify(
    folder: str | Path,
    *,
    prompts: Seq[str | list[int]] | None = None,
    max_tokens: int = 32,
    progress: Progress | None = None,
    **options: Any,
) -> VerifyReport:
    """Hold a model as this engine serves it against transformers: greedy tokens, log-probabilities and perplexity.

    The engine generates over paged KV in one mixed batch: prompts in chunks beside decodes, prefixes found in the
    cache. Then the same steps, graphs where it serves by graphs, score what it generated and a text: a bias has them
    sample the tokens that are given, and what is asked for are the log-probabilities before it. Transformers, when the
    engine is gone from memory, is given all of a text at once. So a sequence is equal exactly if greedy generation by
    transformers gives it.

    Args:
        folder: a Hugging Face folder.
        prompts: texts, or token ids; None takes pieces of the shipped text.
        max_tokens: generated after each prompt, whatever ends a text.
        progress: called with a line as each part of the work begins.
        options: the fields of `EngineOptions`, as `LLM` takes them.

    Raises:
        InputError: an option or the folder cannot be used, transformers cannot load it, or a prompt or `max_tokens`
            does not fit.
    """
    given = EngineOptions.load({"model": str(folder), **options})
    usable_device(given.device)
    folder, say = Path(folder), progress or (lambda line: None)
    config, tokenizer = ModelConfig.load(folder), load_tokenizer(folder)
    text, limit = _text_ids(tokenizer, config.vocab_size), config.max_model_len
    if not 1 <= max_tokens < limit:
        problem = f"expected 1 or more, and less than the model's longest context ({limit})"
        raise InputError(problem, field="max_tokens", value=max_tokens)
    if prompts is None:
        token_prompts = [text[start : start + min(length, limit - max_tokens)] for start, length in PROMPTS]
    else:
        token_prompts = _encoded(prompts, tokenizer, config.vocab_size)
    window = min(WINDOW, limit)
    windows = [text[start : start + window] for start in range(0, len(text) - 1, window)]
    say(f"{folder}: generating and scoring with this engine")
    ours = _run_ours(folder, token_prompts, windows, max_tokens, given)
    gc.collect()
    if given.device != "cpu":
        torch.cuda.empty_cache()
    texts = [*ours.sequences, *windows]
    say(f"{folder}: scoring the same tokens with transformers in float32")
    exact = _run_theirs(folder, texts, given.device, "float32", ours.facts)
    beside, theirs = ours.facts["dtype"], None
    if beside == "float32":
        beside = None if ours.facts["quantization"] == "none" else "bfloat16"
    if beside is not None:
        say(f"{folder}: scoring the same tokens with transformers in {beside}")
        scores = _run_theirs(folder, texts, given.device, beside, ours.facts)
        theirs = beside, torch.cat([one.log_probs for one in scores])
    return _report(str(folder), [len(prompt) for prompt in token_prompts], ours, exact, theirs)


@dataclass(frozen=True)
class _Scores:
    """What transformers says of a given text, token by token from the second on; each [tokens - 1].

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
    """The engine's side: `sequences` are prompts with what was generated; `log_probs` are of them, then of the
    windows, as in `_Scores`; `facts` those of the engine."""

    sequences: list[list[int]]
    log_probs: list[Tensor]
    chunked_prompts: int
    cached_tokens: int
    facts: dict[str, Any]
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
    folder: Path, prompts: list[list[int]], windows: list[list[int]], max_tokens: int, options: EngineOptions
) -> _Ours:
    """Generate greedily in one batch, then score what came out, and the windows."""
    settings: dict[str, Any] = {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": STEP_TOKENS}
    config = RunnerConfig.checked(ModelSource.of(folder, options), options, Settings.load(settings))
    if config.kv_cache_dtype.itemsize == 1 and options.dtype == "float32":
        # Rounded so, numbers that differ by nothing else than their last bit can end up far apart.
        problem = "expected bfloat16 or float16 with kv_cache_dtype fp8: there is no float32 to hold it against"
        raise InputError(problem, field="dtype", value=options.dtype)
    size = config.settings.block_size
    longest = max(len(text) for text in (*windows, *prompts)) + max_tokens
    together = sum(-(-(len(prompt) + max_tokens) // size) for prompt in prompts)
    # Pieces of a text share the blocks before them.
    shared, own = len(prompts) * -(-longest // size), MAX_NUM_SEQS * (-(-PIECE // size) + 1)
    settings |= {"block_size": size, "num_gpu_blocks": max(together, shared + own)}
    given = options.model_dump(exclude={"model"}, exclude_unset=True)
    llm = LLM(folder, name=options.model, settings=Settings.load(settings), **given)
    try:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        completions = llm.generate(prompts, params)
        for index, completion in enumerate(completions):
            if completion.refusal is not None:
                raise InputError(completion.refusal, field=f"prompts[{index}]", value=prompts[index])
        sequences = [prompt + done.token_ids for prompt, done in zip(prompts, completions, strict=True)]
        return _Ours(
            sequences,
            _log_probs(llm, [*sequences, *windows]),
            chunked_prompts=sum(done.num_prompt_tokens - done.num_cached_tokens > STEP_TOKENS for done in completions),
            cached_tokens=sum(done.num_cached_tokens for done in completions),
            facts=llm.facts(),
            device=llm.device_name,
        )
    finally:
        llm.close()


def _log_probs(llm: LLM, texts: list[list[int]]) -> list[Tensor]:
    """log p(token | all before it) of each text's tokens from the second on, [tokens - 1], as the engine's steps say.

    A text is cut into pieces. Each is a request whose prompt is all before it, most of that found in the prefix cache,
    and whose tokens are sampled one a step, as nothing comes near to their bias.
    """
    core, found = llm.settings.build_core(), [torch.empty(len(text) - 1) for text in texts]
    pieces: dict[Sequence, int] = {}
    for index, text in enumerate(texts):
        for first in range(0, len(text), PIECE):
            begin, end = max(1, first), min(first + PIECE, len(text))
            if begin < end:
                params = SamplingParams(temperature=0.0, max_tokens=end - begin, ignore_eos=True, logprobs=0)
                seq = Sequence(text[:begin], params)
                pieces[seq] = index
                core.ingest(seq, 0)
    while not core.is_idle:
        batch = core.decide(0)
        tokens = [texts[pieces[seq]][seq.num_tokens] for seq in batch.sampled]
        for seq, token in zip(batch.sampled, tokens, strict=True):
            seq.sampling_params = replace(seq.sampling_params, logit_bias=((token, _ABOVE_ALL),))
        llm.runner.execute(batch)
        core.commit(tokens, 0)
    for seq, index in pieces.items():
        for place, heard in llm.runner.logprobs.pop(seq).items():
            found[index][place - 1] = heard.logprob
    return found


def _run_theirs(folder: Path, texts: list[list[int]], device: str, dtype: str, facts: dict[str, Any]) -> list[_Scores]:
    """Score texts with transformers, its weights and its KV rounded as the engine's are."""
    try:
        model, is_float8 = _transformers_model(folder, DTYPES[dtype])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"transformers cannot load it: {reason}", path=folder) from error
    if facts["quantization"] == "int8":
        _round_weights(model, DTYPES[dtype])
    elif facts["quantization"] == "fp8":
        _round_layers(model.base_model.layers, DTYPES[dtype], weights=not is_float8)
    model = model.to(device).eval()
    cache = {}
    if facts["kv_cache_dtype"] == "float8_e4m3fn":
        cache[cache_name(model)] = _float8_cache

    def hidden_of(token_ids: Tensor) -> Tensor:
        kept = {name: make() for name, make in cache.items()}
        return model.base_model(token_ids[None], use_cache=bool(kept), **kept).last_hidden_state[0]

    return [_score(hidden_of, model.get_output_embeddings(), text, device) for text in texts]


def _transformers_model(folder: Path, dtype: torch.dtype) -> tuple[Any, bool]:
    """The folder's model, and whether its checkpoint is in float8; then it has the numbers that those stand for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not ModelConfig.load(folder).is_float8:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), False
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(dequantised_tensors(folder), strict=not config.tie_word_embeddings)
    return model, True


def _round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights that `quantize_decoder` rounds; tied ones once."""
    rounded: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and id(module.weight) not in rounded:
            numbers = AbsMaxQuantizer.dequantize(*AbsMaxQuantizer.quantize(module.weight))
            module.weight.data = numbers.to(dtype)
            rounded.add(id(module.weight))


@torch.no_grad()
def _round_layers(layers: nn.Module, dtype: torch.dtype, *, weights: bool) -> None:
    """Round what the linear layers of decoder layers are given to float8, and their weights if these are not."""

    def rounded(numbers: Tensor) -> Tensor:
        return AbsMaxQuantizer.dequantize(*AbsMaxQuantizer.quantize(numbers, dtype=FLOAT8)).to(dtype)

    def round_input(layer: nn.Module, given: tuple[Tensor]) -> Tensor:
        return rounded(given[0])

    for module in layers.modules():
        if isinstance(module, nn.Linear):
            if weights:
                module.weight.copy_(rounded(module.weight))
            module.register_forward_pre_hook(round_input)


def _float8_cache() -> Any:
    """A cache of transformers that keeps what float8 keeps of keys and values."""
    from transformers import DynamicCache

    class Float8Cache(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *others: Any, **more: Any) -> Any:
            keys, values = (x.to(FLOAT8).to(x.dtype) for x in (key_states, value_states))
            return super().update(keys, values, *others, **more)

    return Float8Cache()


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


def _report(
    folder: str, prompt_lens: list[int], ours: _Ours, exact: list[_Scores], theirs: tuple[str, Tensor] | None
) -> VerifyReport:
    """What the sides' scores say; `theirs` are the dtype and the log-probabilities of transformers in 16 bits."""
    import transformers

    num = len(ours.sequences)
    near_ties, differences = 0, []
    for index, (prompt_len, sequence, scores) in enumerate(zip(prompt_lens, ours.sequences, exact[:num], strict=True)):
        answer = torch.tensor(sequence[prompt_len:])
        best, margins = scores.best[prompt_len - 1 :], scores.margins[prompt_len - 1 :]
        other = best != answer
        # Written so that a NaN is no near tie.
        wrong = other & ~(margins < NEAR_TIE)
        near_ties += int((other & ~wrong).sum())
        for place in wrong.nonzero()[:1, 0].tolist():
            found = int(answer[place]), int(best[place]), float(margins[place])
            differences.append(Difference(index, place, *found))
    reference = torch.cat([scores.log_probs for scores in exact])
    gaps = torch.cat(ours.log_probs).sub(reference).abs()
    own = None if theirs is None else theirs[1].sub(reference).abs()
    mine, text = (torch.cat(side[num:]) for side in (ours.log_probs, [one.log_probs for one in exact]))
    return VerifyReport(
        model=folder,
        device=ours.device,
        **{name: ours.facts[name] for name in ("dtype", "quantization", "kv_cache_dtype", "attention", "execution")},
        transformers=transformers.__version__,
        sequences=num,
        equal=num - len(differences),
        tokens=sum(map(len, ours.sequences)) - sum(prompt_lens),
        near_ties=near_ties,
        first_difference=differences[0] if differences else None,
        chunked_prompts=ours.chunked_prompts,
        cached_tokens=ours.cached_tokens,
        log_prob_difference=gaps.max().item(),
        mean_difference=gaps.mean().item(),
        beside=None if theirs is None else theirs[0],
        transformers_difference=None if own is None else own.max().item(),
        transformers_mean=None if own is None else own.mean().item(),
        text_tokens=len(mine),
        perplexity=mine.double().mean().neg().exp().item(),
        reference_perplexity=text.double().mean().neg().exp().item(),
    )
