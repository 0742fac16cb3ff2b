"""Measures what steps of given shapes cost on this device, through the same Core and runner that serve."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from twinserve.engine.llm import LLM
from twinserve.policies import Batch, Core, SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError


@dataclass(frozen=True, order=True)
class StepShape:
    """A step to measure: `decodes` sequences of about `context` tokens each decode one more, beside them a chunk of
    `prompt` tokens of one sequence, of which `start` tokens were computed before."""

    decodes: int
    context: int
    prompt: int = 0
    start: int = 0

    @property
    def contexts(self) -> list[int]:
        """Tokens of each decoding sequence: from half of `context` to one and a half times as many, as real batches
        are uneven and an even one is cheaper to attend to."""
        return [self.context // 2 + self.context * (2 * i + 1) // (2 * self.decodes) for i in range(self.decodes)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, those that the step generates included."""
        return max([self.start + self.prompt + 1, *(context + 2 for context in self.contexts)])

    @property
    def kv_tokens(self) -> int:
        """KV tokens that the step holds."""
        return sum(self.contexts) + self.decodes + self.start + self.prompt


@dataclass(frozen=True)
class MeasuredStep:
    """A step that was run, what the device took for it and what the host took around that, in nanoseconds."""

    batch: Batch
    host_ns: int
    device_ns: int


def shape_grid(max_seqs: int, max_context: int, max_prompt: int, block_size: int) -> list[StepShape]:
    """Decodes by size and context; prompt chunks alone, behind earlier chunks, and beside decodes.

    Args:
        max_seqs: the most decodes.
        max_context: the longest context.
        max_prompt: the most prompt tokens in a step.
        block_size: a chunk behind earlier ones begins at a multiple of it.
    """
    sizes = _rising(1, max_seqs)
    contexts = _rising(64, max_context * 2 // 3)[::2]
    # Captured steps are padded to sizes like 256, 384 and 512; these lie between them as prompts do on average.
    chunks = [*(chunk * 5 // 6 for chunk in _rising(8, max_prompt)[:-1]), max_prompt]
    shapes = {StepShape(size, context) for size in sizes for context in contexts}
    shapes |= {StepShape(0, 0, chunk) for chunk in chunks}
    starts = [context // block_size * block_size for context in contexts[1:]]
    shapes |= {StepShape(0, 0, chunk, start) for chunk in chunks[1::2] for start in starts}
    beside = contexts[len(contexts) // 2]
    shapes |= {StepShape(size, beside, chunk) for size in sizes[1::2] for chunk in chunks[::2]}
    return sorted(shape for shape in shapes if shape.start + shape.prompt <= max_context or not shape.start)


def _rising(first: int, last: int) -> list[int]:
    """first, 2 first, 3 first, 4 first, 6 first, 8 first, 12 first, ... below `last`, and `last`."""
    values = [first] if first < last else []
    value = first * 2
    while value < last:
        values += [value] if value * 3 // 2 >= last else [value, value * 3 // 2]
        value *= 2
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
        if shape.longest > (settings.max_model_len or shape.longest):
            raise InputError(f"expected contexts below {settings.max_model_len}", field="shape", value=shape)
        if shape.kv_tokens + 2 * (shape.decodes + 2) * settings.block_size > pool:
            raise InputError(f"expected at most the {pool} tokens of the KV pool", field="shape", value=shape)
    llm.capture()
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
    """Put the sequences of a shape in place, then run its step for real.

    Where steps are graphs, decodes have a step before it, which the device still runs when this one is launched. It
    has brought the sequences to the device, and hides what a launch takes, as it does while requests are served.
    """
    core = _core_for(llm, shape)
    texts = _Texts(llm)
    step_before = llm.attention.graphs and shape.decodes > 0
    for context in shape.contexts:
        core.ingest(texts.sequence(context - step_before, max_tokens=3 + step_before), 0)
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
    before = llm.runner.launch(core.decide(0)) if step_before else None
    begun = time.perf_counter_ns()
    if late is not None:
        core.ingest(late, 0)
    batch = core.decide(0)
    step = llm.runner.launch(batch)
    if before is not None:
        launched = time.perf_counter_ns()
        token_ids = before.result()
        waited_ns = time.perf_counter_ns() - launched
        core.commit(token_ids, 0)
        host_ns = time.perf_counter_ns() - begun - waited_ns
        core.commit(step.result(), 0)
    else:
        core.commit(step.result(), 0)
        host_ns = time.perf_counter_ns() - begun - (step.end_ns - step.start_ns)
    _check(batch, shape)
    return MeasuredStep(batch, host_ns, step.end_ns - step.start_ns)


def _core_for(llm: LLM, shape: StepShape) -> Core:
    """Policies that put a shape in place in one step."""
    return Settings(
        max_num_seqs=shape.decodes + 2,
        max_num_batched_tokens=shape.kv_tokens + shape.decodes + 2,
        max_model_len=llm.settings.max_model_len,
        block_size=llm.settings.block_size,
        # No more blocks than the shape needs: making the policies' pool would cost more than the step.
        num_gpu_blocks=shape.kv_tokens // llm.settings.block_size + 2 * (shape.decodes + 2),
        pipeline_depth=int(llm.attention.graphs),
    ).build_core()


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
        core.commit([0] * batch.num_sampled, 0)


def _check(batch: Batch, shape: StepShape) -> None:
    """The step was of the shape that was asked for."""
    decided = (batch.num_decode_tokens, batch.num_prompt_tokens, batch.num_kv_tokens)
    wanted = (shape.decodes, shape.prompt, shape.kv_tokens)
    assert decided == wanted, f"decided (decodes, prompt, KV tokens) {decided}, wanted {wanted}"
