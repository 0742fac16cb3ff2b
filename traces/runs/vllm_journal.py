"""Journals of `twinserve.vllm.RecordingScheduler` as step logs of the format "vllm-run-record/1"."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from twinserve.settings.errors import InputError
from twinserve.traces.lines import json_value
from twinserve.traces.request import answer_text

JOURNAL = "journal.jsonl"
FORMAT = "twinserve-vllm-journal/3"
KIND = "journal"
SCHEDULING = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_chunked_prefill",
    "long_prefill_token_threshold",
    "scheduler_reserve_full_isl",
    "watermark",
)
"""Settings of vLLM's scheduler, of which a step log tells."""
NEWER_SCHEDULING = ("long_prefill_token_threshold_adaptive", "prefill_schedule_interval", "max_num_active_seqs")
"""Those that 0.24 has not."""
STOP_TOKEN = 1
"""Stands for whatever token ended an answer."""
_TIMES = {"q": slice(1, 2), "s": slice(1, 3), "u": slice(1, 4), "a": slice(0, 1)}
"""By kind of line, where its times stand, in whole microseconds."""
TOKENS = {"vocab_size": 1 << 30, "first_id": 1 << 10, "seed": 0}
"""Prompts are made up so; generated tokens are numbers beyond them."""


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """What a step log has in its three files: the run, its requests, and its steps as dicts.

    A line that a kill has cut off is left out. Beside the log's own fields, a request has `priority`, `like` (it begins
    as that earlier request does, for so many tokens), `reason` (None: it has not ended) and `aborted` (when, or None).

    Raises:
        InputError: it is not a journal.
    """
    file = path / JOURNAL
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", path=file) from error
    whole = text[: text.rfind("\n") + 1]
    lines = [json_value(line, file, number) for number, line in enumerate(whole.splitlines(), 1)]
    if not lines or lines[0][:2] != ["format", FORMAT]:
        raise InputError(f"expected a journal of format {FORMAT!r}", path=file, line=1)
    settings = dict(lines[0][2])
    requests: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    depth = 0
    open_steps: set[int] = set()
    last = 0.0
    for number, (kind, *values) in enumerate(lines[1:], 2):
        try:
            times = _TIMES[kind]
            values[times] = [time / 1e6 for time in values[times]]
            if kind == "q":
                requests.append(_request(values))
            elif kind == "s":
                depth = max(depth, len(open_steps))
                steps.append(_step(values))
                for i in steps[-1]["preempted"]:
                    requests[i]["preemptions"] += 1
                if steps[-1]["is_empty"]:
                    steps[-1] |= dict.fromkeys(("launched", "output_ready", "end"), values[2])
                else:
                    open_steps.add(values[0])
                last = values[2]
            elif kind == "u":
                open_steps.discard(values[0])
                _take_output(requests, steps[values[0]], values)
                last = values[3]
            else:
                for i in values[1]:
                    requests[i]["aborted"] = values[0]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"expected a line of a journal, but {error!r}", path=file, line=number) from error
    while steps and steps[-1]["end"] is None:  # in flight when the journal ended
        steps.pop()
    settings |= {"max_concurrent_batches": depth + 1, "gpu": "recorded by twinserve.vllm"}
    settings |= {name: None for name in ("torch", "triton", "python")}
    run = {"name": path.name, "kind": KIND, "workload": "traffic of one's own", "wall_s": last, "settings": settings}
    run["sha256"] = {"requests.jsonl.gz": hashlib.sha256(whole.encode()).hexdigest()}
    return run, requests, steps


def _request(values: list[Any]) -> dict[str, Any]:
    i, at, prompt, max_tokens, priority, like = values
    row = {"i": i, "arrival": at, "added": at, "queued": at, "prompt": prompt, "max_tokens": max_tokens}
    row |= dict.fromkeys(("first_token", "finish", "output", "cached", "aborted", "reason"))
    return row | {"priority": priority, "like": like, "preemptions": 0}


def _step(values: list[Any]) -> dict[str, Any]:
    step, decided, schedule_end, gone, new, chunks, preempted, waiting, running, free, num_tokens = values
    return {
        "step": step,
        "decided": decided,
        "schedule_end": schedule_end,
        "output_ready": None,
        "end": None,
        "gone": gone,
        "new": new,
        "chunks": chunks,
        "preempted": preempted,
        "waiting": waiting,
        "running": running,
        "free": free,
        "emitted": 0,
        "launched": None,
        "is_empty": not num_tokens,
        "stopped": [],
    }


def _take_output(requests: list[dict[str, Any]], step: dict[str, Any], values: list[Any]) -> None:
    _, step["launched"], step["output_ready"], step["end"], step["emitted"], ended = values
    for i, reason in ended:
        requests[i]["finish"], requests[i]["reason"] = step["end"], reason
        if reason == "stop":
            step["stopped"].append(i)


def prompts_of(requests: list[dict[str, Any]], outputs: dict[int, list[int]]) -> list[list[list[int]]]:
    """The parts of each prompt: those of the request with which it begins alike, answer included, then its own."""
    prompts: list[list[list[int]]] = []
    for row in requests:
        parts: list[list[int]] = []
        shared = 0
        if row["like"] is not None:
            other, shared = row["like"]
            known = [*prompts[other], [answer_text(other), 0, len(outputs[other])]]
            left = shared
            for text, start, length in known:
                if left > 0 and length:
                    parts.append([text, start, min(length, left)])
                    left -= min(length, left)
        if row["prompt"] > shared:
            parts.append([row["i"], 0, row["prompt"] - shared])
        prompts.append(parts)
    return prompts
