"""Malformed inputs of the commands that simulate and that read traces and records."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from changes import changed
from valid import LATENCY, TRACES, Valid


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
    path.write_bytes(changed(rng, valid.plan.read_bytes()))
    return ["sweep", str(path), "--out", str(folder / "out"), "--jobs", "1"]


def record_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """A record one of whose files is changed."""
    record = folder / "record"
    shutil.copytree(rng.choice((valid.record, valid.real)), record)
    path = rng.choice(sorted(record.iterdir()))
    path.write_bytes(changed(rng, path.read_bytes()))
    out = str(folder / "out")
    return rng.choice((
        ["replay", str(record)], ["compare", str(record), str(valid.record)], ["report", str(record), "--out", out],
        ["fit", str(record), "--out", out], ["sim", str(valid.trace), "--latency-from", str(record)],
        ["trace", "stat", str(record / "requests.jsonl")], ["record", "import", str(record), out],
    ))  # fmt: skip
