"""LLM: a model, its settings and its KV pool; generates from prompts and replays traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from twinserve.engine.device_queue import compute_on, device_name, usable_device
from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.kv_cache import default_num_blocks
from twinserve.engine.layers.choice import choose_attention
from twinserve.engine.logprobs import TokenLogprobs
from twinserve.engine.model_runner import ModelRunner
from twinserve.engine.models import Decoder, ModelConfig, adopt_model, load_model
from twinserve.engine.models.dummy import dummy_model, shape_folder
from twinserve.engine.models.int8 import quantize_decoder
from twinserve.engine.models.loader import DTYPES, config_of
from twinserve.engine.online import Clock, Inbox, TraceFeeder, serve
from twinserve.engine.options import EngineOptions
from twinserve.policies import CoreListener, SamplingParams, Sequence
from twinserve.traces.arrivals import Arrivals
from twinserve.traces.errors import InputError
from twinserve.traces.record import RunRecorder
from twinserve.traces.request import Request, TokenMaker
from twinserve.traces.settings import Settings

if TYPE_CHECKING:
    from twinserve.engine.graphs.graph_runner import GraphRunner


@dataclass(frozen=True)
class Completion:
    """What came of a prompt.

    Attributes:
        text: the generated tokens decoded, without special tokens; empty without a tokenizer.
        token_ids: the generated tokens, an end-of-sequence token included.
        finish_reason: "stop", "length" or "refused".
        num_prompt_tokens: tokens of the prompt.
        num_cached_tokens: those of them whose KV was found in the prefix cache.
        refusal: why a refused prompt can never be served.
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

    Each run (`generate`, `run_trace`) has fresh policies, and so an empty pool and prefix cache: what it decides does
    not depend on the runs before it, and nothing is hit whose KV another run, or another Core on the same runner, has
    overwritten. A step that fails, for want of the device's memory say, ends its run with a StepError, which names the
    step and its batch: what the requests of the run had is dropped with its policies, every block is free again, and
    the next run is served.

    Args:
        model: a Hugging Face folder, a Decoder, or a transformers model (whose weights are copied); with
            `load_format="dummy"`, a folder with config.json or a shape that ships.
        tokenizer: for a model given as a module; a folder's is found in it.
        name: what to call the model; None is the folder's name, or the module's class.
        settings: of the policies; None is vLLM's defaults. What they leave open is decided here: `max_model_len` is the
            model's, `num_gpu_blocks` what fits 1 GiB (CPU) or all that is left (CUDA), and
            `block_size`, where it was not given, the attention backend's own: 256 with flash, else 16.
        graph_options: what is switched off in steps that are graphs; None is nothing.
        threads: CPU threads of torch, in the whole process; None leaves them.
        token_maker: makes the prompts of traces; None takes the longest run of ids that do not end a text.
        options: the fields of `EngineOptions`, such as `device="cuda"`; None is as not given. A Decoder keeps its own
            dtype, and its own quantization, which may be given if it is the same.

    Attributes:
        options: as they were given, or by default.
        config: the model's shape.
        settings: as in use, nothing left open.
        attention: the attention backend in use, and why.
        eos_token_ids: the tokens that end a text, the tokenizer's own first.

    Raises:
        InputError: an option, the model, the settings, the graph options or the token maker cannot be
            used. All that can be known without
            the weights is refused before they are loaded.
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
        **options: Any,
    ):
        self.name = name or (type(model).__name__ if isinstance(model, nn.Module) else Path(model).name)
        self.options = EngineOptions.load({"model": self.name, **options})
        device = usable_device(self.options.device)
        if threads is not None:
            torch.set_num_threads(threads)
        self.config, dtype, load = _source(model, self.options)
        self.tokenizer = tokenizer if isinstance(model, nn.Module) else load_tokenizer(Path(model))
        own = getattr(self.tokenizer, "eos_token_id", None)
        ids = (own, *self.config.eos_token_ids)
        self.eos_token_ids = tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))
        self.token_maker = self._checked(token_maker or self._default_token_maker())
        settings = settings or Settings()
        asked = settings.block_size if "block_size" in settings.model_fields_set else None
        self.attention = choose_attention(
            self.options.attention, self.config.head_dim, dtype, device, asked, self.options.execution
        )
        if graph_options is not None and not self.attention.graphs:
            raise InputError("expected None where steps are no graphs", field="graph_options", value=graph_options)
        self._graph_options = graph_options
        if self.options.kv_cache_dtype == "fp8" and self.attention.name != "triton":
            raise InputError(f"expected auto with {self.attention.name}", field="kv_cache_dtype", value="fp8")
        self.kv_cache_dtype = torch.float8_e4m3fn if self.options.kv_cache_dtype == "fp8" else dtype
        settings = self._within_model(settings)
        decoder = compute_on(device, load)
        self.settings = self._with_pool(settings, decoder)
        self.runner = self._make_runner(decoder, self.settings)

    def _within_model(self, settings: Settings) -> Settings:
        """`settings` with what the model and the attention decide; the pool is still open."""
        limit = self.config.max_position_embeddings
        max_model_len = settings.max_model_len or limit
        if max_model_len > limit:
            problem = f"expected at most {limit}, the model's max_position_embeddings"
            raise InputError(problem, field="max_model_len", value=max_model_len)
        decided = {"max_model_len": max_model_len, "block_size": self.attention.block_size}
        return Settings.load(settings.model_dump() | decided)

    def _with_pool(self, settings: Settings, decoder: Decoder) -> Settings:
        """`settings` with a pool that fits beside the weights, unless one is given."""
        if settings.num_gpu_blocks is not None:
            return settings
        step_bytes = None
        if self.attention.graphs:
            smallest = settings.model_copy(update={"num_gpu_blocks": 1})
            step_bytes = cast("GraphRunner", self._make_runner(decoder, smallest)).step_bytes()
        num_blocks = default_num_blocks(
            self.config, settings.block_size, self.kv_cache_dtype, decoder.device, self.options.gpu_memory_utilization,
            step_bytes,
        )  # fmt: skip
        return settings.model_copy(update={"num_gpu_blocks": num_blocks})

    def _make_runner(self, decoder: Decoder, settings: Settings) -> ModelRunner | GraphRunner:
        """What runs the steps."""
        assert settings.num_gpu_blocks is not None and settings.max_model_len is not None
        if self.attention.graphs:
            from twinserve.engine.graphs.graph_runner import GraphRunner

            return GraphRunner(
                decoder,
                num_blocks=settings.num_gpu_blocks,
                block_size=settings.block_size,
                attention=cast(Literal["flash", "triton"], self.attention.name),
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_model_len=settings.max_model_len,
                kv_cache_dtype=self.kv_cache_dtype,
                seed=self.options.seed,
                options=self._graph_options,
            )
        return ModelRunner(
            decoder,
            self.tokenizer,
            decoder.device,
            num_blocks=settings.num_gpu_blocks,
            block_size=settings.block_size,
            attention=cast(Literal["flash", "sdpa"], self.attention.name),
            seed=self.options.seed,
        )

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None if none does. Further `eos_token_ids` end it as stop tokens."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def device_name(self) -> str:
        """What executes the steps, in words."""
        return device_name(self.runner.device)

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
            | ({} if isinstance(self.runner, ModelRunner) else {"kernels": self.runner.kernel_facts()})
        )

    def close(self) -> None:
        """End the runner's thread."""
        self.runner.close()

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
        if not isinstance(self.runner, ModelRunner):
            self.runner.capture()

    def fill_cache(self, seed: int) -> None:
        """Fill the KV pool with noise where steps are graphs: on a CPU it makes no difference what is read."""
        if not isinstance(self.runner, ModelRunner):
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
        sequences = [
            Sequence(self._encode(prompt, index), self._with_stops(params[index]), seq_id=index)
            for index, prompt in enumerate(prompts)
        ]
        inbox = Inbox()
        for seq in sequences:
            inbox.put(seq)
        inbox.close()
        try:
            self._serve(None, inbox, Clock(), lambda seq: None)
            return [self._completion(seq) for seq in sequences]
        finally:
            self.runner.logprobs.clear()

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
        params = self._with_stops(params)
        scaled = [replace(request, arrival_ns=round(request.arrival_ns * time_scale)) for request in requests]
        arrivals, inbox, clock = Arrivals(scaled), Inbox(), Clock()

        def announce(request: Request) -> None:
            if recorder is not None:
                recorder.expect(request, params)

        feeder = TraceFeeder(arrivals, inbox, clock, self.token_maker, params, announce)
        served: list[Sequence] = []

        def ended(seq: Sequence) -> None:
            served.append(seq)
            feeder.ended(seq)
            if progress is not None:
                progress(seq)
            self.runner.logprobs.pop(seq, None)

        if on_start is not None:
            on_start(inbox, clock)
        feeder.start()
        try:
            self._serve(recorder, inbox, clock, ended)
        finally:
            feeder.stop()
            feeder.join()
            self.runner.logprobs.clear()
        feeder.check()
        return served

    def _serve(
        self, listener: CoreListener | None, inbox: Inbox, clock: Clock, ended: Callable[[Sequence], None]
    ) -> None:
        """Serve what comes in by fresh policies."""
        self.capture()
        core = self.settings.build_core(eos_token_id=self.eos_token_id, listener=listener)
        serve(core, self.runner, inbox, clock, ended)
        core.scheduler.check_integrity()

    def _with_stops(self, params: SamplingParams) -> SamplingParams:
        """`params` that also end at what ends the model's texts beside `eos_token_id`."""
        return replace(params, stop_token_ids=tuple(dict.fromkeys((*params.stop_token_ids, *self.eos_token_ids[1:]))))

    def _encode(self, prompt: str | list[int], index: int) -> list[int]:
        """Token ids of a prompt."""
        if not isinstance(prompt, str):
            vocab_size = self.config.vocab_size
            for token_id in prompt:
                if not 0 <= token_id < vocab_size:
                    problem = f"expected an id from 0 to {vocab_size - 1}"
                    raise InputError(problem, field=f"a token of prompts[{index}]", value=token_id)
            return prompt
        if self.tokenizer is None:
            problem = "expected token ids, as the model has no tokenizer"
            raise InputError(problem, field=f"prompts[{index}]", value=prompt)
        return self.tokenizer.encode(prompt)

    def _completion(self, seq: Sequence) -> Completion:
        token_ids = seq.completion_token_ids
        heard = self.runner.logprobs.get(seq, {})
        asked = seq.sampling_params.logprobs is not None
        return Completion(
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True) if self.tokenizer is not None else "",
            token_ids=token_ids,
            finish_reason=str(seq.finish_reason),
            num_prompt_tokens=seq.num_prompt_tokens,
            num_cached_tokens=seq.num_cached_tokens,
            refusal=seq.refusal,
            logprobs=[heard[place] for place in range(seq.num_prompt_tokens, seq.num_tokens)] if asked else None,
        )

    def _default_token_maker(self) -> TokenMaker:
        """Makes tokens from the longest run of ids that do not end a text."""
        bounds = [-1, *sorted(self.eos_token_ids), self.config.vocab_size]
        _, first, end = max((end - start - 1, start + 1, end) for start, end in pairwise(bounds))
        return TokenMaker(end, first)

    def _checked(self, maker: TokenMaker) -> TokenMaker:
        """`maker`, none of whose tokens is beyond the vocabulary or ends a text."""
        vocab_size = self.config.vocab_size
        if not 0 <= maker.first_id < maker.vocab_size <= vocab_size:
            raise InputError(f"expected 0 <= first_id < vocab_size <= {vocab_size}", field="token_maker", value=maker)
        inside = [token_id for token_id in self.eos_token_ids if maker.first_id <= token_id < maker.vocab_size]
        if inside:
            raise InputError(f"expected ids without {inside[0]}, which ends a text", field="token_maker", value=maker)
        return maker


