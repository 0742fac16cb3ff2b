"""LLM: a model, its settings and its KV pool; generates from prompts and replays traces."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.device_queue import compute_on, device_name
from twinserve.engine.endings import with_stops
from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.kv_sizing import with_pool
from twinserve.engine.live import AsyncLLM
from twinserve.engine.model_runner import ModelRunner
from twinserve.engine.models import Decoder
from twinserve.engine.models.source import ModelSource
from twinserve.engine.online import Clock, Inbox
from twinserve.engine.options import EngineOptions
from twinserve.engine.prompts import check_token_maker, default_token_maker, encode_prompt
from twinserve.engine.serving import serve_trace
from twinserve.engine.speculation.choice import draft_of, proposer_maker
from twinserve.engine.speculation.runner import SpeculativeRunner
from twinserve.engine.token_logprobs import TokenLogprobs
from twinserve.policies import Core, CoreListener, SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.request import Request, TokenMaker
from twinserve.traces.runs.record import RunRecorder

if TYPE_CHECKING:
    from twinserve.engine.graphs.graph_runner import GraphRunner
    from twinserve.engine.parallel.ranks import Ranks


@dataclass(frozen=True)
class Completion:
    """What came of a prompt.

    Attributes:
        text: the generated tokens decoded, without special tokens; empty without a tokenizer.
        token_ids: the generated tokens, an end-of-sequence token included.
        finish_reason: "stop", "length", "refused", or "abort" where it could not be finished.
        num_prompt_tokens: tokens of the prompt.
        num_cached_tokens: those of them whose KV was found in the prefix cache.
        refusal: why a refused prompt can never be served, or why one that was begun could not be finished.
        logprobs: of each of `token_ids`, by the model's own distribution; None unless they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    refusal: str | None = None
    logprobs: list[TokenLogprobs] | None = None


