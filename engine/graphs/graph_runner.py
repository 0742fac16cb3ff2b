"""GraphRunner: runs batches on CUDA, each a single graph where its size allows."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.device_queue import CudaQueue, Step, on_device, to_device
from twinserve.engine.graphs.device_rows import DeviceRows, aligned
from twinserve.engine.graphs.fused_decoder import FusedDecoder, StepRows
from twinserve.engine.graphs.step_sizes import CAPTURED_PROMPTS, GraphOptions, StepSize, StepSizes
from twinserve.engine.kernels.cuts import decode_cuts, longest_first, prompt_tiles, tile_tokens
from twinserve.engine.kv_cache import KVCache
from twinserve.engine.logprobs import AskedLogprobs, Heard, LogprobStep, PromptLogprobs
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.online import TokenHandle
from twinserve.engine.sampler import GeneratedTokens, SamplingPlan, draw_uniforms, is_plain, mark_seen
from twinserve.policies import Batch, Row, SamplingParams, Sequence
from twinserve.settings.errors import InputError

Graph = TypeVar("Graph")
GRAPH_BYTES = 1 << 30
"""Memory that is left for the captured graphs and for what kernels take when they are loaded."""


@dataclass
class _Graph:
    """A captured step: what it reads and leaves."""

    inputs: Tensor
    replay: Callable[[], None]
    logits: Tensor


def capture_each(
    sizes: Seq[StepSize],
    capture: Callable[[StepSize, Any, torch.cuda.Stream], Graph],
    device: torch.device,
    memory_share: float,
) -> dict[StepSize, Graph]:
    """What `capture` makes of each size, with a memory pool and a stream that all share.

    Args:
        memory_share: the `gpu_memory_utilization` that left the memory for it.

    Raises:
        InputError: they do not fit the memory that is left.
    """
    graphs: dict[StepSize, Graph] = {}
    pool = torch.cuda.graph_pool_handle()
    with _no_garbage_collected(), on_device(device):
        stream = torch.cuda.Stream(device)
        for size in sizes:
            try:
                graphs[size] = capture(size, pool, stream)
            except torch.OutOfMemoryError as error:
                problem = f"expected less: {len(graphs)} of {len(sizes)} steps are captured, and memory is full"
                raise InputError(problem, field="gpu_memory_utilization", value=memory_share) from error
        torch.cuda.empty_cache()
    return graphs


def captured(
    run: Callable[[], Tensor],
    device: torch.device,
    pool: Any,
    stream: torch.cuda.Stream,
    error_mode: str = "global",
) -> tuple[Tensor, Callable[[], None]]:
    """What `run` gives, captured as a graph, and what replays it. It is replayed once: the first replay loads a graph
    onto the device, and no step that is served should wait for that.

    Args:
        error_mode: which threads may do nothing meanwhile that cannot be captured; see torch.cuda.graph.
    """
    run()  # loads what is not loaded yet, which cannot be captured
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Not by torch.cuda.graph, which would give back what torch has cached before each of them.
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode=error_mode)
        try:
            made = run()
        finally:
            graph.capture_end()
    graph.replay()
    return made, graph.replay


@dataclass(frozen=True)
class GraphStep:
    """What the device has to be told of a step, as the host has it.

    Attributes:
        changes: of what it keeps of sequences, see `DeviceRows.changes`; None is none.
        size: whose graph is replayed, or, where there is none, of the kernels that are launched.
        inputs: the numbers of `StepRows`; None where the graph has them from the step before.
        special: places among the sampled of the rows that are sampled behind the graph, and their device rows.
        prompt_places: see `PromptLogprobs.places`.
    """

    changes: np.ndarray | None
    size: StepSize
    inputs: np.ndarray | None = None
    special: tuple[list[int], list[int]] = ([], [])
    prompt_places: Seq[int] = ()


class GraphRunner:
    """Runs steps of a model over a pool of paged KV, in the order in which they are launched.

    What a step needs of its sequences lies on the device (`DeviceRows`), where the step before it has left the tokens
    it sampled; so a step can be launched before the tokens of the one before are read. A step of decodes alone is one
    graph launch, and nothing is copied to the device unless the decision changed something. Steps with prompts are
    graphs too, unless they have more prompt tokens than any of `StepSizes`: then their kernels outlast their launches.

    Args:
        config: the pool, the attention of decodes ("triton" or "flash"), the limits of the policies, the seed of the
            draws for requests without a seed of their own, and what is switched off.

    Attributes:
        model, device, num_blocks, block_size: as in use.
        logprobs: what steps that were waited for have given of those asked for, until whoever serves a sequence takes
            it out.
        prompt_asks: see `ModelRunner`.
    """

    _DECODER = FusedDecoder
    _ERROR_MODE = "global"
    _samples_itself = staticmethod(is_plain)

    def __init__(self, model: Decoder, config: RunnerConfig):
        self.model, self.device = model, model.device
        self.num_blocks, self.block_size = config.num_blocks, config.settings.block_size
        self._cache = KVCache(model.config, self.num_blocks, self.block_size, config.kv_cache_dtype, self.device)
        self._generator = random.Random(config.options.seed)
        self.logprobs: Heard = {}
        self.prompt_asks: dict[Sequence, int] = {}
        self.num_launched = 0
        max_num_seqs, max_model_len = config.settings.max_num_seqs, config.max_model_len
        width = -(-max_model_len // self.block_size)
        self._vocab_size = config.model.vocab_size
        self._rows = DeviceRows(
            max_num_seqs, width, self._vocab_size, self.num_blocks, self.device, self._generator, self._samples_itself
        )
        self._attention = cast(Literal["triton", "flash"], config.attention.name)
        self._max_num_batched_tokens = config.settings.max_num_batched_tokens
        self._sizes = StepSizes(max_num_seqs, self._max_num_batched_tokens, 2.0 * model.config.num_layer_parameters)
        self._options = config.graph_options or GraphOptions()
        self._decoder = self._DECODER(
            model,
            self._cache,
            self._rows,
            attention=self._attention,
            max_decodes=max_num_seqs,
            max_tokens=self._sizes.most_tokens,
            max_sampled=max_num_seqs + CAPTURED_PROMPTS,
            max_positions=max_model_len,
            options=self._options,
        )
        self._tile = tile_tokens(model.config.num_heads // model.config.num_kv_heads, model.dtype)
        self._out = torch.zeros(2 * max_num_seqs + CAPTURED_PROMPTS, dtype=torch.int32, device=self.device)
        self._queue = CudaQueue(self.device)
        self._memory_share = config.options.gpu_memory_utilization
        self._graphs: dict[StepSize, _Graph] = {}
        self._decision = -1
        self._num_resident = 0
        self._places: list[int] = []

    def step_bytes(self) -> int:
        """Bytes that the largest step takes for a while: all its rows ask for every setting; or one is a prompt whose
        log-probabilities are asked for; and graphs."""
        with on_device(self.device):
            return self._step_bytes() + GRAPH_BYTES

    @torch.inference_mode()
    def _step_bytes(self) -> int:
        seqs, tokens = self._rows.scratch, self._max_num_batched_tokens
        size = StepSize(0, tokens, seqs)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        logits = self._whole(self._decoder.run(self._padding(size)[1], self._out))
        vocab_size = self._vocab_size
        params = [SamplingParams(top_p=0.5, repetition_penalty=1.5, presence_penalty=0.5, logprobs=1)] * seqs
        # Twice: what is kept of all rows, and the copy that a step takes of it.
        seen = torch.zeros(2, seqs, vocab_size, dtype=torch.bool, device=self.device)[0]
        counts = torch.zeros(seqs, vocab_size, device=self.device)
        asked = AskedLogprobs([Row(Sequence([0], param), 0, 1, True, True) for param in params])
        sampled = SamplingPlan.of(params, [0.5] * seqs, self.device).sample(logits, seen, counts)
        asked.take(logits, sampled)
        del logits, seen, counts, sampled, asked
        prompt = Sequence([0] * tokens)
        asks = PromptLogprobs([Row(prompt, 0, tokens, True, True)], {prompt: 1}, {})
        if asks:
            asks.take(self._decoder.hidden, self.model.logits)
        torch.cuda.synchronize(self.device)
        taken = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return taken

    def fill_cache(self, seed: int) -> None:
        """Fill the pool with noise, see `KVCache.fill`."""
        self._cache.fill(seed)

    def kernel_facts(self) -> dict[str, Any]:
        """How steps are padded and cut, as the facts of a run say it (`twinserve.sim.kernels.Kernels`)."""
        facts = self._sizes.as_facts(self._options.captured) | {"prompt_tile": self._tile}
        if self._attention == "triton":
            facts["decode_cuts"] = decode_cuts(self._rows.scratch, self.model.config.num_kv_heads, self.model.dtype)
        return facts

    def close(self) -> None:
        """Wait for what was launched."""
        self._queue.close()

    def capture(self) -> None:
        """Capture the graphs, unless that was done.

        Raises:
            InputError: they do not fit the memory that is left.
        """
        sizes = self._sizes.captured(self._options.captured)
        if self._graphs or not sizes:
            return
        self._graphs.update(capture_each(sizes, self._capture, self.device, self._memory_share))
        with on_device(self.device):
            self._load_kernels()

    @torch.inference_mode()
    def _load_kernels(self) -> None:
        """Run steps of padding kernel by kernel, one for each way in which decodes attend beside prompts: most of them
        no graph has, and no step that is served should wait until they are compiled."""
        for rows, *_ in self.kernel_facts().get("decode_cuts", []):
            self._decoder.run(self._padding(StepSize(rows, rows + 1, 1))[1], self._out)

    @torch.inference_mode()
    def _capture(self, size: StepSize, pool: Any, stream: torch.cuda.Stream) -> _Graph:
        """Capture a step of padding alone, which leaves nothing behind but in the scratch row."""
        inputs, rows = self._padding(size)
        logits, replay = captured(
            lambda: self._decoder.run(rows, self._out), self.device, pool, stream, self._ERROR_MODE
        )
        return _Graph(inputs, replay, logits)

    def _padding(self, size: StepSize) -> tuple[Tensor, StepRows]:
        """The inputs of a step of padding alone, and its rows, which lie in them."""
        inputs = to_device(self._inputs(size, [], [], []), self.device)
        return inputs, _views(inputs, size, self._tile)

    def execute(self, batch: Batch) -> list[int]:
        """Run a step; a token for each of `batch.sampled`."""
        return self.launch(batch).result()

    def launch(self, batch: Batch) -> TokenHandle:
        """Start a step.

        Raises:
            ValueError: a sequence's blocks are not of this runner's pool.
        """
        self.num_launched += 1
        if batch.decision != self._decision + 1 or batch.decision <= 0:
            # Another run, or decisions in between that were not launched: what the device knows is of no use.
            self._rows.clear()
            self._num_resident = 0
        self._decision = batch.decision
        if self._is_repeated(batch):
            count = len(batch)
            repeated = GraphStep(self._rows.changes(batch, ()), self._sizes.padded(StepSize(count, count)))
            self._tell(repeated)
            return _InOrder(self._queue.submit(lambda: self._run(repeated)[:count]), self._places)
        rows = batch.rows
        changes = self._rows.changes(batch, rows)
        decodes = [row for row in rows if not row.is_prompt]
        if self._options.longest_first:
            decodes.sort(key=lambda row: -row.start)
        prompts = [row for row in rows if row.is_prompt]
        own = StepSize(len(decodes), len(decodes) + sum(row.num_tokens for row in prompts), len(prompts))
        padded = self._sizes.padded(own)
        is_captured = padded in self._graphs
        size = padded if is_captured else own
        special = self._special(size, decodes, prompts)
        self._num_resident = 0 if not is_captured or prompts or special else len(decodes)
        if not rows:
            return self._queue.submit(lambda: self._out[:0])
        device_rows = self._rows.of(row.seq for row in decodes), self._rows.of(row.seq for row in prompts)
        asked = AskedLogprobs([one.row for one in special])
        of_prompts = PromptLogprobs([*decodes, *prompts], self.prompt_asks, self.logprobs)
        told = GraphStep(
            changes,
            size,
            self._inputs(size, device_rows[0], prompts, device_rows[1]),
            ([one.place for one in special], [one.device_row for one in special]),
            of_prompts.places,
        )
        self._tell(told)
        step = self._queue.submit(lambda: self._run(told, special, asked, of_prompts))
        places = {row.seq: place for place, row in enumerate(decodes)}
        places |= {row.seq: size.decodes + place for place, row in enumerate(prompts)}
        self._places = [places[row.seq] for row in rows if row.samples]
        in_order = _InOrder(step, self._places)
        every = [one for one in (asked, of_prompts) if one]
        return LogprobStep(in_order, every, self.logprobs) if every else in_order

    def _tell(self, step: GraphStep) -> None:
        """Tell those who compute a step together with this runner; here nobody does."""

    def _is_repeated(self, batch: Batch) -> bool:
        """Does a batch have the rows of the one before it, decodes alone that a graph has run?"""
        changed = batch.admitted or batch.left or batch.preempted or batch.prompts or batch.skipped
        return not changed and len(batch) == self._num_resident > 0

    def _run(
        self,
        step: GraphStep,
        special: Seq[_Special] = (),
        asked: AskedLogprobs | None = None,
        of_prompts: PromptLogprobs | None = None,
    ) -> Tensor:
        """Run a step, and sample what is special behind it; the tokens."""
        logits = self._computed(step)
        if of_prompts:
            of_prompts.take(self._decoder.hidden, self.model.logits)
        if special:
            places, rows = (to_device(np.array(numbers), self.device) for numbers in step.special)
            tokens = self._sample(special, rows, self._whole(logits[places]), asked)
            self._put(tokens, places, rows)
        return self._out

    def _computed(self, step: GraphStep) -> Tensor:
        """Run a step, a graph or without one; the logits of its sampled rows."""
        if step.changes is not None:
            self._rows.apply(step.changes)
        inputs = None if step.inputs is None else to_device(step.inputs, self.device)
        graph = self._graphs.get(step.size)
        if graph is None:
            assert inputs is not None
            return self._decoder.run(_views(inputs, step.size, self._tile), self._out)
        if inputs is not None:
            graph.inputs.copy_(inputs)
        graph.replay()
        return graph.logits

    def _whole(self, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary."""
        return logits

    def _sample(self, special: Seq[_Special], rows: Tensor, logits: Tensor, asked: AskedLogprobs | None) -> Tensor:
        """Sample for special rows, whose device rows and logits are given."""
        params = [one.row.seq.sampling_params for one in special]
        generated = [one.row.start + one.row.num_tokens - one.row.seq.num_prompt_tokens for one in special]
        plan = SamplingPlan.of(params, [one.draw for one in special], self.device, generated)
        seen, counts = None, None
        # Only a decode's last token may be in flight, and decodes lie first in the flat batch, as among the sampled.
        counted = GeneratedTokens.of([(one.row, one.place) for one in special], self.device)
        if counted is not None:
            counts = counted.counts(self._decoder.token_ids, logits.shape[-1])
        if plan.penalised is not None:
            self._rows.see({one.device_row: one.unseen for one in special if one.unseen is not None})
            seen = self._rows.seen[rows[plan.penalised]]
        tokens = plan.sample(logits, seen, counts)
        if plan.penalised is not None:
            mark_seen(self._rows.seen, rows[plan.penalised], tokens[plan.penalised].clamp(min=0))
        if asked:
            asked.take(logits, tokens)
        return tokens

    def _put(self, tokens: Tensor, places: Tensor, rows: Tensor) -> None:
        """Put tokens in place of what the step has sampled at these places, for these device rows."""
        self._out.index_copy_(0, places, tokens.int())
        self._rows.tokens.index_copy_(0, rows, tokens.int().clamp(min=0))

    def _special(self, size: StepSize, decodes: list[Row], prompts: list[Row]) -> list[_Special]:
        """The sampling rows that ask for more than the step does by itself: the best token, or one by temperature."""
        if not self._rows.special:
            return []
        places = [*enumerate(decodes), *((size.decodes + place, row) for place, row in enumerate(prompts))]
        special = []
        for place, row in places:
            if row.samples and row.seq in self._rows.special:
                params = row.seq.sampling_params
                draw = draw_uniforms([params], [row.start + row.num_tokens], self._generator)[0]
                unseen = self._rows.unseen(row) if params.repetition_penalty != 1.0 else None
                special.append(_Special(row, place, self._rows.of([row.seq])[0], draw, unseen))
        return special

    def _inputs(self, size: StepSize, decode_rows: list[int], prompts: list[Row], prompt_rows: list[int]) -> np.ndarray:
        """The numbers of `StepRows`, one field after another, as `_views` finds them."""
        fields, scratch = _fields(size, self._tile), self._rows.scratch
        flat = np.zeros(fields[-1][1], dtype=np.int32)
        views = [flat[start:end] for start, end in fields]
        views[0].fill(scratch)
        views[0][: len(decode_rows)] = decode_rows
        if not size.prompts:
            return flat
        rows, tokens, positions, tiles, sampled, last = views[1:]
        rows.fill(scratch)
        sampled.fill(scratch)
        offset, cut = len(decode_rows), list[tuple[int, int, int, int]]()
        rows[:offset] = sampled[:offset] = decode_rows
        tokens[:offset] = -1
        last[:offset] = np.arange(offset)
        for number, (row, device_row) in enumerate(zip(prompts, prompt_rows, strict=True)):
            end = offset + row.num_tokens
            rows[offset:end] = device_row
            tokens[offset:end] = row.seq.token_ids[row.start : row.start + row.num_tokens]
            positions[offset:end] = np.arange(row.start, row.start + row.num_tokens)
            cut += prompt_tiles(device_row, offset, row.start, row.num_tokens, self._tile)
            if row.samples:
                sampled[size.decodes + number] = device_row
            last[size.decodes + number] = end - 1
            offset = end
        longest_first(cut)
        tiles[: 4 * len(cut)] = np.ravel(cut)
        return flat


