"""Measures what steps of given shapes cost on this device, through the same Core and runner that serve."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from twinserve.engine.llm import LLM
from twinserve.policies import Batch, Core, SamplingParams, Sequence
from twinserve.traces.errors import InputError


@dataclass(frozen=True, order=True)
class StepShape:
    """A step to measure: `decodes` sequences of `context` tokens each decode one more, beside them a chunk of `prompt`
    tokens of one sequence, of which `start` tokens were computed before."""

    decodes: int
    context: int
    prompt: int = 0
    start: int = 0

    @property
    def kv_tokens(self) -> int:
        """KV tokens that the step holds."""
        return self.decodes * (self.context + 1) + self.start + self.prompt


@dataclass(frozen=True)
class MeasuredStep:
    """A step that was run, what the device took for it and what the host took around that, in nanoseconds."""

    batch: Batch
    host_ns: int
    device_ns: int


def shape_grid(max_seqs: int, max_context: int, max_prompt: int) -> list[StepShape]:
    """Decodes by size and context; prompt chunks alone, behind earlier chunks, and beside decodes.

    Args:
        max_seqs: the most decodes.
        max_context: the longest context.
        max_prompt: the most prompt tokens in a step.
    """
    sizes = _powers(1, max_seqs, 2)
    contexts = _powers(64, max_context, 4)
    chunks = _powers(16, max_prompt, 2)
    shapes = {StepShape(size, context) for size in sizes for context in contexts}
    shapes |= {StepShape(0, 0, chunk) for chunk in chunks}
    shapes |= {StepShape(0, 0, chunk, context) for chunk in chunks[1::2] for context in contexts[1:]}
    beside = contexts[len(contexts) // 2]
    shapes |= {StepShape(size, beside, chunk) for size in sizes[1::2] for chunk in chunks[::2]}
    return sorted(shape for shape in shapes if shape.start + shape.prompt <= max_context or not shape.start)


def _powers(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... below `last`, and `last`."""
    values = []
    while first < last:
        values.append(first)
        first *= factor
    return [*values, last]


def measure(
    llm: LLM, shapes: list[StepShape], *, repeats: int, seed: int = 0, progress: Callable[[], None] | None = None
) -> list[MeasuredStep]:
    """Run each shape `repeats` times, all in random order, after a warm-up of each.

    The sequences of a step are put in place without computing them: what their KV holds does not change its cost.

    Args:
        progress: called after each step.

    Raises:
        InputError: a shape does not fit the model's context or the KV pool.
    """
    settings = llm.settings
    pool = (settings.num_gpu_blocks or 0) * settings.block_size
    for shape in shapes:
        longest = max(shape.context + 2, shape.start + shape.prompt + 1)
        if longest > (settings.max_model_len or longest):
            raise InputError(f"expected contexts below {settings.max_model_len}", field="shape", value=shape)
        if shape.kv_tokens + (shape.decodes + 2) * settings.block_size > pool:
            raise InputError(f"expected at most the {pool} tokens of the KV pool", field="shape", value=shape)
    order = [shape for shape in shapes for _ in range(repeats)]
    random.Random(seed).shuffle(order)
    steps = []
    for number, shape in enumerate([*shapes, *order]):
        step = _measure_one(llm, shape)
        if number >= len(shapes):
            steps.append(step)
        if progress is not None:
            progress()
    return steps


def _measure_one(llm: LLM, shape: StepShape) -> MeasuredStep:
    """Put the sequences of a shape in place, then run its step for real."""
    core = _core_for(llm, shape)
    texts = _Texts(llm)
    for _ in range(shape.decodes):
        core.ingest(texts.sequence(shape.context, max_tokens=3), 0)
    _pretend(core)
    late = None
    if shape.prompt:
        prefix = texts.tokens(shape.start)
        if prefix:
            # A first request leaves its blocks in the prefix cache, so that the measured one starts behind them.
            core.ingest(Sequence(prefix, SamplingParams(max_tokens=1, ignore_eos=True), seq_id=-1), 0)
            _pretend(core)
        tokens = prefix + texts.tokens(shape.prompt)
        late = Sequence(tokens, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True), seq_id=-2)
    begun = time.perf_counter_ns()
    if late is not None:
        core.ingest(late, 0)
    batch = core.decide(0)
    step = llm.runner.launch(batch)
    core.commit(step.result(), 0)
    ended = time.perf_counter_ns()
    device_ns = step.end_ns - step.start_ns
    _check(batch, shape)
    return MeasuredStep(batch, ended - begun - device_ns, device_ns)


def _core_for(llm: LLM, shape: StepShape) -> Core:
    """Policies that put a shape in place in one step."""
    changed = {
        "composition": "mixed",
        "max_num_seqs": shape.decodes + 2,
        "max_num_batched_tokens": shape.kv_tokens + shape.decodes + 2,
        "long_prefill_token_threshold": 0,
        "enable_prefix_caching": True,
        "pipeline_depth": 0,
        "watermark": 0.0,
    }
    return llm.settings.model_copy(update=changed).build_core()


class _Texts:
    """Makes prompts that share nothing."""

    def __init__(self, llm: LLM):
        self._maker = llm.token_maker
        self._rng = random.Random(0)

    def tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(self._maker.first_id, self._maker.vocab_size) for _ in range(count)]

    def sequence(self, count: int, max_tokens: int) -> Sequence:
        return Sequence(self.tokens(count), SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))


def _pretend(core: Core) -> None:
    """Decide and commit a step that is never run."""
    if core.can_decide:
        batch = core.decide(0)
        core.commit([0] * len(batch.sampled), 0)


def _check(batch: Batch, shape: StepShape) -> None:
    """The step was of the shape that was asked for."""
    decided = (batch.num_decode_tokens, batch.num_prompt_tokens, batch.num_kv_tokens)
    wanted = (shape.decodes, shape.prompt, shape.kv_tokens)
    assert decided == wanted, f"decided (decodes, prompt, KV tokens) {decided}, wanted {wanted}"
