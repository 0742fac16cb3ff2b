# ruff: noqa: E501 - rows of files are as long as they are
"""Malformed inputs of all commands, drawn from a seed: `python tests/fuzz/malformed.py --count 1000 --seed 0`.

Every input is a valid file or option that is changed somewhere. A command may take it, or has to refuse it with status 2
and one line, within 10 s and 1 GB, and leave nothing under the name that it was to write. Each runs in a process that is
forked from this one, which has imported everything.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES = 10, 1024
JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**30, "", "x", "1", "nan", "\x1b[31m", "a\nb", "\ud83d",
    "[red]", "[/b]", [], [[]], [1], {}, {"a": 1}, float("inf"), float("nan"),
)  # fmt: skip
BYTES = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"[" * 50_000,
    b"{",
    b"}",
    b",",
    b'"',
    b"9" * 5000,
    b"\xf0\x9f",
    b"\n\n",
)
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
PERF = [{"start_time": 7.5, "end_time": 8.0, "info": {"input_tokens": 9, "output_tokens": 3}, "error": None}]
LATENCY = "smollm2-135m-cpu-2-threads"
OPTIONS = ("limit", "rate-scale", "session-rate", "window-s", "max-num-seqs", "max-num-batched-tokens", "block-size",
           "num-gpu-blocks", "max-model-len", "watermark", "replicas", "die", "router", "spread-seed", "shuffle-seed",
           "max-output-tokens", "latency", "scheduling-policy", "max-lead-tokens", "prefix-caching-seed")  # fmt: skip
WORDS = ("", "x", "-1", "0", "nan", "inf", "1e308", "1e-300", "9" * 30, "1_6", "０", "0:5", "5:0", ":", "0:1:2", "9:0:1",
         "roofline:x@h100", "roofline:llama-3-8b@h100:tp=0", "/dev/zero", "/", "a\nb", "x" * 300, "[/b]", "f.py:C")  # fmt: skip


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TRACES = {
    "azure": AZURE, "burstgpt": BURSTGPT, "weka": json.dumps(WEKA), "vllm": json.dumps(VLLM), "guidellm": json.dumps(GUIDELLM),
    "mooncake": json_lines(MOONCAKE), "sessions": json_lines(SESSIONS), "bailian": json_lines(BAILIAN), "own": json_lines(OWN),
    "sharegpt": json.dumps(SHAREGPT), "inference-perf": json.dumps(PERF),
}  # fmt: skip


def changed_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one of the values in it changed, taken away, or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        if rng.random() < 0.15:
            return {key: inner for key, inner in value.items() if key != name}
        return value | {name: changed_value(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        action = rng.random()
        if action < 0.1:
            return value[:place] + value[place + 1 :]
        if action < 0.2:
            return [*value, value[place]]
        return [*value[:place], changed_value(rng, value[place]), *value[place + 1 :]]
    return rng.choice(JUNK)


def changed_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes cut short, doubled, or with others put in."""
    place = rng.randrange(len(content) + 1)
    action = rng.random()
    if action < 0.3:
        return content[:place]
    if action < 0.4:
        return content[place:] + content
    if action < 0.7:
        return content[:place] + rng.choice(BYTES) + content[place:]
    return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]


def changed(rng: random.Random, content: bytes) -> bytes:
    """A file's content with something wrong in it, as likely as not."""
    if rng.random() < 0.35:
        return changed_bytes(rng, content)
    try:
        lines = content.decode().splitlines()
        try:
            return json.dumps(changed_value(rng, json.loads(content))).encode()
        except ValueError:
            place = rng.randrange(len(lines))
            lines[place] = json.dumps(changed_value(rng, json.loads(lines[place])))
            return ("\n".join(lines) + "\n").encode()
    except ValueError:
        return changed_cells(rng, content)


def changed_cells(rng: random.Random, content: bytes) -> bytes:
    """A table, or another text, with one of its cells changed."""
    lines = content.decode("utf-8", "replace").splitlines() or [""]
    place = rng.randrange(len(lines))
    mark = "," if "," in lines[place] else "="
    cells = lines[place].split(mark)
    cells[rng.randrange(len(cells))] = str(rng.choice([*JUNK, *WORDS]))
    lines[place] = mark.join(cells)
    return "\n".join(lines).encode("utf-8", "replace")


@dataclass
class Valid:
    """Valid files to change, made once."""

    folder: Path
    trace: Path
    latency: Path
    record: Path
    shape: Path


def valid_files(folder: Path) -> Valid:
    """Make them by the commands themselves."""
    import twinserve
    from twinserve.worlds.run import shipped_latencies

    trace, latency, record = folder / "trace.jsonl", folder / "latency.json", folder / "record"
    shutil.copy(shipped_latencies()[LATENCY], latency)
    make = ["trace", "make", "--out", str(trace), "--requests", "12", "--rate", "5", "--prompt-tokens", "fixed:20"]
    for arguments in (make, ["sim", str(trace), "--latency", LATENCY, "--out", str(record)]):
        outcome = run(arguments)
        assert outcome.status == 0, outcome
    shape = Path(twinserve.__file__).parent / "data" / "shapes" / "qwen3-0.6b" / "config.json"
    return Valid(folder, trace, latency, record, shape)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    err: str
    megabytes: int
    is_late: bool

    def fault(self) -> str | None:
        """What should not have been, in words."""
        if self.is_late:
            return f"took more than {SECONDS} s"
        if self.megabytes > MEGABYTES:
            return f"took {self.megabytes} MB"
        lines = self.err.splitlines()
        said = [line for line in lines if line.startswith("twinserve: ")]
        if "Traceback" in self.err or "Exception ignored" in self.err:
            return "a traceback"
        if self.status == 2 and (len(said) != 1 or lines[-1] != said[0]):
            return "not one line"
        return None if self.status in (0, 2) or (self.status == 1 and not said) else f"status {self.status}"


