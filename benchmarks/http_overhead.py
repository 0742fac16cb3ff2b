"""What HTTP costs: the same requests streamed over HTTP and handed to the engine by `twinserve run`, in turns.

    python benchmarks/http_overhead.py --device cuda --dtype bfloat16 --model qwen3-0.6b --load-format dummy
    python benchmarks/http_overhead.py --streams 8 --max-num-seqs 4 --prompt-tokens 64 --output-tokens 16    # on a CPU

All requests come at once, and --max-num-seqs of them run. Throughputs are of the records, from the first arrival to the
last finish, in either world; `seen_tok_s` is what the clients saw, from the first byte sent to the last one read. Each
served record is decided again, and simulated with a latency that is fitted to the record of `run`.
Results: OUT/<device>/http-overhead.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import command, commit, device_folder, machine, versions
from http_load import served, stream
from result_files import RESULTS, write_json

from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.readers import write_trace
from twinserve.traces.runs.compare import METRICS, value_of
from twinserve.traces.runs.record import load_record


def twinserve(*arguments: object) -> str:
    """What a command says on its standard output.

    Raises:
        RuntimeError: it fails.
    """
    line = [sys.executable, "-m", "twinserve", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(line)}: {done.stderr}")
    return done.stdout


async def streamed(url: str, arguments: argparse.Namespace) -> float:
    """Stream all requests at once; seconds from the first byte that was sent to the last that was read."""
    bodies = [
        {"prompt": [5 + number % 200] * arguments.prompt_tokens, "max_tokens": arguments.output_tokens}
        | {"ignore_eos": True, "temperature": arguments.temperature}
        for number in range(arguments.streams)
    ]
    done = await asyncio.gather(*(stream(url, body) for body in bodies))
    if not all(one.is_whole for one in done):
        raise RuntimeError(f"{sum(not one.is_whole for one in done)} of {len(done)} streams broke off")
    return max(one.last_s or 0.0 for one in done) - min(one.sent_s for one in done)


def measured(folder: Path, arguments: argparse.Namespace, engine: list[str]) -> dict[str, Any]:
    """One turn of each: `run`, then a server; and the twin of what was served."""
    folder.mkdir()
    run, live, latency, twin = (folder / name for name in ("run", "live", "latency.json", "twin"))
    trace = folder / "trace.jsonl"
    lengths = (LengthSpec.parse(f"fixed:{count}") for count in (arguments.prompt_tokens, arguments.output_tokens))
    prompts, outputs = lengths
    requests = generate(seed=0, num_requests=arguments.streams, rate=1e6, prompt_tokens=prompts, output_tokens=outputs)
    write_trace(trace, requests, {})
    twinserve("run", trace, "--all-at-zero", "--temperature", arguments.temperature, "--out", run, *engine)
    with served([*engine, "--record", str(live)]) as url:
        seen_s = asyncio.run(streamed(url, arguments))
    record, alone = load_record(live), load_record(run)
    twinserve("fit", run, "--out", latency)
    twinserve("sim", live, "--latency", latency, *settings_of(arguments), "--out", twin)
    simulated = load_record(twin).run["summary"]
    replayed = json.loads(twinserve("replay", live, "--json"))
    tokens = arguments.streams * arguments.output_tokens
    return {
        "run_tok_s": alone.run["summary"]["output_tok_s"],
        "http_tok_s": record.run["summary"]["output_tok_s"],
        "seen_tok_s": tokens / seen_s,
        "replayed_exactly": f"{replayed['equal']} of {replayed['recorded']}",
        "twin": {
            metric: {"sim": value_of(simulated, metric), "real": value_of(record.run["summary"], metric)}
            for metric in METRICS
        },
    }


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """The policies' settings, alike in all commands."""
    settings = ["--max-num-seqs", str(arguments.max_num_seqs), "--max-model-len", str(arguments.max_model_len)]
    return [*settings, "--num-gpu-blocks", str(arguments.num_gpu_blocks), "--pipeline-depth", "1"]


def parse() -> argparse.Namespace:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--streams", type=int, default=256)
    parsing.add_argument("--max-num-seqs", type=int, default=128)
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
    parsing.add_argument("--out", type=Path, default=RESULTS)
    parsing.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    return parsing.parse_args()


def main() -> int:
    arguments = parse()
    engine = ["--device", arguments.device, *(["--dtype", arguments.dtype] if arguments.dtype else [])]
    engine += ["--model", arguments.model, "--load-format", arguments.load_format, *settings_of(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        repeats = [measured(Path(folder) / str(number), arguments, engine) for number in range(arguments.repeats)]
    run, http = (statistics.median(one[name] for one in repeats) for name in ("run_tok_s", "http_tok_s"))
    about = {"machine": machine(), "versions": versions(), "commit": arguments.commit or commit()}
    about |= {"command": command(), "options": {k: v for k, v in vars(arguments).items() if k not in ("out", "commit")}}
    result = about | {"run_tok_s": run, "http_tok_s": http, "overhead": 1 - http / run, "repeats": repeats}
    path = arguments.out / device_folder(arguments.device) / "http-overhead.json"
    write_json(path, result)
    print(f"run {run:,.0f}, HTTP {http:,.0f} output tokens/s: {1 - http / run:+.1%}; {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