class LLM:
    """A model ready to serve.

    `generate` may be called from any number of threads: their prompts share one Core, its pool and its prefix cache,
    which live on from call to call, so that a later call hits the prefixes of an earlier one. `run_trace` has fresh
    policies: what it decides does not depend on what was served before. It waits for calls of `generate` and they for
    it, and the Core after it is a fresh one, as is that after another Core's steps on the same runner: nothing is hit
    whose KV somebody else has overwritten. A step that fails, for want of the device's memory say, ends what is served
    with a StepError, which names the step and its batch: every block is free again, and the next call is served.

    Args:
        model: a Hugging Face folder, a Decoder, or a transformers model (whose weights are copied); with
            `load_format="dummy"`, a folder with config.json or a shape that ships.
        tokenizer: for a model given as a module; a folder's is found in it.
        name: what to call the model; None is the folder's name, or the module's class.
        settings: of the policies; None is vLLM's defaults. What they leave open is decided here: `max_model_len` is the
            model's, `num_gpu_blocks` what fits 1 GiB (CPU) or all that is left (CUDA), and
            `block_size`, where it was not given, the attention backend's own: 256 with flash, else 16.
        graph_options: what is switched off in steps that are graphs; None is nothing.
        threads: CPU threads of torch, in the whole process, and in that of each rank; None leaves them, but divides
            those of the machine among ranks on a CPU.
        token_maker: makes the prompts of traces; None takes the longest run of ids that do not end a text.
        draft: the model that drafts, in place of the `model` of the settings' speculative_config; as `model`.
        options: the fields of `EngineOptions`, such as `device="cuda"`; None is as not given. A Decoder keeps its own
            dtype, and its own quantization, which may be given if it is the same.

    Attributes:
        options: as they were given, or by default.
        config: the model's shape.
        settings: as in use, nothing left open.
        attention: the attention backend in use, and why.
        eos_token_ids: the tokens that end a text, the tokenizer's own first.
        sampling_defaults: what the model's generation config says of sampling; `generate` takes none of it.

    Raises:
        InputError: an option, the model, the settings, the graph options or the token maker cannot be used. All that
            can be known without the weights is refused before they are loaded.
        RunError: a process of those that share the model has ended.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        tokenizer: Any = None,
        name: str | None = None,
        settings: Settings | None = None,
        graph_options: GraphOptions | None = None,
        threads: int | None = None,
        token_maker: TokenMaker | None = None,
        draft: str | Path | nn.Module | None = None,
        **options: Any,
    ):
        self.name = name or (type(model).__name__ if isinstance(model, nn.Module) else Path(model).name)
        self.options = EngineOptions.load({"model": self.name, **options})
        ranks = self.options.tensor_parallel_size
        if threads is None and ranks > 1 and self.options.device == "cpu":
            threads = max(1, torch.get_num_threads() // ranks)
        if threads is not None:
            torch.set_num_threads(threads)
        source = ModelSource.of(model, self.options, tokenizer)
        self.config, self.tokenizer, self.eos_token_ids = source.config, source.tokenizer, source.eos_token_ids
        self.sampling_defaults = source.sampling_defaults
        self.token_maker = token_maker or default_token_maker(source)
        check_token_maker(self.token_maker, source)
        config = RunnerConfig.checked(source, self.options, settings or Settings(), graph_options)
        draft_source = draft_of(draft, config, source, self.options)
        self.attention, self.kv_cache_dtype = config.attention, config.kv_cache_dtype
        self._ranks: Ranks | None = None
        self.runner: ModelRunner | GraphRunner
        if self.options.tensor_parallel_size > 1:
            config, self.runner = self._over_ranks(source, config)
        else:
            # The smaller one first: what is wrong with its weights is said before minutes go into the others.
            drafting = None if draft_source is None else compute_on(config.device, draft_source.load)
            decoder = compute_on(config.device, source.load)
            config = with_pool(config, decoder, drafting)
            self.runner = _make_runner(decoder, config, self.tokenizer, drafting)
        self.settings = config.settings
        self._live: AsyncLLM | None = None
        self._forgotten: weakref.finalize | None = None
        self._guard = threading.Lock()

    def _over_ranks(self, source: ModelSource, config: RunnerConfig) -> tuple[RunnerConfig, ModelRunner | GraphRunner]:
        """The config with its pool and rank 0's runner, the other ranks being there."""
        from twinserve.engine.parallel.ranks import Ranks, rank_device
        from twinserve.engine.parallel.runners import make_runner
        from twinserve.engine.parallel.worker import work

        ranks = self._ranks = Ranks(work, config, source.load, torch.get_num_threads())
        device = rank_device(config, 0)
        try:
            with ranks.failing_together():
                decoder = compute_on(device, lambda: source.load(device=str(device), group=ranks.group))
                config = with_pool(config, decoder)
                runner = make_runner(decoder, config, self.tokenizer, ranks)
            ranks.wait_until_ready()
        except BaseException:
            ranks.close()
            raise
        return config, runner

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None if none does. Further `eos_token_ids` end it as stop tokens."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def device_name(self) -> str:
        """What executes the steps, in words."""
        size, name = self.options.tensor_parallel_size, device_name(self.runner.device)
        return name if size == 1 else f"{size} x {name}"

    def facts(self) -> dict[str, Any]:
        """What a replay of a run has to know beside its settings, and what made its tokens, as plain values.

        Every option of the engine is among them, as it is in use: what "auto" came to, a Decoder's own dtype.
        """
        return (
            self.options.model_dump()
            | {
                "shape": asdict(self.config),
                "dtype": str(self.runner.model.dtype).removeprefix("torch."),
                "quantization": self.runner.model.quantization,
                "kv_cache_dtype": str(self.kv_cache_dtype).removeprefix("torch."),
                "attention": self.attention.name,
                "attention_reason": self.attention.reason,
                "execution": "graphs" if self.attention.graphs else "eager",
                "eos_token_id": self.eos_token_id,
                "tokens": asdict(self.token_maker),
            }
            | ({"kernels": kernels} if (kernels := self.runner.kernel_facts()) else {})
        )

    def close(self) -> None:
        """Wait for what is being served, and end."""
        with self._guard:
            self._end_live()
        self.runner.close()
        if self._ranks is not None:
            self._ranks.close()

    def warm_up(self) -> None:
        """Capture the graphs, and serve a few requests that nobody asked for: a full step, and decodes of up to 32.

        On CUDA a kernel is loaded when it is first used, which takes a hundred times as long as to run it.
        """
        self.capture()
        settings, token = self.settings, self.token_maker.first_id
        longest = min(settings.max_num_batched_tokens, (settings.max_model_len or 2) - 1)
        counts = range(1, min(settings.max_num_seqs, 32) + 1)
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (1, *counts)]
        self.generate([[token] * longest, *([token] for _ in counts)], params)

    def capture(self) -> None:
        """Capture the graphs of the steps, if they are graphs and that was not done; serving does so by itself."""
        self.runner.capture()

    def fill_cache(self, seed: int) -> None:
        """Fill the KV pool with noise where steps are graphs: on a CPU it makes no difference what is read."""
        self.runner.fill_cache(seed)

    def generate(
        self, prompts: Seq[str | list[int]], sampling_params: SamplingParams | Seq[SamplingParams]
    ) -> list[Completion]:
        """Complete prompts, all of them at once.

        Args:
            prompts: texts, or token ids.
            sampling_params: for all, or one for each.

        Returns:
            A completion for each prompt, in their order; a prompt that can never be served has one that is "refused".

        Raises:
            InputError: a text without a tokenizer, token ids that the model has not, or another number of parameters.
            StepError: a step failed.
        """
        params = [sampling_params] * len(prompts) if isinstance(sampling_params, SamplingParams) else sampling_params
        if len(params) != len(prompts):
            problem = f"expected one, or one for each of {len(prompts)} prompts"
            raise InputError(problem, field="the number of sampling_params", value=len(params))
        tokens = [
            encode_prompt(prompt, self.tokenizer, self.config.vocab_size, index) for index, prompt in enumerate(prompts)
        ]
        sequences = [Sequence(token_ids, self._with_stops(own)) for token_ids, own in zip(tokens, params, strict=True)]
        try:
            with self._guard:
                wait = self._live_core().begin(sequences)
            wait()
            return [self._completion(seq) for seq in sequences]
        finally:
            for seq in sequences:
                self.runner.logprobs.pop(seq, None)

    def stream(
        self, prompt: str | list[int], sampling_params: SamplingParams
    ) -> Generator[list[int], None, Completion]:
        """Complete a prompt, and give its tokens as they come; what it returns at the end is the completion.

        Closing it aborts the request.

        Raises:
            InputError: a text without a tokenizer, or token ids that the model has not.
            StepError: a step failed.
        """
        token_ids = encode_prompt(prompt, self.tokenizer, self.config.vocab_size, 0)
        seq = Sequence(token_ids, self._with_stops(sampling_params))
        news: SimpleQueue[tuple[list[int], bool]] = SimpleQueue()
        num_told = seq.num_prompt_tokens

        def told(_: list[Sequence]) -> None:
            nonlocal num_told
            fresh = seq.token_ids[num_told : seq.num_tokens - _has_failed(seq)]
            num_told += len(fresh)
            news.put((fresh, seq.is_finished or live.error is not None))

        try:
            with self._guard:
                live = self._live_core()
                wait = live.begin([seq], told)
            is_over = False
            try:
                while not is_over:
                    fresh, is_over = news.get()
                    if fresh:
                        yield fresh
            except BaseException:
                live.abort([seq])
                raise
            wait()
            return self._completion(seq)
        finally:
            self.runner.logprobs.pop(seq, None)

    def live(self, listeners: Seq[CoreListener] = ()) -> AsyncLLM:
        """A fresh Core that serves until it is closed, heard by `listeners`.

        What was served before has ended then. Until it is closed, nothing else may be served.
        """
        with self._guard:
            self._end_live()
            self.capture()
            live = AsyncLLM(self._core, self.runner, listeners)
        self._end_with_ranks(live.inbox)
        live.start()
        return live

    def run_trace(
        self,
        requests: Iterable[Request],
        *,
        params: SamplingParams,
        recorder: RunRecorder | None = None,
        time_scale: float = 1.0,
        progress: Callable[[Sequence], None] | None = None,
        on_start: Callable[[Inbox, Clock], None] | None = None,
    ) -> list[Sequence]:
        """Serve the requests of a trace as they arrive, in real time.

        Args:
            params: sampling; each request brings its own `max_tokens`.
            recorder: hears the run's facts and decisions.
            time_scale: arrivals come so many times later than in the trace.
            progress: called with each sequence that ends; its log-probabilities are in `runner.logprobs` until then.
            on_start: called just before the first request can come in, with the inbox, which takes aborts from any
                thread, and the run's clock.

        Returns:
            The sequences in the order in which they ended.

        Raises:
            AssertionError: an invariant of the policies does not hold at the end.
            StepError: a step failed.
        """

        def starting(inbox: Inbox, clock: Clock) -> None:
            self._end_with_ranks(inbox)
            if on_start is not None:
                on_start(inbox, clock)

        with self._guard:
            self._end_live()
            self.capture()
            return serve_trace(
                self._core(recorder),
                self.runner,
                requests,
                token_maker=self.token_maker,
                params=self._with_stops(params),
                recorder=recorder,
                time_scale=time_scale,
                progress=progress,
                on_start=starting,
            )

    def _end_with_ranks(self, inbox: Inbox) -> None:
        """Have who waits for requests hear of it when a rank ends; a RankError if one has."""
        if self._ranks is not None:
            self._ranks.check()
            self._ranks.tells(inbox)

    def _live_core(self) -> AsyncLLM:
        """The Core of `generate`; a fresh one where there is none whose KV is as it left it."""
        live, num_launched = self._live, self.runner.num_launched
        if live is None or live.error is not None or (live.core.is_idle and live.num_launched != num_launched):
            self._end_live()
            self.capture()
            self.runner.num_launched = 0
            live = self._live = AsyncLLM(self._core, self.runner)
            self._end_with_ranks(live.inbox)
            live.start()
            self._forgotten = weakref.finalize(self, live.no_more)
        return live

    def _end_live(self) -> None:
        """Wait for what `generate` serves, and drop its Core."""
        live, self._live = self._live, None
        if live is not None and self._forgotten is not None:
            self._forgotten.detach()  # it would keep the runner, and so the pool, for as long as this object is there
            live.close()

    def _core(self, listener: CoreListener | None) -> Core:
        """Fresh policies."""
        return self.settings.build_core(eos_token_id=self.eos_token_id, listener=listener)

    def _with_stops(self, params: SamplingParams) -> SamplingParams:
        return with_stops(params, self.eos_token_ids, self.config.vocab_size)

    def _completion(self, seq: Sequence) -> Completion:
        failed = _has_failed(seq)
        token_ids = seq.completion_token_ids[:-1] if failed else seq.completion_token_ids
        heard = self.runner.logprobs.get(seq, {})
        asked = seq.sampling_params.logprobs is not None
        return Completion(
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True) if self.tokenizer is not None else "",
            token_ids=token_ids,
            finish_reason="abort" if failed else str(seq.finish_reason),
            num_prompt_tokens=seq.num_prompt_tokens,
            num_cached_tokens=seq.num_cached_tokens,
            refusal=seq.refusal,
            logprobs=[heard[seq.num_prompt_tokens + place] for place in range(len(token_ids))] if asked else None,
        )


