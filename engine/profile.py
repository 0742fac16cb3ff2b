"""Measures what steps cost on this device, through the same Core and runner that serve.

Which steps: those of a design that fills the space of what traffic makes, not a grid; and some that a trace makes,
where one is given. Each shape is run some steps in a row, as it would be in service: where steps are graphs, one step
ahead, so that the device goes from one to the next and is as warm, and as hidden is the host, as under load.

Of an engine that drafts, rows have drafts, which are proposed as they are in service, and of which none is accepted, so
that a shape stays what it is. Where the host waits for each step, its own time is what lies between two steps.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from statistics import NormalDist

from twinserve.engine.llm import LLM
from twinserve.engine.online import StepHandle
from twinserve.engine.speculation.runner import SpeculativeRunner, VerifiedStep
from twinserve.policies import Batch, Core, Runs, SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.runs.spans import device_ns

MOST_PROMPTS = 16
"""Prompts in a step of the design at most."""

LEAST_CONTEXT = 64
"""Where the design's contexts begin, on average over a step; at a quarter of the longest, if that is shorter."""

SHORTEST = 16
"""Tokens of contexts that the design has room for, beside drafts if there are any, at the least."""

LEAST_AHEAD = 3
"""Sequences that a runner holds, at the least, where steps are measured one ahead: the prompts of two steps are there
at once, and a decode."""

WARMING_NS = 60_000_000
"""How long a shape is run before its steps count: power lowers a device's clocks within some tens of milliseconds."""

MOST_WARMING = 24
"""Steps of a shape that do not count, at most, beside the first."""


