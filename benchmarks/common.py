"""What the seven benchmarks share: the model that is measured, the work that all seven do, timing, JSON, command line.

Each benchmark serves the same requests, the *yardstick*, with what its cycle adds, so that one cycle's time can be held
against another's; beside it, it measures what its section of the learning guide lists.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from twinserve.engine.device_queue import device_name
from twinserve.engine.kv_cache import bytes_per_block
from twinserve.engine.llm import LLM
from twinserve.engine.models import ModelConfig
from twinserve.engine.models.dummy import SHAPES, shape_names
from twinserve.engine.models.loader import DTYPES
from twinserve.engine.quantization import measure_memory
from twinserve.policies import Core, SamplingParams, Sequence
from twinserve.traces.errors import InputError
from twinserve.traces.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT_MODEL, DEFAULT_SHAPE = "smollm2-135m", "smollm2-135m-shape"
GREEDY = 0.0
WHAT_IS_MEASURED_IN_MEMORY = "weights and KV at its fullest, counted; 1 MB is 10**6 bytes"


class Job(NamedTuple):
    """A request: its prompt, and how many tokens are generated, whatever they are."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Sizes:
    """How much is computed, in tokens. A GPU gets more, so that a step is more than being launched.

    Attributes:
        requests, shared, own, output: the yardstick's: so many requests, whose prompts begin alike and then differ.
        prompts, outputs: least and most, of the requests whose throughput is measured.
        long_prompt, decoded: of the KV cache's speed-up.
        system_prompt, user_message: of the time to the first token.
        attention_requests, attention_prompts, attention_output: of the comparison of attention backends.
        max_num_batched_tokens: of a step.
    """

    requests: int
    shared: int
    own: int
    output: int
    prompts: tuple[int, int]
    outputs: tuple[int, int]
    long_prompt: int
    decoded: int
    system_prompt: int
    user_message: int
    attention_requests: int
    attention_prompts: tuple[int, int]
    attention_output: int
    max_num_batched_tokens: int = 2048


SIZES = {
    "cpu": Sizes(
        requests=8,
        shared=96,
        own=16,
        output=16,
        prompts=(4, 24),
        outputs=(2, 8),
        long_prompt=256,
        decoded=32,
        system_prompt=256,
        user_message=16,
        attention_requests=8,
        attention_prompts=(64, 512),
        attention_output=8,
    ),
    "cuda": Sizes(
        requests=16,
        shared=512,
        own=64,
        output=32,
        prompts=(64, 512),
        outputs=(4, 24),
        long_prompt=4096,
        decoded=32,
        system_prompt=4096,
        user_message=64,
        attention_requests=64,
        attention_prompts=(512, 2048),
        attention_output=32,
        max_num_batched_tokens=8192,
    ),
}