def run(arguments: list[str]) -> Outcome:
    """Run a command in a process that is forked from this one."""
    with tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            _command(arguments, err.fileno())
        _, status, usage = os.wait4(child, 0)
        err.seek(0)
        text = err.read().decode("utf-8", "replace")
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, text, usage.ru_maxrss >> 10, code == -signal.SIGKILL)


def _command(arguments: list[str], err: int) -> None:
    """In the child: run a command, and end."""
    code = 99
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (null, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", errors="backslashreplace",
                                      write_through=True)  # fmt: skip
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.argv = ["twinserve", *arguments]
        from twinserve.cli import main

        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def trace_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """A changed trace of one of the formats."""
    path = folder / "bad"
    content = rng.choice([valid.trace.read_text(), *TRACES.values()])
    path.write_bytes(changed(rng, content.encode()))
    command = rng.choice((["trace", "stat"], ["sim", "--latency", LATENCY], ["trace", "convert"]))
    out = [str(folder / "out")] if command[-1] == "convert" else []
    return [*command, str(path), *out]


def latency_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """A changed latency file, or a changed shape."""
    if rng.random() < 0.3:
        path = folder / "config.json"
        path.write_bytes(changed(rng, valid.shape.read_bytes()))
        return ["sim", str(valid.trace), "--latency", f"roofline:{path}@h100", "--out", str(folder / "out")]
    path = folder / "latency.json"
    path.write_bytes(changed(rng, valid.latency.read_bytes()))
    return ["sim", str(valid.trace), "--latency", str(path), "--out", str(folder / "out")]


def settings_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """Changed files of settings, and of plans."""
    if rng.random() < 0.5:
        path = folder / "settings.toml"
        text = (
            "max_num_seqs = 8\nblock_size = 16\nscheduling_policy = 'fcfs'\n[fleet]\nreplicas = 2\nrouter = 'random'\n"
        )
        path.write_bytes(changed(rng, text.encode()))
        return ["sim", str(valid.trace), "--latency", LATENCY, "--config", str(path), "--out", str(folder / "out")]
    path = folder / "plan.toml"
    text = f"trace = {str(valid.trace)!r}\nlatency = {LATENCY!r}\nlimit = 6\nrate = 2.0\narrivals = 'poisson'\nseeds = 1\n[grid]\nmax_num_seqs = [1, 2]\n"
    path.write_bytes(changed(rng, text.encode()))
    return ["sweep", str(path), "--out", str(folder / "out"), "--jobs", "1"]


def record_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """A record one of whose files is changed."""
    record = folder / "record"
    shutil.copytree(valid.record, record)
    path = rng.choice(sorted(record.iterdir()))
    path.write_bytes(changed(rng, path.read_bytes()))
    out = str(folder / "out")
    return rng.choice((
        ["replay", str(record)], ["compare", str(record), str(valid.record)], ["report", str(record), "--out", out],
        ["fit", str(record), "--out", out], ["sim", str(valid.trace), "--latency-from", str(record)],
        ["trace", "stat", str(record / "requests.jsonl")], ["record", "import", str(record), out],
    ))  # fmt: skip


def option_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """An option with a value that nobody means."""
    out = ["--out", str(folder / "out")]
    if rng.random() < 0.2:
        names = (
            "rate",
            "cv",
            "requests",
            "prompt-tokens",
            "output-tokens",
            "turns",
            "think-time-s",
            "burst-size",
            "seed",
        )
        return ["trace", "make", *out, f"--{rng.choice(names)}", rng.choice(WORDS), "--requests", "20"]
    options = [word for _ in range(rng.randint(1, 2)) for word in (f"--{rng.choice(OPTIONS)}", rng.choice(WORDS))]
    return ["sim", str(valid.trace), "--latency", LATENCY, *out, *options]


CASES: dict[str, Callable[[random.Random, Valid, Path], list[str]]] = {
    "trace": trace_case, "latency": latency_case, "settings": settings_case, "record": record_case, "option": option_case,
}  # fmt: skip


def fuzz(count: int, seed: int, say: Callable[[str], None]) -> tuple[Counter[str], list[str]]:
    """Try so many inputs; how they ended, by kind, and what was wrong."""
    import twinserve.commands.app
    import twinserve.planning.sweep
    import twinserve.reports.page
    import twinserve.sim.replica  # noqa: F401 - what the forked processes would import again and again

    ends: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        (kept := Path(scratch) / "valid").mkdir()
        valid = valid_files(kept)
        for number in range(count):
            rng = random.Random(f"{seed}:{number}")
            kind = list(CASES)[number % len(CASES)]
            (folder := Path(scratch) / str(number)).mkdir()
            arguments = CASES[kind](rng, valid, folder)
            outcome = run(arguments)
            fault = outcome.fault()
            left = sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))
            if fault is None and outcome.status == 2 and left and arguments[0] != "sweep":
                fault = f"left {left}"
            ends[f"{kind}: status {outcome.status}"] += 1
            if fault is not None:
                last = (outcome.err.strip().splitlines() or [""])[-1]
                faults.append(f"input {number} of seed {seed}: {fault}: {' '.join(arguments)[:200]}: {last[:300]}")
                say(faults[-1])
            shutil.rmtree(folder)
    return ends, faults


def main() -> None:
    """Try inputs, and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    ends, faults = fuzz(chosen.count, chosen.seed, print)
    for end, number in sorted(ends.items()):
        print(f"{end}: {number}")
    print(f"{chosen.count} inputs, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