@dataclass(frozen=True, order=True)
class StepShape:
    """A step to measure.

    Attributes:
        contexts: tokens of each sequence that decodes, the one that it computes included; 2 at least.
        prompts: (start, tokens) of each prompt: tokens that an earlier request has left in the cache, a multiple of the
            block size, and those that are computed.
        shares: the prompts have those before them in common.
        common: tokens with which all contexts begin, a multiple of the block size.
        drafts: of each of the sequences that decode, drafts behind the token that counts among its context; none unless
            given.
        asked: drafts to propose behind the step for each sequence that samples in it.
    """

    contexts: tuple[int, ...] = ()
    prompts: tuple[tuple[int, int], ...] = ()
    shares: bool = False
    common: int = 0
    drafts: tuple[int, ...] = ()
    asked: int = 0

    @classmethod
    def of(cls, batch: Batch, block_size: int) -> StepShape:
        """The shape of a decided step; a prompt begins at the block in which it really does."""
        inside, drafts = set(batch.prompts), batch.drafts
        rows = list(zip(batch.seqs, batch.starts, batch.lengths, strict=True))
        least = 3 if batch.num_drafts_asked or drafts else 2
        decodes = [(max(least, start + 1), drafts.get(seq, 0)) for seq, start, _ in rows if seq not in inside]
        decodes.sort(reverse=True)
        return cls(
            tuple(context for context, _ in decodes),
            tuple((start // block_size * block_size, length) for seq, start, length in rows if seq in inside),
            drafts=tuple(number for _, number in decodes) if drafts else (),
            asked=max((batch.num_drafts_asked, *(number for _, number in decodes))),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, drafts and the one that a prompt generates included."""
        return max((*map(sum, self.drafted), *(start + length + 1 for start, length in self.prompts)))

    @property
    def drafted(self) -> list[tuple[int, int]]:
        """The context of each sequence that decodes, and its drafts."""
        return list(zip(self.contexts, self.drafts or (0,) * len(self.contexts), strict=True))

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the prompts compute."""
        return sum(length for _, length in self.prompts)

    @property
    def kv_tokens(self) -> int:
        """KV tokens that the step holds."""
        return sum(self.contexts) + sum(self.drafts) + sum(map(sum, self.prompts))


@dataclass(frozen=True)
class MeasuredStep:
    """A step that was run, what the device took for it, and the host: before the decision, and from there on until it
    was launched; in nanoseconds.

    Attributes:
        arrived: requests that came in since the decision before.
    """

    batch: Batch
    arrived: int
    bookkeeping_ns: int
    launch_ns: int
    device_ns: int


def design(
    count: int,
    *,
    max_seqs: int,
    max_context: int,
    max_prompt: int,
    block_size: int,
    num_blocks: int,
    max_rows: int,
    max_tokens: int,
    repeats: int,
    seed: int = 0,
    most_drafts: int = 0,
) -> list[StepShape]:
    """Shapes that fill the space of steps evenly, by a scrambled Sobol sequence.

    Two of five are decodes alone, one of four prompts alone, the others both. Numbers of decodes, contexts and prompt
    tokens are even in their logarithm; contexts within a step go from all alike to widely uneven. Of prompts, half
    begin behind earlier tokens, so that there are pieces of all lengths behind contexts of all lengths, and a quarter
    of those share them. In a third of the steps with decodes, these have a beginning in common. Of an engine that
    drafts, half of the steps ask for as many drafts as there may be, a tenth for none, and the others for some; in half
    of them all decodes have as many, in the others a share of them.

    Args:
        count: shapes; a power of two fills best.
        max_seqs: the most decodes.
        max_context: the longest context.
        max_prompt: the most prompt tokens in a step.
        block_size: a prompt behind earlier tokens begins at a multiple of it.
        num_blocks: of the pool; contexts are cut to half of it, and sequences left out that have no room while a shape
            is run `repeats` times.
        max_rows: sequences that the runner can hold; from LEAST_AHEAD on the prompts of two steps are among them, one
            being in flight.
        max_tokens: of a step.
        seed: another seed, other shapes; the same, the same.
        most_drafts: of a sequence in a step; 0 of an engine that does not draft.

    Raises:
        InputError: the pool has no room for most of the shapes, or the limits leave no two unlike ones of a kind.
    """
    from scipy.stats import qmc

    points = qmc.Sobol(12 if most_drafts else 10, seed=seed).random(count)
    shapes = []
    # A prompt of which one token is left is padded where there are drafts, and would be no such shape.
    least = 2 if most_drafts else 1
    max_prompt, steps = min(max_prompt, max_tokens), _steps_at_once(max_rows)
    shortest = min(LEAST_CONTEXT, max(1 + least, max_context // 4))
    for kind, rows, context, spread, number, tokens, behind, start, shares, common, *drafting in points.tolist():
        decodes = prompts = 0
        if kind < 0.4 or kind >= 0.65:
            decodes = _between(1, min(max_seqs, max_rows), rows)
        if kind >= 0.4:
            prompts = _between(1, min(MOST_PROMPTS, max_prompt // least, max_rows // steps), number)
        total = _between(least * prompts, max_prompt, tokens) if prompts else 0
        lengths = _uneven(prompts, total // max(1, prompts), 1.2 * spread, max_context - 1)
        lengths = _cut([max(least, length) for length in lengths], max_prompt, least)
        decodes = min(decodes, max_rows - steps * prompts, max_tokens - sum(lengths))
        share = num_blocks * block_size // 2
        mean = min(_between(shortest, max_context, context), share // max(1, decodes))
        contexts = [max(1 + least, size) for size in _uneven(decodes, mean, 1.2 * spread, max_context)]
        room = min(max_context - 1 - max(lengths, default=0), share // max(1, prompts))
        begin = (
            _between(block_size, room, start) // block_size * block_size if behind < 0.5 and room > block_size else 0
        )
        starts = [begin * (place + 1) // prompts // block_size * block_size for place in range(prompts)]
        pieces = tuple(zip(starts, lengths, strict=True))
        whole = (min(contexts, default=least) - least) // block_size * block_size
        alike = _between(block_size, whole, 3 * common) // block_size * block_size if whole and 3 * common < 1 else 0
        shape = StepShape(tuple(contexts), pieces, shares < 0.25, alike if decodes > 1 else 0)
        if most_drafts:
            shape = _drafting(shape, drafting[0], drafting[1], most_drafts, max_tokens)
        shape = _cut_to(shape, num_blocks, repeats, block_size)
        if shape.contexts or shape.prompts:
            shapes.append(shape)
    if 2 * len(shapes) < count:
        problem = f"expected more: most steps to measure do not fit the {num_blocks * block_size} tokens of the KV pool"
        raise InputError(problem, field="num_gpu_blocks", value=num_blocks)
    for words, some in (("with prompts", True), ("without prompts", False)):
        unlike = {(shape.contexts, shape.prompts) for shape in shapes if bool(shape.prompts) is some}
        if len(unlike) < 2 and not most_drafts:
            problem = f"all steps {words} are alike, and what they cost cannot be fitted"
            raise InputError(f"expected a larger max_model_len or max_num_batched_tokens: {problem}")
    return shapes


def _drafting(shape: StepShape, asked: float, having: float, most_drafts: int, max_tokens: int) -> StepShape:
    """The shape with drafts: how many by `asked`, and in what share of the decodes by `having`, as far as a step of so
    many tokens has room for its rows."""
    number = 0 if asked < 0.1 else most_drafts if asked >= 0.5 else 1 + int((asked - 0.1) / 0.4 * most_drafts)
    room = (max_tokens - shape.prompt_tokens) // (1 + number)
    contexts = shape.contexts[: max(0, room)]
    rows = round(len(contexts) * min(1.0, 2.0 * having))
    drafts = (number,) * rows + (0,) * (len(contexts) - rows)
    return replace(shape, contexts=contexts, drafts=drafts if number else (), asked=number)


def _cut_to(shape: StepShape, num_blocks: int, repeats: int, block_size: int) -> StepShape:
    """The shape with as many of its sequences as a pool of so many blocks holds while it is run."""
    while (shape.contexts or shape.prompts) and _blocks_of(shape, repeats, block_size) > num_blocks:
        shape = replace(
            shape,
            contexts=shape.contexts[:-1],
            prompts=shape.prompts[: len(shape.prompts) * 3 // 4],
            drafts=shape.drafts[: max(0, len(shape.contexts) - 1)],
        )
    return shape


def covering(
    made: Iterable[StepShape],
    count: int,
    *,
    max_context: int,
    block_size: int,
    num_blocks: int,
    max_rows: int,
    repeats: int,
    seed: int = 0,
) -> list[StepShape]:
    """Some of the shapes that were made, from all over the space of their features.

    Shapes are alike whose decodes, their contexts, prompts, prompt tokens and the longest context before them lie
    between the same powers of two. One of each kind is taken at random, then another of each, until there are `count`:
    steps that are rare are there as well as those that are frequent.

    Args:
        max_context, block_size, num_blocks, max_rows, repeats: as of `design`; sequences for which there is no room are
            left out.
    """
    shapes, steps = set(), _steps_at_once(max_rows)
    for shape in made:
        decodes = [(context, drafts) for context, drafts in shape.drafted if context + drafts < max_context]
        prompts = [(start, length) for start, length in shape.prompts if start + length < max_context]
        del prompts[max_rows // steps :], decodes[max(0, max_rows - steps * len(prompts)) :]
        contexts = tuple(context for context, _ in decodes)
        drafts = tuple(number for _, number in decodes) if shape.drafts else ()
        cut = StepShape(contexts, tuple(prompts), drafts=drafts, asked=shape.asked)
        cut = _cut_to(cut, num_blocks, repeats, block_size)
        if cut.contexts or cut.prompts:
            shapes.add(cut)
    kinds: dict[tuple[int, ...], list[StepShape]] = defaultdict(list)
    rng = random.Random(seed)
    for shape in rng.sample(sorted(shapes), len(shapes)):
        before = max((start for start, _ in shape.prompts), default=0)
        sizes = [len(shape.contexts), sum(shape.contexts), len(shape.prompts), shape.prompt_tokens, before]
        sizes += [sum(shape.drafts), shape.asked]
        kinds[tuple(size.bit_length() for size in sizes)].append(shape)
    rounds = zip_longest(*kinds.values())
    return list(islice((shape for found in rounds for shape in found if shape is not None), count))


def _steps_at_once(max_rows: int) -> int:
    """Steps whose sequences a runner holds at once while they are measured."""
    return 2 if max_rows >= LEAST_AHEAD else 1


def _between(least: int, most: int, share: float) -> int:
    """From the least to the most, even in the logarithm."""
    return max(least, min(most, round(least * (most / least) ** share))) if most > least else least


def _uneven(count: int, mean: int, spread: float, most: int) -> list[int]:
    """So many numbers of about this mean, quantiles of a lognormal distribution."""
    normal = NormalDist()
    factors = [2.718281828 ** (spread * normal.inv_cdf((place + 0.5) / count)) for place in range(count)]
    scale = mean * count / sum(factors) if count else 0.0
    return [max(1, min(most, round(factor * scale))) for factor in factors][::-1]


def _cut(lengths: list[int], most: int, least: int) -> list[int]:
    """The numbers, smaller from the last one on, but no less than `least`, where their sum is more than `most`."""
    lengths = list(lengths)
    place = len(lengths) - 1
    while (beyond := sum(lengths) - most) > 0:
        lengths[place] = max(least, lengths[place] - beyond)
        place -= 1
    return lengths


def measure(
    llm: LLM, shapes: list[StepShape], *, repeats: int, seed: int = 0, progress: Callable[[], None] | None = None
) -> list[MeasuredStep]:
    """Run each shape `repeats` steps in a row, after some that warm the device up; the shapes in random order.

    The sequences of a step are put in place without computing them. The pool is filled with noise before: keys and
    values of zero would be read at less power, and so faster where power is what limits a device.

    Args:
        progress: called after each step that counts.

    Raises:
        InputError: a shape does not fit the model's context or the KV pool.
    """
    settings = llm.settings
    pool, most = (settings.num_gpu_blocks or 0) * settings.block_size, settings.max_model_len
    for shape in shapes:
        if most is not None and shape.longest + shape.asked + spare_tokens(repeats) > most:
            raise InputError(f"expected contexts below {most}", field="shape", value=shape)
        if _blocks_of(shape, repeats, settings.block_size) * settings.block_size > pool:
            raise InputError(f"expected at most the {pool} tokens of the KV pool", field="shape", value=shape)
    llm.capture()
    llm.fill_cache(seed)
    order = list(shapes)
    random.Random(seed).shuffle(order)
    steps: list[MeasuredStep] = []
    with _accepting_none(llm):
        for shape in order:
            for step in _steps_of(llm, shape, repeats):
                steps.append(step)
                if progress is not None:
                    progress()
    return steps


@contextmanager
def _accepting_none(llm: LLM) -> Iterator[None]:
    """Have no draft accepted meanwhile, whatever it is."""
    if not isinstance(llm.runner, SpeculativeRunner):
        yield
        return
    rate, llm.runner.acceptance_rate = llm.runner.acceptance_rate, 0.0
    try:
        yield
    finally:
        llm.runner.acceptance_rate = rate


def _steps_of(llm: LLM, shape: StepShape, repeats: int) -> Iterator[MeasuredStep]:
    """Put the sequences of a shape in place, then run its steps for real; the first ones do not count.

    Where steps follow one another without a gap, these last for WARMING_NS, if they are no more than MOST_WARMING.

    Decodes go on from step to step; each step brings prompts of its own, which have left once it is known.
    """
    texts = _Texts(llm)
    core = _core_for(llm, shape, repeats)
    if core.scheduler.speculation.is_async:  # each row has as many drafts as are asked for
        shape = replace(shape, drafts=(shape.asked,) * len(shape.contexts) if shape.asked else ())
    drafts = _put_in_place(core, texts, shape, repeats)
    if isinstance(llm.runner, SpeculativeRunner):
        llm.runner.adopt(drafts)
    waits = llm.runner.kernel_facts().get("waits", False)
    coming = [texts.prompts(shape) for _ in range(repeats + 1)]
    depth, warming, number = core.pipeline_depth, 1, 0
    in_flight: deque[tuple[Batch, StepHandle, int, int, int]] = deque()
    free = time.perf_counter_ns()
    ended: int | None = None
    while number < warming + repeats + depth:
        if number < warming + repeats:
            for seq in coming[number]:
                core.ingest(seq, 0)
            decided = time.perf_counter_ns()
            batch = core.decide(0)
            handle = llm.runner.launch(batch)
            launched = time.perf_counter_ns()
            # Where the host needs what came of the step before, it is the device that takes this long.
            waited_ns = handle.waited_ns if isinstance(handle, VerifiedStep) else 0
            _check(batch, shape, number, core)
            in_flight.append((batch, handle, decided, decided - free, launched - decided - waited_ns))
            free = launched
        if number >= depth:
            batch, handle, decided, bookkeeping_ns, launch_ns = in_flight.popleft()
            output = handle.result()
            if waits:  # what lies between two steps is the host's, before the decision and behind it
                since = handle.start_ns if ended is None else ended
                bookkeeping_ns, launch_ns = max(0, decided - since), handle.start_ns - max(decided, since)
            elif not depth:  # the host waits until the step has begun, and for as long as it runs
                launch_ns = max(launch_ns, handle.start_ns - decided)
            free = max(free, handle.end_ns)
            core.commit(_rejected(output, batch, drafts, core) if isinstance(output, Runs) else output, 0)
            device = device_ns(handle.start_ns, handle.end_ns, None if waits else ended)
            if depth and ended is None:
                warming += min(MOST_WARMING, WARMING_NS // max(1, device))
                coming += [texts.prompts(shape) for _ in range(warming - 1)]
            ended = handle.end_ns
            if number - depth >= warming:
                yield MeasuredStep(batch, len(shape.prompts), bookkeeping_ns, launch_ns, device)
        number += 1


def _rejected(output: Runs, batch: Batch, drafts: dict[Sequence, int], core: Core) -> Runs:
    """What comes of a step none of whose drafts is accepted, if as many are found again."""
    found = None if core.scheduler.speculation.is_async else [drafts.get(seq, 0) for seq in batch.sampled]
    return Runs(output.token_ids, [1] * batch.num_sampled, found)


def spare_tokens(repeats: int) -> int:
    """By how many tokens a context may grow while its shape is run."""
    return MOST_WARMING + repeats + 2


def _blocks_of(shape: StepShape, repeats: int, size: int) -> int:
    """Blocks that hold a shape's sequences while its steps are run, those of three steps' prompts among them."""
    ahead = shape.asked  # tokens that are drafted behind a row
    decodes = sum(-(-(context + drafts + ahead + spare_tokens(repeats)) // size) for context, drafts in shape.drafted)
    prompts = sum(-(-(length + ahead) // size) + 1 for _, length in shape.prompts)
    starts = [start // size for start, _ in shape.prompts]
    return decodes + 3 * prompts + (max(starts) if shape.shares and starts else sum(starts)) + 2


def _core_for(llm: LLM, shape: StepShape, repeats: int) -> Core:
    """Policies that put a shape in place in one step."""
    most = len(shape.contexts) + 3 * len(shape.prompts) + 2
    config = llm.settings.speculative_config
    if config is not None:
        every = {"num_speculative_tokens_per_batch_size": [[1, most, shape.asked]], "draft_length": None}
        config = config.model_copy(update=every | {"num_speculative_tokens": max(1, shape.asked)})
    return Settings(
        max_num_seqs=most,
        max_num_batched_tokens=shape.kv_tokens + most * (2 + shape.asked),
        max_model_len=llm.settings.max_model_len,
        block_size=llm.settings.block_size,
        # No more blocks than the shape needs: making the policies' pool would cost more than the step.
        num_gpu_blocks=_blocks_of(shape, repeats, llm.settings.block_size),
        pipeline_depth=_depth(llm),
        speculative_config=config,
    ).build_core()


def _depth(llm: LLM) -> int:
    """One step ahead where steps are graphs; with drafts, as it serves where they are, or the host waits for them, else
    0."""
    settings, has_graphs = llm.settings, llm.attention.graphs
    if settings.speculative_config is not None:
        return settings.pipeline_depth if has_graphs or llm.runner.kernel_facts().get("waits") else 0
    return int(has_graphs and _steps_at_once(settings.max_num_seqs) > 1)


class _Texts:
    """Makes prompts that share nothing but what they are to share."""

    def __init__(self, llm: LLM):
        self._maker = llm.token_maker
        self._rng = random.Random(0)
        self._before: dict[int, list[int]] = {}

    def tokens(self, count: int) -> list[int]:
        """So many tokens that nobody else has."""
        return self._rng.choices(range(self._maker.first_id, self._maker.vocab_size), k=count)

    def sequence(self, token_ids: list[int], max_tokens: int) -> Sequence:
        """A request."""
        return Sequence(token_ids, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))

    def before(self, shape: StepShape) -> list[list[int]]:
        """What the prompts of a shape begin behind, that of each or, where they share it, the longest."""
        starts = [start for start, _ in shape.prompts]
        for place, start in enumerate([max(starts, default=0)] if shape.shares else starts):
            self._before.setdefault(place, self.tokens(start))
        return [tokens for tokens in self._before.values() if tokens]

    def prompts(self, shape: StepShape) -> list[Sequence]:
        """The prompts of one more step."""
        self.before(shape)
        return [
            self.sequence(self._before[0 if shape.shares else place][:start] + self.tokens(length), 1)
            for place, (start, length) in enumerate(shape.prompts)
        ]


def _put_in_place(core: Core, texts: _Texts, shape: StepShape, repeats: int) -> dict[Sequence, int]:
    """Let the decodes of a shape have their contexts, and the cache what its prompts begin behind; of each decode, its
    drafts, which wait for it."""
    common, drafts = texts.tokens(shape.common), dict[Sequence, int]()
    spare = spare_tokens(repeats) + 2 + 2 * shape.asked  # a row has no more drafts than its answer has room for
    for context, number in shape.drafted:
        seq = texts.sequence(common + texts.tokens(context - 1 - shape.common), spare)
        core.ingest(seq, 0)
        drafts[seq] = number
    for tokens in texts.before(shape):
        core.ingest(texts.sequence(tokens, 1), 0)
    while core.can_decide and any(seq.num_computed_tokens < seq.num_prompt_tokens for seq in core.sequences.values()):
        batch = core.decide(0)
        none = [0] * batch.num_sampled
        runs = _rejected(Runs(none, [1] * len(none)), batch, drafts, core) if core.scheduler.speculation.most else none
        core.commit(runs, 0)
    return drafts


def _check(batch: Batch, shape: StepShape, number: int, core: Core) -> None:
    """The step was of the shape that was asked for; drafts in flight count as if they were right."""
    decided = (batch.num_decode_tokens, batch.num_prompt_tokens, batch.num_kv_tokens)
    decodes, drafts = len(shape.contexts), sum(shape.drafts)
    grown = number * decodes + (drafts if number and core.scheduler.speculation.is_async else 0)
    wanted = (decodes + drafts, shape.prompt_tokens, shape.kv_tokens + grown)
    assert decided == wanted, f"decided (decodes, prompt, KV tokens) {decided}, wanted {wanted}"
