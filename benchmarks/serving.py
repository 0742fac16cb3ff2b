"""The same requests in real time, by this engine and by any OpenAI endpoint: TTFT and TPOT by rate.

    python benchmarks/serving.py --model qwen3-0.6b --trace azure.csv --first 2000 --rate 40 60 80
    python benchmarks/serving.py --url http://127.0.0.1:8000 --label "vLLM 0.33, as it comes" --rate 40 60 80
    python benchmarks/serving.py --shape qwen3-0.6b --peer results_of_vllm_bench_serve.json

At each --rate the requests of a trace from its row --first on, at so many a second for --duration-s seconds, their
order and lengths kept; or, without --trace, those that the generator makes. What serves them: with --model this engine
in this process, at random weights unless --load-format is auto; with --url a server, as `vllm bench serve` asks it:
completions are streamed of the same token ids, tokens come until each answer has its length, and a salt of its own
keeps a rate from another's prefix cache. --peer adds what was recorded of another: a result of `vllm bench serve
--save-result --save-detailed`, or figures as in benchmarks/results/h200/vllm-0.24-qwen3-0.6b.json.

The engine's requests arrive when the trace says, a server's when they are sent; every run of the engine is decided
again from its record. Results: OUT/<device>/serving-SHAPE.json, of which engine_page.py makes a table. Exit status 1: a
request was not served, or a decision was another.
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from environment import device_facts, device_folder
from fidelity_windows import at_rate
from pages import table
from peers import read_peer
from result_files import RESULTS, load_json, merge
from served import HEADS, Entry, attained, cells, name_of, of_rows, queued

from twinserve.commands.progress import Bar, say
from twinserve.planning.attainment import Limits
from twinserve.policies import Sequence
from twinserve.settings.errors import InputError, RunError
from twinserve.traces.generator import generate, parse_lengths
from twinserve.traces.readers import read_trace
from twinserve.traces.request import TokenMaker
from twinserve.traces.requests import Requests
from twinserve.traces.runs.outcomes import Outcome
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import run_real
from twinserve.worlds.workload import TraceOptions, Workload, make_workload

if TYPE_CHECKING:
    from endpoints import Endpoint

    from twinserve.engine.llm import LLM

TOKENS = TokenMaker(10_000, 1_000)
"""Ids that the vocabulary of any language model has, behind those at its begin that mean something else."""


def parse() -> argparse.Namespace:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--model", help="a shape that ships or a folder, served by this engine")
    parsing.add_argument("--url", help="of an OpenAI-compatible server; OPENAI_API_KEY, if set, is its key")
    parsing.add_argument(
        "--peer", type=Path, action="append", default=[], help="what was recorded of another; repeatable"
    )
    parsing.add_argument("--label", help="what the server is called; its own name and version unless given")
    parsing.add_argument("--shape", help="what the results are called after; the model unless given")
    parsing.add_argument("--rate", type=float, nargs="+", default=[], help="requests a second, one or several")
    parsing.add_argument("--duration-s", type=float, default=40.0, help="seconds in which the requests arrive")
    parsing.add_argument("--trace", type=Path, help="in any format of `twinserve trace stat`")
    parsing.add_argument("--first", type=int, default=0, help="the row of the trace to begin with")
    parsing.add_argument("--spread-seed", type=int, help="spread arrivals of coarse steps, with this seed")
    parsing.add_argument("--max-prompt-tokens", type=int, default=4096, help="of a trace; longer prompts are cut")
    parsing.add_argument("--max-output-tokens", type=int, default=1000, help="of a trace; longer answers are cut")
    parsing.add_argument("--prompt-tokens", default="lognormal:1000:1:16:4096", help="of the generator")
    parsing.add_argument("--output-tokens", default="lognormal:200:1:4:1000", help="of the generator")
    parsing.add_argument("--seed", type=int, default=0, help="of the generator")
    parsing.add_argument("--limits", default="TTFT <= 1 s and TPOT <= 50 ms", help="that a request is to keep")
    parsing.add_argument("--max-num-seqs", type=int, default=256)
    parsing.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parsing.add_argument("--max-model-len", type=int, default=8192)
    parsing.add_argument("--num-gpu-blocks", type=int, help="as many as the memory holds unless given")
    parsing.add_argument("--load-format", choices=("auto", "dummy"), default="dummy")
    parsing.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="of the engine and of the server")
    parsing.add_argument("--dtype", help="float32 on a CPU and bfloat16 on CUDA, unless given")
    parsing.add_argument("--out", type=Path, default=RESULTS)
    parsing.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    return parsing.parse_args()


def main() -> int:
    arguments = parse()
    try:
        return measure(arguments)
    except (InputError, RunError) as error:
        say(f"serving.py: {error}")
        return 2 if isinstance(error, InputError) else 1


def measure(arguments: argparse.Namespace) -> int:
    """Serve, say and write what the command line asks for; the exit status.

    Raises:
        InputError: an option, a trace, a recorded peer or the server cannot be used.
        RunError: the engine or the server failed.
    """
    if not (arguments.model or arguments.url or arguments.peer):
        raise InputError("expected at least one of --model, --url and --peer")
    limits = Limits.parse(arguments.limits)
    recorded = [entry for path in arguments.peer for entry in read_peer(path, limits)]
    workloads = {rate: workload_at(rate, arguments) for rate in arguments.rate}
    if bool(workloads) != bool(arguments.model or arguments.url):
        raise InputError("expected both or neither of --rate, and --model or --url")
    endpoint = endpoint_of(arguments)
    shape = arguments.shape or (Path(arguments.model).name if arguments.model else endpoint and endpoint.shape)
    if not shape:
        raise InputError("is missing, expected what the results are called after", field="shape")
    if endpoint is not None:
        endpoint.check(next(iter(workloads.values())), TOKENS, secrets.token_hex(8))
    about = device_facts(arguments.device, arguments.commit)
    path = arguments.out / device_folder(arguments.device) / f"serving-{shape}.json"
    served: list[Entry] = []
    for entry in chain(by_engine(arguments, workloads, limits), by_endpoint(endpoint, workloads, limits)):
        served.append(about | entry)
        keep(path, shape, served[-1])
    for entry in recorded:
        keep(path, shape, entry)
    everything = load_json(path)["repeats"].values() if path.exists() else ()
    print("\n".join(table(list(HEADS), cells(everything), numbers=True)) + str(path))
    return 0 if all(map(is_whole, served)) else 1


def keep(path: Path, shape: str, entry: Entry) -> None:
    """Put an entry beside those of other servers and rates."""
    merge(path, {"shape": shape, "repeats": {name_of(entry): entry}})


def is_whole(entry: Entry) -> bool:
    """Was every request served, and every decision made again?"""
    summary = entry["summary"]
    return summary["finished"] == summary["requests"] and entry.get("replay", {"exact": True})["exact"]


def workload_at(rate: float, arguments: argparse.Namespace) -> Workload:
    """The requests that are served at a rate.

    Raises:
        InputError: a number is out of range, the trace cannot be read, or has too few requests.
    """
    for name, value in (("rate", rate), ("duration_s", arguments.duration_s)):
        if not 0 < value < math.inf:
            raise InputError("expected a number above 0", field=name, value=value)
    count = math.ceil(rate * arguments.duration_s)
    if arguments.trace is None:
        prompts = parse_lengths(arguments.prompt_tokens, "prompt_tokens")
        outputs = parse_lengths(arguments.output_tokens, "output_tokens")
        how = {"seed": arguments.seed, "num_requests": count}
        return Workload(generate(**how, rate=rate, prompt_tokens=prompts, output_tokens=outputs))
    trace, first = read_trace(arguments.trace), arguments.first
    chosen = trace.requests[first : first + count + 1] if first >= 0 else Requests()
    if len(chosen) <= count:
        problem = f"expected {count + 1} requests from row {first} on, of the {len(trace.requests)} there are"
        raise InputError(problem, path=arguments.trace)
    if chosen[count].arrival_ns == chosen[0].arrival_ns:
        raise InputError(f"expected requests from row {first} on that do not all come at once", path=arguments.trace)
    cut = replace(trace, requests=Requests(at_rate(chosen, rate)))
    names = ("spread_seed", "max_prompt_tokens", "max_output_tokens")
    workload = make_workload(cut, arguments.trace, TraceOptions(**{name: getattr(arguments, name) for name in names}))
    parameters, dropped = {"first": first, "requests": count, "rate": rate}, len(trace.requests) - count
    at = {"transform": "at_rate", "parameters": parameters, "changed": {"requests_dropped": dropped}}
    workload.facts["transforms"].insert(0, at)
    return replace(workload, dropped=workload.dropped + dropped)


def by_engine(arguments: argparse.Namespace, workloads: dict[float, Workload], limits: Limits) -> Iterator[Entry]:
    """What the engine makes of each workload, where a model is named."""
    if arguments.model is None:
        return
    from cuda_engine import close, make_llm

    names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_gpu_blocks")
    settings = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    engine = {"load_format": arguments.load_format, "device": arguments.device, "dtype": dtype}
    llm = make_llm(arguments.model, settings=settings, token_maker=TOKENS, **engine)
    name = f"twinserve, {llm.settings.max_num_seqs:,} sequences, {llm.settings.max_num_batched_tokens:,} tokens a step"
    about = {"server": name, "model": arguments.model, "engine": engine, "settings": llm.settings.model_dump()}
    for rate, workload in workloads.items():
        yield about | {"rate": rate, "trace": workload.facts} | run_at(rate, workload, llm, limits)
    close(llm)


def run_at(rate: float, workload: Workload, llm: LLM, limits: Limits) -> dict[str, Any]:
    """The figures of a workload that the engine serves, and whether its decisions were made again."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder, Bar(f"{rate:g} requests/s", len(workload.requests)) as bar:

        def ended(seq: Sequence) -> None:
            outcomes.append(Outcome.of(seq))
            bar.ended(seq)

        summary = run_real(workload, llm, out=Path(folder) / "run", progress=ended)
        again = replay(load_record(Path(folder) / "run"))
    return {
        "summary": summary,
        "queue_s": queued(outcomes),
        "attainment": attained(outcomes, limits, summary),
        "replay": {"exact": again.is_exact, "equal": again.equal, "recorded": again.recorded},
    }


def endpoint_of(arguments: argparse.Namespace) -> Endpoint | None:
    """The server that is named, if one is.

    Raises:
        InputError: it cannot be reached.
    """
    if arguments.url is None:
        return None
    from endpoints import Endpoint

    endpoint = Endpoint(arguments.url, os.environ.get("OPENAI_API_KEY"))
    endpoint.name = arguments.label or endpoint.name
    return endpoint


def by_endpoint(endpoint: Endpoint | None, workloads: dict[float, Workload], limits: Limits) -> Iterator[Entry]:
    """What a server makes of each workload, where one is named."""
    if endpoint is None:
        return
    for rate, workload in workloads.items():
        rows, beside = endpoint.serve(workload, TOKENS, secrets.token_hex(8))
        about = {"server": endpoint.name, "rate": rate, "trace": workload.facts, "model": endpoint.model}
        yield about | of_rows(rows, limits) | beside


if __name__ == "__main__":
    sys.exit(main())
