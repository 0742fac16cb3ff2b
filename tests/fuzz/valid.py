# ruff: noqa: E501 - rows of files are as long as they are
"""Valid files, to be changed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from outcome import run

LATENCY = "smollm2-135m-cpu-2-threads"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,39,10\n"
)
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,C,47,18,65,l\n45,G,9,3,12,l\n"
WEKA = {"block_size": 4, "requests": [{"t": 0.0, "in": 10, "out": 3, "hash_ids": [1, 2], "api_time": 1.0}] * 2}
VLLM = {
    "tokenizer_id": "m", "completed": 2, "duration": 3.0, "input_lens": [10, 20], "output_lens": [3, 4], "errors": ["", ""],
    "ttfts": [0.1, 0.2], "start_times": [5.0, 6.5],
}  # fmt: skip
GUIDELLM = {
    "benchmarks": [{"requests": {"successful": [{"prompt_tokens": 9, "output_tokens": 2, "start_time": 17.5}]}}]
}
MOONCAKE = [{"timestamp": n, "input_length": 600, "output_length": 5, "hash_ids": [0, n]} for n in range(3)]
SESSIONS = [
    {"session_id": "a", "input_length": 60, "timestamp": 5.0},
    {"session_id": "a", "input_length": 9, "delay": 3.5},
]
BAILIAN = [
    {
        "chat_id": n,
        "parent_chat_id": n - 1,
        "timestamp": n * 0.5,
        "input_length": 20,
        "output_length": 3,
        "hash_ids": [0, n],
    }
    for n in range(3)
]
OWN = [
    {"format": "twinserve-trace/1"},
    {"arrival_ns": 0, "prompt": [[7, 0, 40]], "max_tokens": 5, "session": 1},
    {"arrival_ns": 3, "prompt": [[7, 0, 40], [-1, 0, 5]], "max_tokens": 6, "session": 1, "after": 0, "think_ns": 9},
]
SHAREGPT = [{"id": "x", "conversations": [{"from": "human", "value": "12345678"}, {"from": "gpt", "value": "1234"}]}]
DEVICE = """name = 'x'
bandwidth = 1e12
flops = 1e14
memory_mib = 81920
link = 1e11
source = 'a table'
[shares]
device = 'x'
bandwidth = 0.8
flops = 0.5
attention_bandwidth = 0.5
attention_flops = 0.5
layer_ns = 2000
source = 'a guess'
"""
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SMALLEST_POOL = ("--num-gpu-blocks", "64", "--max-num-seqs", "8")
SMALLEST_PROFILE = (
    "--shapes", "16", "--max-seqs", "2", "--max-context", "64", "--max-prompt", "32", "--repeats", "1",
    *SMALLEST_POOL,
)  # fmt: skip
PERF = [{"start_time": 7.5, "end_time": 8.0, "info": {"input_tokens": 9, "output_tokens": 3}, "error": None}]


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TRACES = {
    "azure": AZURE, "burstgpt": BURSTGPT, "weka": json.dumps(WEKA), "vllm": json.dumps(VLLM), "guidellm": json.dumps(GUIDELLM),
    "mooncake": json_lines(MOONCAKE), "sessions": json_lines(SESSIONS), "bailian": json_lines(BAILIAN), "own": json_lines(OWN),
    "sharegpt": json.dumps(SHAREGPT), "inference-perf": json.dumps(PERF),
}  # fmt: skip


@dataclass
class Valid:
    """Valid files to change, made once; and where a server of the model listens."""

    trace: Path
    latency: Path
    record: Path
    shape: Path
    drafted: Path
    law: Path
    device: Path
    plan: Path
    few: Path
    model: Path
    profile: Path
    real: Path
    url: str = ""


def valid_files(folder: Path) -> Valid:
    """Make them, by the commands where there is one."""
    import twinserve
    from twinserve.worlds.run import shipped_latencies

    shape = Path(twinserve.__file__).parent / "data" / "shapes" / "qwen3-0.6b" / "config.json"
    names = ("trace.jsonl", "latency.json", "record", "drafted", "law.json", "device.toml", "plan.toml", "few.toml")
    trace, latency, record, drafted, law, device, plan, few = (folder / name for name in names)
    model, profile, real = folder / "model", folder / "measured.profile.jsonl.gz", folder / "real"
    valid = Valid(trace, latency, record, shape, drafted, law, device, plan, few, model, profile, real)
    few.write_text("num_gpu_blocks = 64\n")
    shutil.copy(shipped_latencies()[LATENCY], latency)
    law.write_text(json.dumps({"by_position": [0.8, 0.6], "concentration": 4.0, "found_share": 0.9, "seed": 3}))
    device.write_text(DEVICE)
    text = f"trace = {str(trace)!r}\nlatency = {LATENCY!r}\nlimit = 6\nrate = 2.0\narrivals = 'poisson'\nseeds = 1\n"
    plan.write_text(f"{text}objective = 'p99 TTFT <= 1 s'\n[grid]\nmax_num_seqs = [1, 2]\n")
    drafts = json.dumps(DRAFTS | {"acceptance": str(law)})
    plan.with_name("settings.toml").write_text("max_num_seqs = 8\n[engine]\ndtype = 'float32'\n")
    make = ["trace", "make", "--out", str(trace), "--requests", "12", "--rate", "5", "--prompt-tokens", "fixed:20"]
    simulated = ["sim", str(trace), "--latency", LATENCY, "--out"]
    measure = ["profile", "--model", str(model), "--out", str(folder / "measured.json"), *SMALLEST_PROFILE]
    for work in (
        make,
        [*simulated, str(record)],
        [*simulated, str(drafted), "--speculative-config", drafts],
        partial(make_model, model),
        measure,
        ["run", str(trace), "--model", str(model), "--time-scale", "0", *SMALLEST_POOL, "--out", str(real)],
    ):
        outcome = run(work, folder)
        assert outcome.status == 0, outcome
    return valid


def make_model(folder: Path) -> None:
    """A Hugging Face folder of a tiny random model, with a tokenizer of bytes and a chat template."""
    from engine_judge import judge_of
    from live_servers import byte_tokenizer

    judge_of("llama").model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@contextmanager
def served(model: Path) -> Iterator[str]:
    """Serves the model over HTTP, in processes of its own; where. It answers alike before and after, and ends well."""
    import httpx

    words = [sys.executable, "-m", "twinserve", "serve", "--port", "0", "--model", str(model), "--num-gpu-blocks", "64"]
    plain = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as server:
        assert server.stderr is not None
        try:
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            threading.Thread(target=server.stderr.read, daemon=True).start()

            def answer() -> str:
                return httpx.post(f"{url}/v1/completions", json=plain, timeout=60).json()["choices"][0]["text"]

            while httpx.get(f"{url}/health", timeout=60).status_code != 200:
                time.sleep(0.1)
            before = answer()
            yield url
            assert answer() == before
        finally:
            server.terminate()
    assert server.returncode == 0, server.returncode