@dataclass(frozen=True)
class Subject:
    """A model to measure; every call loads it anew.

    Attributes:
        name: what it is called in results.
        source: a folder, or a shape that ships.
        is_random: its weights are random, and it has no tokenizer.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
    """

    name: str
    source: str
    is_random: bool
    device: str
    dtype: str
    sizes: Sizes

    @classmethod
    def of(
        cls,
        name: str = DEFAULT_MODEL,
        *,
        load_format: str = "auto",
        device: str = "cpu",
        dtype: str | None = None,
    ) -> Subject:
        """A model by name.

        Args:
            name: as `twinserve --model`; with `load_format="dummy"` a shape that ships, or a folder with config.json.
            dtype: None is float32 on a CPU, where it is fastest, and bfloat16 on CUDA.

        Raises:
            InputError: there is no such model, or no such device.
        """
        if device not in SIZES:
            raise InputError(f"expected one of {', '.join(SIZES)}", field="device", value=device)
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("expected cpu: torch finds no CUDA device", field="device", value=device)
        is_random, source = load_format == "dummy", name
        if not is_random:
            from twinserve.engine.hub import resolve_model

            source = str(resolve_model(name, progress=say))
        dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
        return cls(Path(name).name, source, is_random, device, dtype, SIZES[device])

    @property
    def folder(self) -> Path:
        """The Hugging Face folder; without weights where these are random."""
        return SHAPES / self.source if self.is_random and self.source in shape_names() else Path(self.source)

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.load(self.folder)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return bytes_per_block(self.config, 1, DTYPES[self.dtype])

    def transformers_model(self) -> nn.Module:
        """The model as transformers makes it, for generation without the engine; no token ends a text."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        dtype = DTYPES[self.dtype]
        if self.is_random:
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder), dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype).to(self.device)
        model.generation_config.eos_token_id = None
        return model.eval().requires_grad_(False)

    def tokenizer(self) -> Any:
        """The model's tokenizer, or one that stands in for it; no token ends a text."""
        if not any(self.folder.glob("tokenizer*")):
            return NumberTokenizer(self.config.vocab_size)
        from transformers import AutoTokenizer

        return EndlessTokenizer(AutoTokenizer.from_pretrained(self.folder))

    @contextmanager
    def engine(self, jobs: Seq[Job], *, attention: str = "sdpa", **options: Any) -> Iterator[LLM]:
        """The paged engine for a while, with a pool of KV blocks that `jobs` fill when all of them run at once.

        Args:
            options: of the policies (`Settings`), and `dtype` and `quantization` of the model.
        """
        model_options = {name: options.pop(name) for name in ("dtype", "quantization") if name in options}
        block_size = 256 if attention == "flash" else 16
        blocks = sum(-(-(len(job.prompt) + job.max_tokens) // block_size) for job in jobs)
        settings = Settings(
            block_size=block_size,
            num_gpu_blocks=blocks,
            max_num_batched_tokens=self.sizes.max_num_batched_tokens,
            **options,
        )
        llm = LLM(
            self.source,
            name=self.name,
            device=self.device,
            load_format="dummy" if self.is_random else "auto",
            settings=settings,
            attention=attention,  # type: ignore[arg-type]
            execution="eager",  # the cycles build the paged engine up to here; what graphs add is measured by itself
            **{"dtype": self.dtype, **model_options},
        )
        try:
            yield llm
        finally:
            llm.close()


class NumberTokenizer:
    """Texts of numbers, for models without a tokenizer: "7" is token 7, any other word a token by its checksum."""

    eos_token_id = None

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        numbers = (int(word) if word.isdecimal() else zlib.crc32(word.encode()) for word in text.split())
        return [number % self._vocab_size for number in numbers]

    def decode(self, token_ids: Iterable[int]) -> str:
        return " ".join(map(str, token_ids))


class EndlessTokenizer:
    """A tokenizer none of whose tokens ends a text, so that as many are generated as were asked for."""

    eos_token_id = None

    def __init__(self, tokenizer: Any):
        self.encode, self.decode = tokenizer.encode, tokenizer.decode


# --- work ---


def random_jobs(subject: Subject, count: int, prompts: tuple[int, int], outputs: tuple[int, int]) -> list[Job]:
    """Requests of random tokens with lengths drawn evenly from `prompts` and `outputs`, both ends included."""
    draws = random.Random(0)
    return [
        Job(prompt, draws.randint(*outputs))
        for prompt in random_prompts(subject, [draws.randint(*prompts) for _ in range(count)])
    ]


def random_prompts(subject: Subject, lengths: Iterable[int], *, shared: int = 0) -> list[list[int]]:
    """Prompts of random tokens with these lengths, all beginning with the same `shared` tokens more."""
    draws, vocab_size = random.Random(1), subject.config.vocab_size

    def tokens(count: int) -> list[int]:
        return [draws.randrange(vocab_size) for _ in range(count)]

    begin = tokens(shared)
    return [begin + tokens(length) for length in lengths]


def yardstick(subject: Subject) -> list[Job]:
    """The requests that every cycle serves."""
    sizes = subject.sizes
    prompts = random_prompts(subject, [sizes.own] * sizes.requests, shared=sizes.shared)
    return [Job(prompt, sizes.output) for prompt in prompts]


def yardstick_in_words(sizes: Sizes) -> str:
    """What the yardstick is."""
    return (
        f"{sizes.requests} requests of {sizes.shared + sizes.own} prompt tokens, the first {sizes.shared} of them "
        f"the same, and {sizes.output} output tokens each"
    )


def generate_each(
    generate: Callable[..., str], model: nn.Module, jobs: Seq[Job], tokenizer: NumberTokenizer | None = None
) -> None:
    """Complete requests one after another by one of the functions of `twinserve.engine.inference`."""
    tokenizer = tokenizer or NumberTokenizer(model.config.vocab_size)
    for job in jobs:
        generate(model, tokenizer, tokenizer.decode(job.prompt), job.max_tokens, temperature=GREEDY)


def serve(llm: LLM, jobs: Seq[Job], core: Core | None = None) -> int:
    """Serve requests that are there at once; the most KV blocks in use at a time.

    Args:
        core: the policies; None is fresh ones by the LLM's settings.
    """
    core = core or llm.settings.build_core()
    for job in jobs:
        params = SamplingParams(temperature=GREEDY, max_tokens=job.max_tokens, ignore_eos=True)
        if not core.ingest(Sequence(job.prompt, params), time.perf_counter_ns()):
            raise RuntimeError(f"a request of {len(job.prompt)} tokens was refused")
    most = 0
    while not core.is_idle:
        batch = core.decide(time.perf_counter_ns())
        most = max(most, batch.num_used_blocks)
        core.commit(llm.runner.execute(batch), time.perf_counter_ns())
    return most


# --- time ---


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that `work` takes, until the device has done its part."""
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


def repeat(work: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds of each of `repeats` times `work`."""
    return [timed(work, device) for _ in range(repeats)]


def synchronize(device: str) -> None:
    """Wait for all that was launched on a CUDA device."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(repeats_s: Seq[float]) -> dict[str, Any]:
    """Repeated seconds, their mean and their median."""
    return {
        "repeats_s": list(repeats_s),
        "mean_s": statistics.fmean(repeats_s),
        "median_s": statistics.median(repeats_s),
    }


def case(name: str, repeats_s: Seq[float], tokens: int | None = None) -> dict[str, Any]:
    """A measurement beside the yardstick; its throughput counts `tokens` for each repeat, None being none."""
    seconds = spread(repeats_s)
    return {"name": name, **seconds} | (
        {} if tokens is None else {"tokens": tokens, "tokens_per_s": tokens / seconds["median_s"]}
    )


# --- results ---


def figure(name: str, value: float | str, unit: str = "") -> dict[str, Any]:
    """A figure to be shown."""
    return {"name": name, "value": value, "unit": unit}


def expectation(text: str, seen: str, met: bool | None) -> dict[str, Any]:
    """What the guide expects, what was seen instead, and whether that meets it; None where it cannot be said."""
    return {"text": text, "seen": seen, "met": met}


def row(subject: Subject, repeats_s: Seq[float], memory_mb: float) -> dict[str, Any]:
    """A cycle's row of the table: the yardstick's seconds, its throughput and the memory it takes."""
    tokens = subject.sizes.requests * subject.sizes.output
    seconds = spread(repeats_s)
    throughput = tokens / seconds["median_s"]
    return {**seconds, "output_tokens": tokens, "tokens_per_s": throughput, "memory_mb": memory_mb}


def engine_row(subject: Subject, repeats: int, **options: Any) -> dict[str, Any]:
    """The row of the paged engine; everything is served once before it is measured.

    Args:
        options: as `Subject.engine`.
    """
    jobs = yardstick(subject)
    with subject.engine(jobs, **options) as llm:
        most_blocks = serve(llm, jobs)
        seconds = repeat(lambda: serve(llm, jobs), repeats, subject.device)
        model = llm.runner.model
        kv_bytes = most_blocks * bytes_per_block(model.config, llm.settings.block_size, model.dtype)
        return row(subject, seconds, measure_memory(model) + kv_bytes / 1e6)


ENGINE_TIMING = (
    "from token ids to token ids: every decision, every step of the model and the choice of each token; not loading "
    "the model, nor text to tokens and back; after one pass that is not measured"
)


def result(
    subject: Subject,
    cycle: int,
    benchmark: str,
    what: str,
    *,
    row: dict[str, Any],
    timing: str,
    figures: Seq[dict[str, Any]],
    expectations: Seq[dict[str, Any]],
    cases: Seq[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What a benchmark returns.

    Args:
        row: of the table, by `row`.
        timing: what the row's seconds and those of `cases` include.
        cases, figures: what the guide's section lists: times, and what is no time or follows from them.
    """
    return {
        "cycle": cycle,
        "benchmark": benchmark,
        "what": what,
        **environment(subject),
        "yardstick": yardstick_in_words(subject.sizes),
        "timing": timing,
        **row,
        "memory_is": WHAT_IS_MEASURED_IN_MEMORY,
        "figures": list(figures),
        "expectations": list(expectations),
        "cases": list(cases),
    }


def environment(subject: Subject) -> dict[str, Any]:
    """Where and on what it was measured."""
    on_cuda = subject.device == "cuda"
    facts: dict[str, Any] = {
        "device": device_folder(subject.device),
        "model": subject.name,
        "weights": "random" if subject.is_random else "as published",
        "dtype": subject.dtype,
        "machine": device_name(subject.device),
    }
    if on_cuda:
        facts["card"] = torch.cuda.get_device_name()
    return facts | {"versions": versions(), "commit": commit()}


def device_folder(device: str) -> str:
    """The folder of a device's results: "cpu", or a card's name, as "h100"."""
    if device == "cpu":
        return device
    name = torch.cuda.get_device_name()
    short = re.search(r"\b[A-Z]+\d+[A-Z]*\b", name)
    return (short.group() if short else re.sub(r"\W+", "-", name)).lower()


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "flash-attn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is measured, with a plus sign where the checkout has changes beside results; else "unknown"."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    written = [":!benchmarks/results", ":!benchmarks/results.md", ":!docs/cycles"]
    is_changed = git("diff", "--quiet", "HEAD", "--", ".", *written).returncode != 0
    return head.stdout.strip() + "+" * is_changed


def write(values: dict[str, Any], folder: Path) -> Path:
    """Write a benchmark's JSON; its path below `folder`."""
    path = folder / values["device"] / f"cycle{values['cycle']}-{values['model']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


# --- the command line ---


def say(line: str) -> None:
    """Tell the user how it goes."""
    print(line, file=sys.stderr, flush=True)


def parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parsing = argparse.ArgumentParser(description=description)
    parsing.add_argument("--device", choices=sorted(SIZES), default="cpu")
    parsing.add_argument("--model", action="append", default=[], help="as twinserve --model; may be repeated")
    parsing.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="of --model")
    parsing.add_argument("--shape", action="append", default=[], help="--model with --load-format dummy; repeatable")
    parsing.add_argument("--dtype", choices=sorted(DTYPES), help="float32 on a CPU and bfloat16 on CUDA, unless given")
    parsing.add_argument("--repeats", type=int, default=3)
    parsing.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parsing.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    return parsing


def subjects(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Name and load format of each model that the command line asks for."""
    named = [(name, arguments.load_format) for name in arguments.model]
    named += [(name, "dummy") for name in arguments.shape]
    default = DEFAULT_SHAPE if arguments.load_format == "dummy" else DEFAULT_MODEL
    return named or [(default, arguments.load_format)]


def options_for(name: str, load_format: str, arguments: argparse.Namespace) -> list[str]:
    """The options that measure one of `subjects` alone, as the command line says; without where results go."""
    options = ["--device", arguments.device, "--shape" if load_format == "dummy" else "--model", name]
    if arguments.dtype:
        options += ["--dtype", arguments.dtype]
    return [*options, "--repeats", str(arguments.repeats)]


def main(benchmark: Callable[..., dict[str, Any]]) -> int:
    """Run a benchmark as the command line says, and write its JSON."""
    arguments = parser((benchmark.__doc__ or "").splitlines()[0]).parse_args()
    script = Path(sys.argv[0]).name
    for name, load_format in subjects(arguments):
        try:
            subject = Subject.of(name, load_format=load_format, device=arguments.device, dtype=arguments.dtype)
            measured = benchmark(subject, repeats=arguments.repeats)
        except InputError as error:
            say(f"{script}: {error}")
            return 2
        command = ["python", f"benchmarks/{script}", *options_for(name, load_format, arguments)]
        measured["command"] = shlex.join(command)
        measured["commit"] = arguments.commit or measured["commit"]
        print(write(measured, arguments.out))
    return 0
