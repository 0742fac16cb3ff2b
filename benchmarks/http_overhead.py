"""What HTTP costs: the same requests streamed over HTTP and handed to the engine as `twinserve run` does, in turns.

    python benchmarks/http_overhead.py --device cuda --dtype bfloat16 --model qwen3-0.6b --load-format dummy
    python benchmarks/http_overhead.py --streams 8 --max-num-seqs 4 --max-num-batched-tokens 96 --output-tokens 16

One model is loaded once and serves both, so that a turn of either has the same weights and captured graphs; HTTP is
served by a process of its own, as by `twinserve serve`, and the clients are another. All requests come at once, no two
of them begin alike, and --max-num-seqs of them run. `full_tok_s` are the tokens a second between the ends of steps in
both of which so many ran, of the records; `output_tok_s` those from the first arrival to the last finish; `seen_tok_s`
what the clients saw, from the first byte sent to the last one read. Each served record is decided again, and simulated
with a latency that is fitted to the record of the run beside it; where its steps are too much alike for a fit, there is
no twin, and the result says why. A shape that has no tokenizer gets one, so that answers are made into text.
Results: OUT/<device>/http-overhead.json.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from environment import command, commit, device_folder, machine, versions
from http_load import scraped, stream
from result_files import RESULTS, write_json

from twinserve.engine.options import EngineOptions
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.readers import write_trace
from twinserve.traces.runs.compare import METRICS, value_of
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import fit_runs, load_llm, run_real, run_sim
from twinserve.worlds.workload import load_workload


def bodies(streams: int, prompt_tokens: int, output_tokens: int, temperature: float) -> list[dict[str, Any]]:
    """Requests, of which no two share a block."""
    how = {"max_tokens": output_tokens, "ignore_eos": True, "temperature": temperature}
    return [{"prompt": [5 + number, *[4] * (prompt_tokens - 1)]} | how for number in range(streams)]


def streamed(url: str, asked: list[dict[str, Any]]) -> float:
    """Stream all requests at once; seconds from the first byte that was sent to the last that was read."""

    async def all_of_them() -> float:
        done = await asyncio.gather(*(stream(url, body) for body in asked))
        if not all(one.is_whole for one in done):
            raise RuntimeError(f"{sum(not one.is_whole for one in done)} of {len(done)} streams broke off")
        return max(one.last_s or 0.0 for one in done) - min(one.sent_s for one in done)

    return asyncio.run(all_of_them())


@contextmanager
def served(llm: Any, record: Path) -> Iterator[str]:
    """The URL of a server over `llm`, whose traffic is recorded, until the block ends; then it has ended too."""
    from twinserve.serving.backends import EngineBackend
    from twinserve.serving.hosts import EngineHost, Host
    from twinserve.serving.options import ServeOptions
    from twinserve.serving.recording import LiveRecord, RecordOptions
    from twinserve.serving.run import Service

    class Loaded:
        is_apart = True

        def host(self, options: RecordOptions | None) -> Host:
            assert options is not None
            kept = LiveRecord.of_engine(options, llm.settings, llm.facts(), llm.device_name)
            return EngineHost(EngineBackend(llm, takes_defaults=False), llm, kept, is_lent=True)

    is_up, failures = threading.Event(), list[BaseException]()

    def say(line: str) -> None:
        if line.startswith("serving "):
            is_up.set()

    service = Service(ServeOptions(port=0), Loaded(), record=RecordOptions(record), say=say)

    def serve() -> None:
        try:
            service.run()
        except BaseException as error:
            failures.append(error)
            is_up.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        is_up.wait()
        if service.url is not None and not failures:
            yield service.url
    finally:
        service.stop()
        thread.join()
    if failures:
        raise failures[0]


def full_tok_s(record: RunRecord, max_num_seqs: int) -> float:
    """Tokens a second between the ends of steps in both of which so many ran.

    Raises:
        RuntimeError: so many never ran.
    """
    pairs = [
        (after["sampled"], after["end_ns"] - before["end_ns"])
        for before, after in pairwise(record.steps)
        if before["running"] == after["running"] == max_num_seqs
    ]
    if not pairs:
        raise RuntimeError(f"{max_num_seqs} requests never ran at once: more of them, or longer answers, are needed")
    return sum(tokens for tokens, _ in pairs) / sum(nanoseconds for _, nanoseconds in pairs) * 1e9


def measured(folder: Path, number: int, arguments: argparse.Namespace, llm: Any, clients: Any) -> dict[str, Any]:
    """One turn of each, of which either comes first every other time; and the twin of what was served."""
    turn = folder / str(number)
    turn.mkdir()
    asked = bodies(arguments.streams, arguments.prompt_tokens, arguments.output_tokens, arguments.temperature)
    result: dict[str, Any] = {}

    def run() -> None:
        params = SamplingParams(temperature=arguments.temperature, ignore_eos=True)
        run_real(load_workload(folder / "trace.jsonl", {"all_at_zero": True}), llm, out=turn / "run", params=params)

    def serve() -> None:
        with served(llm, turn / "live") as url:
            begun = time.perf_counter()
            seen_s = clients.submit(streamed, url, asked).result()
            result["stream_lag_s"] = scraped(url)["twinserve:stream_lag_seconds"]
            result["seen_tok_s"] = arguments.streams * arguments.output_tokens / seen_s
            result["wall_s"] = round(time.perf_counter() - begun, 2)

    for world in (run, serve) if number % 2 == 0 else (serve, run):
        world()
    alone, live = load_record(turn / "run"), load_record(turn / "live")
    again = replay(live)
    for name, record in (("run", alone), ("http", live)):
        result[name] = {
            "full_tok_s": full_tok_s(record, arguments.max_num_seqs),
            "output_tok_s": record.run["summary"]["output_tok_s"],
            "device_wait_share": record.run["summary"]["device_wait_share"],
            "steps": record.run["summary"]["steps"],
        }
    return (
        result
        | {
            "overhead": 1 - result["http"]["full_tok_s"] / result["run"]["full_tok_s"],
            "replay": {"exact": again.is_exact, "equal": again.equal, "recorded": again.recorded},
        }
        | twin_of(turn, live, llm.settings)
    )


def twin_of(turn: Path, live: RunRecord, settings: Settings) -> dict[str, Any]:
    """What was served over HTTP, simulated as the run beside it says; or why it cannot be."""
    try:
        latency = fit_runs([turn / "run"], None)
    except InputError as error:
        return {"twin": {}, "no_twin": str(error)}
    facts = {"name": "the run beside it", "identity": latency.identity}
    twin = run_sim(load_workload(turn / "live", {}), settings, latency, latency_facts=facts)
    real = live.run["summary"]
    return {"twin": {metric: {"sim": value_of(twin, metric), "real": value_of(real, metric)} for metric in METRICS}}


def with_tokenizer(llm: Any) -> Any:
    """`llm`, whose answers become text: where its shape has no tokenizer, each token is a word of one that is made."""
    if llm.tokenizer is None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = {f"w{number}": number for number in range(llm.config.vocab_size)}
        llm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))
    return llm


def parse() -> argparse.Namespace:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--streams", type=int, default=256)
    parsing.add_argument("--max-num-seqs", type=int, default=128)
    parsing.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parsing.add_argument("--prompt-tokens", type=int, default=256)
    parsing.add_argument("--output-tokens", type=int, default=256)
    parsing.add_argument("--max-model-len", type=int, default=2048)
    parsing.add_argument("--num-gpu-blocks", type=int, default=8192)
    parsing.add_argument("--temperature", type=float, default=0.6)
    parsing.add_argument("--device", default="cpu")
    parsing.add_argument("--dtype", help="float32 or bfloat16; the engine's own default unless given")
    parsing.add_argument("--model", default="smollm2-135m")
    parsing.add_argument("--load-format", default="auto")
    parsing.add_argument("--repeats", type=int, default=3)
    parsing.add_argument("--budget-s", type=float, default=110.0, help="no turn is begun that may not end within this")
    parsing.add_argument("--out", type=Path, default=RESULTS)
    parsing.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    return parsing.parse_args()


def main() -> int:
    begun, arguments = time.perf_counter(), parse()
    engine = {"model": arguments.model, "device": arguments.device, "load_format": arguments.load_format}
    engine |= {"dtype": arguments.dtype} if arguments.dtype else {}
    names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_gpu_blocks")
    settings = Settings.load({name: getattr(arguments, name) for name in names} | {"pipeline_depth": 1})

    def say(line: str) -> None:
        print(f"{time.perf_counter() - begun:5.1f} s  {line}", flush=True)

    about = {"machine": machine(), "versions": versions(), "commit": arguments.commit or commit()}
    options = {name: value for name, value in vars(arguments).items() if name not in ("out", "commit", "budget_s")}
    about |= {"command": command(), "options": options}
    path = arguments.out / device_folder(arguments.device) / "http-overhead.json"
    repeats: list[dict[str, Any]] = []
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=spawned) as clients:
        starting = clients.submit(bodies, 1, 1, 1, 0.0)  # its imports, while the model is loaded
        llm = with_tokenizer(load_llm(EngineOptions.load(engine), settings, progress=say))
        if arguments.device != "cpu":
            llm.warm_up()
        starting.result()
        say("the model is ready")
        lengths = [LengthSpec.parse(f"fixed:{count}") for count in (arguments.prompt_tokens, arguments.output_tokens)]
        requests = generate(
            seed=0, num_requests=arguments.streams, rate=1e6, prompt_tokens=lengths[0], output_tokens=lengths[1]
        )
        write_trace(Path(folder) / "trace.jsonl", requests, {})
        longest = 0.0
        while len(repeats) < arguments.repeats:
            at = time.perf_counter()
            if repeats and at - begun + longest > arguments.budget_s:
                say(f"no time is left for another turn: {len(repeats)} of {arguments.repeats}")
                break
            repeats.append(measured(Path(folder), len(repeats), arguments, llm, clients))
            longest = max(longest, time.perf_counter() - at)
            overhead = statistics.median(one["overhead"] for one in repeats)
            write_json(path, about | {"overhead": overhead, "repeats": repeats})
            run, http = repeats[-1]["run"]["full_tok_s"], repeats[-1]["http"]["full_tok_s"]
            say(f"run {run:,.0f}, HTTP {http:,.0f} tokens/s at {arguments.max_num_seqs} running: {1 - http / run:+.1%}")
        llm.close()
    print(f"{statistics.median(one['overhead'] for one in repeats):+.1%}; {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