@dataclass(frozen=True)
class _Special:
    """A row that is sampled behind the graph: its place among the sampled, and how it samples.

    Attributes:
        unseen: of a row with a repetition penalty, what `DeviceRows.unseen` gave.
    """

    row: Row
    place: int
    device_row: int
    draw: float
    unseen: list[int] | None


class _InOrder:
    """A step whose tokens are asked for in another order."""

    def __init__(self, step: Step, places: list[int]) -> None:
        self._step, self._places = step, places
        self.start_ns = self.end_ns = 0

    def result(self) -> list[int]:
        tokens = self._step.result()
        self.start_ns, self.end_ns = self._step.start_ns, self._step.end_ns
        return [tokens[place] for place in self._places]


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Collect what is garbage now, and nothing until the end: freeing another engine's graphs would end a capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _fields(size: StepSize, tile: int) -> list[tuple[int, int]]:
    """Where each field of `StepRows` begins and ends; each begins at 64 bytes."""
    lengths = [size.decodes]
    if size.prompts:
        num_tiles = size.tokens // tile + size.prompts
        lengths += [size.tokens] * 3 + [4 * num_tiles] + [size.decodes + size.prompts] * 2
    fields, start = [], 0
    for length in lengths:
        fields.append((start, start + length))
        start += aligned(length)
    return fields


def _views(inputs: Tensor, size: StepSize, tile: int) -> StepRows:
    """The fields of `inputs`, made by `GraphRunner._inputs`."""
    views = [inputs[start:end] for start, end in _fields(size, tile)]
    if not size.prompts:
        none = inputs[:0]
        return StepRows(views[0], views[0], none, none, none.view(0, 4), views[0], None)
    rows, tokens, positions, tiles, sampled, last = views[1:]
    return StepRows(views[0], rows, tokens, positions, tiles.view(-1, 4), sampled, last)