def _has_failed(seq: Sequence) -> bool:
    """Could a sequence not be finished? Then its last token is none."""
    return seq.refusal is not None and seq.finish_reason != "refused"


def _make_runner(
    decoder: Decoder, config: RunnerConfig, tokenizer: Any, drafting: Decoder | None
) -> ModelRunner | GraphRunner:
    """What runs the steps of `decoder`, for which `drafting` drafts, if any model does."""
    if config.attention.graphs and config.settings.speculative_config is not None:
        from twinserve.engine.graphs.speculative_runner import GraphSpeculativeRunner

        return GraphSpeculativeRunner(decoder, tokenizer, config, proposer_maker(config, drafting))
    if config.attention.graphs:
        from twinserve.engine.graphs.graph_runner import GraphRunner

        return GraphRunner(decoder, config)
    named: dict[str, Any] = {
        "num_blocks": config.num_blocks,
        "block_size": config.settings.block_size,
        "attention": cast(Literal["flash", "sdpa"], config.attention.name),
        "seed": config.options.seed,
    }
    if config.settings.speculative_config is None:
        return ModelRunner(decoder, tokenizer, decoder.device, **named)
    return SpeculativeRunner(
        decoder,
        tokenizer,
        decoder.device,
        make_proposer=proposer_maker(config, drafting),
        max_model_len=config.max_model_len,
        is_async=config.settings.pipeline_depth > 0,
        acceptance_rate=config.settings.speculative_config.synthetic_acceptance_rate,
        **named,
    )