def _source(
    model: str | Path | nn.Module, options: EngineOptions
) -> tuple[ModelConfig, torch.dtype, Callable[[], Decoder]]:
    """A model's shape, the dtype that it will have, and what loads it."""
    device, dtype = options.device, DTYPES[options.dtype]
    if isinstance(model, nn.Module) and options.load_format == "dummy":
        raise InputError("expected auto: the model has its weights", field="load_format", value="dummy")
    if isinstance(model, Decoder):
        if "quantization" in options.model_fields_set and options.quantization != model.quantization:
            problem = f"expected {model.quantization}, as the Decoder is; quantize_decoder makes it int8"
            raise InputError(problem, field="quantization", value=options.quantization)
        return model.config, model.dtype, lambda: model.to(device)
    how: dict[str, Any] = {"dtype": dtype, "device": device}
    if options.load_format == "dummy":
        folder = shape_folder(cast("str | Path", model))

        def random_weights() -> Decoder:
            decoder = dummy_model(folder, seed=options.seed, **how)
            return quantize_decoder(decoder) if options.quantization == "int8" else decoder

        return ModelConfig.load(folder), dtype, random_weights
    how["quantization"] = options.quantization
    if isinstance(model, nn.Module):
        return config_of(model), dtype, lambda: adopt_model(model, **how)
    return ModelConfig.load(Path(model)), dtype, lambda: load_model(Path(model), **how)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None if it has none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
