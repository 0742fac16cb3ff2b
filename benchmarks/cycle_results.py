"""What a benchmark of one of the seven cycles returns: rows, cases, figures and expectations, and its JSON file."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from environment import commit, device_folder, versions
from result_files import write_json
from subject import Subject
from timing import repeat, spread
from work import serve, yardstick, yardstick_in_words

from twinserve.engine.device_queue import device_name
from twinserve.engine.kv_cache import bytes_per_block
from twinserve.engine.quantization import measure_memory

WHAT_IS_MEASURED_IN_MEMORY = "weights and KV at its fullest, counted; 1 MB is 10**6 bytes"


def case(name: str, repeats_s: Seq[float], tokens: int | None = None) -> dict[str, Any]:
    """A measurement beside the yardstick; its throughput counts `tokens` for each repeat, None being none."""
    seconds = spread(repeats_s)
    return {"name": name, **seconds} | (
        {} if tokens is None else {"tokens": tokens, "tokens_per_s": tokens / seconds["median_s"]}
    )


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


def write(values: dict[str, Any], folder: Path) -> Path:
    """Write a benchmark's JSON; its path below `folder`."""
    path = folder / values["device"] / f"cycle{values['cycle']}-{values['model']}.json"
    write_json(path, values)
    return path
