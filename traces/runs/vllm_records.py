"""Step logs of a real vLLM (format "vllm-run-record/1") as run records of ours: facts, and decisions as deltas.

A log says what vLLM scheduled in every step, in order, and when. What a log has and a record of ours does not is
dropped; what a record has and a log does not (block ids, digests, generated tokens) is absent, so a replay compares the
rows in order, their tokens and computed tokens, preemptions, and the counts of waiting, running and free blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from itertools import count
from pathlib import Path
from typing import Any

from twinserve.settings.errors import InputError
from twinserve.settings.vllm_versions import nearest_version
from twinserve.traces.lines import Content, json_file, json_lines_file, json_value
from twinserve.traces.readers import read_trace
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.fleet_record import is_fleet, load_fleet, load_replicas
from twinserve.traces.runs.metrics import summarize
from twinserve.traces.runs.record import SCHEMA, RunRecord, load_record
from twinserve.traces.runs.vllm_journal import (
    JOURNAL,
    KIND,
    NEWER_SCHEDULING,
    SCHEDULING,
    STOP_TOKEN,
    TOKENS,
    prompts_of,
    read_journal,
)

FORMAT = "vllm-run-record/1"
MOONCAKE_TRACE = "mooncake/conversation_trace.jsonl.gz"

_ROW = (
    "step",
    "decided",
    "schedule_end",
    "output_ready",
    "end",
    "gone",
    "new",
    "chunks",
    "preempted",
    "waiting",
    "running",
    "free",
    "emitted",
    "launched",
)
_COPIED_SETTINGS = (*SCHEDULING, "max_model_len", "block_size", "enable_prefix_caching")
_STEPS_OF_A_PROFILE = 13


def load_deciders(path: Path, traces: Path | None = None) -> list[RunRecord]:
    """The record of a run, see `load_run`; of a fleet those of its replicas, as each of them decides.

    Raises:
        InputError: one cannot be read.
    """
    return load_replicas(path) if is_fleet(path) else [load_run(path, traces)]


def load_run(path: Path, traces: Path | None = None) -> RunRecord:
    """Read the run record in the folder `path`: ours, a fleet's, or a vLLM step log.

    Args:
        traces: folder of the public traces, for a log whose prompts are those of one (see `read_vllm_record`).

    Raises:
        InputError: it cannot be read as either.
    """
    if is_step_log(path):
        return read_vllm_record(path, traces)
    return load_fleet(path) if is_fleet(path) else load_record(path)


def is_step_log(path: Path) -> bool:
    """Is there a vLLM's step log in a folder, or the journal of one?"""
    if (path / JOURNAL).is_file():
        return True
    if not (path / "run.json").is_file():
        return False
    content = json_file(path / "run.json")
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_vllm_record(path: Path, traces: Path | None = None) -> RunRecord:
    """Read a vLLM step log as a run record.

    Facts of a decision: `seen` counts the requests queued by then, `committed` is the last step whose output had been
    processed, `aborted` what the recorder's loop had aborted: at the end of the run whatever was left, and in a
    profile each batch of decodes once it had taken its steps.

    Args:
        traces: folder that holds `MOONCAKE_TRACE`; needed where prompts share prefixes of that trace.

    Raises:
        InputError: a file is missing or broken, or the run used what the policies do not have.
    """
    is_journal = (path / JOURNAL).is_file()
    try:
        run, requests, logged = read_journal(path) if is_journal else _read_log(path)
        log = _Log(run, requests, logged, path)
        outputs = log.made_up_tokens() if is_journal else {}
        rows = log.request_rows(prompts_of(requests, outputs) if is_journal else _prompts(run, requests, path, traces))
        steps = log.steps
        for name, found in () if is_journal else (("steps", len(steps)), ("requests", len(requests))):
            if found != run["summary"][name]:
                problem = f"the log is not whole: it ends here after {found} {name}, expected {run['summary'][name]}"
                raise InputError(f"{problem}, as run.json has it", path=path / f"{name}.jsonl.gz", line=found)
        whole = {
            "schema": SCHEMA,
            "world": "real",
            "settings": _settings(run["settings"], path),
            "facts": _facts(run, path),
            "device": f"vLLM {run['settings']['vllm']} on {run['settings']['gpu'].split(',')[0]}",
            "versions": {name: run["settings"][name] for name in ("vllm", "torch", "triton", "python")},
            # When a step started on the device is not in a log.
            "summary": summarize(rows, steps, world="real", wall_s=run["wall_s"]) | {"device_wait_share": None},
        }
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"expected a step log of format {FORMAT!r}, but {error!r}", path=path) from error
    return RunRecord(path, whole, rows, steps, outputs)


def requests_of(record: RunRecord) -> list[Request]:
    """The requests of a run as a trace to replay; an answer that was stopped is as long as it was."""
    requests = []
    for row in record.requests:
        most = row["output_tokens"] if row["finish_reason"] == "stop" else row["max_tokens"]
        prompt, labels = tuple(Part(*part) for part in row["prompt"]), {"priority": row.get("priority", 0)}
        requests.append(Request(row["id"], row["arrival_ns"], prompt, most, **labels))
    return requests


def _read_log(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], Iterator[dict[str, Any]]]:
    """The three files of a step log."""
    run = json_file(path / "run.json")
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise InputError(f"expected a step log of format {FORMAT!r}", path=path / "run.json")
    requests = [line.values for line in json_lines_file(path / "requests.jsonl.gz")]
    return run, requests, _step_rows(path / "steps.jsonl.gz")


def _step_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows as dicts; `launched` is None where it was not recorded."""
    with Content(path) as content:
        for number, text in enumerate(content, 1):
            values = json_value(text, path, number)
            if not isinstance(values, list) or not len(_ROW) - 1 <= len(values) <= len(_ROW):
                raise InputError(f"expected a list of {len(_ROW) - 1} or {len(_ROW)} values", path=path, line=number)
            yield dict(zip(_ROW, [*values, None][: len(_ROW)], strict=True))


def _settings(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Our settings for vLLM's; `num_gpu_blocks` without the block that it never gives out."""
    if found["policy"] != "fcfs" and not (path / JOURNAL).is_file():  # a log does not say how urgent a request is
        raise InputError("expected 'fcfs'", path=path / "run.json", field="settings.policy", value=found["policy"])
    newer = {name: found[name] for name in NEWER_SCHEDULING if name in found}
    return (
        newer
        | {name: found[name] for name in _COPIED_SETTINGS}
        | {
            "scheduling_policy": found["policy"],
            "vllm_version": nearest_version(found["vllm"]),
            "num_gpu_blocks": found["num_gpu_blocks"] - 1,
            "pipeline_depth": found["max_concurrent_batches"] - 1,
        }
    )


def _facts(run: dict[str, Any], path: Path) -> dict[str, Any]:
    return {
        "trace": {
            "path": run["name"],
            "format": FORMAT,
            "sha256": run["sha256"]["requests.jsonl.gz"],
            "notes": [run["workload"]],
            "transforms": [],
        },
        "eos_token_id": None,
        "tokens": TOKENS if run["kind"] == KIND else None,
        "captured_tokens": max(run["settings"]["cudagraph_capture_sizes"], default=0),
        "source": {name: run.get(name) for name in ("name", "kind", "process", "machine", "seconds", "rate_per_s")},
    }


def _prompts(run: dict[str, Any], requests: list[dict], path: Path, traces: Path | None) -> list[list[list[int]]]:
    """The parts of each prompt: a text of its own, or the first tokens of a row of the Mooncake trace."""
    if run["kind"] != "mooncake":
        return [[[row["i"], 0, row["prompt"]]] for row in requests]
    trace = None if traces is None else traces / MOONCAKE_TRACE
    if trace is None or not trace.is_file():
        raise InputError(
            f"its prompts are those of the Mooncake conversation trace: expected {MOONCAKE_TRACE} in the folder of "
            "public traces (--traces or TWINSERVE_TRACES)",
            path=path,
        )
    first = run["trace_rows"][0]
    rows = read_trace(trace).requests[first : first + len(requests)]
    return [_first_tokens(row.parts, logged["prompt"]) for row, logged in zip(rows, requests, strict=True)]


def _first_tokens(parts: Seq[Part], length: int) -> list[list[int]]:
    kept = []
    for text, start, available in parts:
        taken = min(available, length)
        if taken:
            kept.append([text, start, taken])
        length -= taken
    if length:
        raise InputError(f"a prompt of the log is {length} tokens longer than its row of the trace")
    return kept


class _Log:
    """Follows a step log row by row and says each decision in terms of the one before.

    A carried row that goes on where it stopped, in the order of admission, is as expected. From the first row on that
    does not (an admission, in a true log) all rows of the step are `admitted`, so nothing that was logged is lost.
    """

    def __init__(self, run: dict[str, Any], requests: list[dict], rows: Iterable[dict[str, Any]], path: Path):
        self.steps: list[dict[str, Any]] = []
        self._requests = requests
        self._num_usable = run["settings"]["num_gpu_blocks"] - 1
        longest = run["settings"]["max_model_len"]
        self._reached = [0] * len(requests)  # computed tokens after the last step
        self._target = [row["prompt"] for row in requests]  # known tokens and those in flight
        self._final = [min(row["prompt"] + row["max_tokens"], longest) for row in requests]
        self._running: dict[int, int] = {}  # to its place in the order of admission
        self._places = count()
        self._order: list[int] = []
        self._prompting: set[int] = set()
        self._gone: set[int] = set()  # aborted
        self._sampling: dict[int, list[int]] = {}  # of steps not committed
        self._ending: dict[int, list[int]] = defaultdict(list)
        self._num_committed = self._num_seen = 0
        self._first_scheduled: dict[int, int] = {}
        self._outputs = [0] * len(requests)
        self._cached: dict[int, int] = {}
        self._first_token: dict[int, int] = {}
        self._stopped: dict[int, list[int]] = {}  # by the step whose output ended them otherwise than by their length
        is_journal = run["kind"] == KIND
        self._abortions: _Abortions | _LoggedAborts = (
            _LoggedAborts(requests) if is_journal else _Abortions(run, requests)
        )
        for number, row in enumerate(rows):
            if row["step"] != number:
                raise InputError(f"expected step {number}", path=path, field="step", value=row["step"])
            self._follow(number, row)
        if not is_journal:  # whose last outputs were taken; in other logs what is left is aborted before that
            self._gone.update(row["i"] for row in requests if row["finish"] is None)
        while self._num_committed < len(self.steps):
            self._commit()

    def _follow(self, number: int, row: dict[str, Any]) -> None:
        decided_ns = _ns(row["decided"])
        left: list[int] = []
        while self._num_committed < number and self.steps[self._num_committed]["end_ns"] <= decided_ns:
            left += self._commit()
        while self._num_seen < len(self._requests) and self._requests[self._num_seen]["queued"] <= row["decided"]:
            self._num_seen += 1
        aborted = self._abortions.before(row["decided"], self._num_committed - 1, self._num_seen)
        self._gone.update(aborted)
        left += [i for i in aborted if self._running.pop(i, None) is not None]
        for i in row["preempted"]:
            self._running.pop(i, None)
            self._prompting.discard(i)
        self._stopped[number] = row.get("stopped", [])
        self.steps.append(
            {
                "decision": number,
                "seen": self._num_seen,
                "aborted": aborted,
                "committed": self._num_committed - 1,
                "decided_ns": decided_ns,
                "start_ns": _ns(row["schedule_end"] if row["launched"] is None else row["launched"]),
                "end_ns": _ns(row["end"]),
                "count": 1,
                "schedule_end_ns": _ns(row["schedule_end"]),
                "launched_ns": None if row["launched"] is None else _ns(row["launched"]),
                "output_ready_ns": _ns(row["output_ready"]),
                "left": left,
                "preempted": row["preempted"],
                **self._rows(number, row),
                "used_blocks": self._num_usable - row["free"],
                "waiting": row["waiting"],
                "running": row["running"],
            }
        )
        self._abortions.decided(number, self.steps[-1], row["emitted"])

    def _rows(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        """What is admitted, which rows are not the usual, and the totals."""
        gone, chunks = set(row["gone"]), dict(row["chunks"])
        order = [i for i in self._order if i not in gone]
        num_before = len(self._running)
        exceptions: list[list[int]] = []
        admitted: list[list[int]] = []
        place = self._running.get(order[-1], -1) if order else -1
        totals = dict.fromkeys(("tokens", "prompt_tokens", "kv_tokens", "attention_pairs"), 0)
        sampling: list[int] = []
        expected = [(i, self._reached[i], chunks.get(i, 1)) for i in order]
        scheduled = set(order)
        for i, num_tokens, start in row["new"]:
            if admitted or self._running.get(i, -1) <= place or start != self._reached[i]:
                if i not in self._running:
                    self._cached.setdefault(i, start)
                    self._first_scheduled.setdefault(i, _ns(row["decided"]))
                    self._prompting.add(i)
                self._running[i] = next(self._places)
                admitted.append([i, start, num_tokens, 0])
            else:
                place = self._running[i]
                expected.append((i, start, num_tokens))
            scheduled.add(i)
            order.append(i)
        self._order = order
        for index, (i, start, num_tokens) in enumerate(expected + [tuple(entry[:3]) for entry in admitted]):
            end = self._reached[i] = start + num_tokens
            samples = end == self._target[i]
            is_prompt = i in self._prompting
            totals["tokens"] += num_tokens
            totals["kv_tokens"] += end
            if is_prompt:
                totals["prompt_tokens"] += num_tokens
                totals["attention_pairs"] += start * num_tokens + num_tokens * (num_tokens + 1) // 2
            else:
                totals["attention_pairs"] += end
            if samples:
                self._prompting.discard(i)
                sampling.append(i)
                self._target[i] += 1
                if self._target[i] == self._final[i]:
                    self._ending[number].append(i)
            if index >= len(expected):
                admitted[index - len(expected)][3] = int(samples)
            elif num_tokens != 1 or not samples:
                exceptions.append([i, num_tokens, int(samples)])
        if len(expected) < num_before:
            fresh = {entry[0] for entry in admitted}
            exceptions += [[i, 0, 0] for i in self._running if i not in scheduled and i not in fresh]
            exceptions.sort(key=lambda entry: self._running.get(entry[0], -1))
        self._sampling[number] = sampling
        return {
            "admitted": admitted,
            "usual": 1,
            "rows": exceptions,
            **totals,
            "decode_tokens": totals["tokens"] - totals["prompt_tokens"],
            "sampled": row["emitted"],
        }

    def _commit(self) -> list[int]:
        """Take the tokens of the oldest step; the running requests that end with it.

        A token of a request that was aborted while the step was in flight was sampled, but not emitted.
        """
        number = self._num_committed
        self._num_committed += 1
        sampling = self._sampling.pop(number)
        for i in sampling:
            if i in self._gone:
                self.steps[number]["sampled"] += 1
            else:
                self._outputs[i] += 1
                self._first_token.setdefault(i, self.steps[number]["end_ns"])
        ending = {*self._ending.pop(number, ()), *self._stopped[number]}
        ended = [i for i in sampling if i in ending and i not in self._gone]
        self._gone.update(self._stopped[number])
        return [i for i in ended if self._running.pop(i, None) is not None]

    def made_up_tokens(self) -> dict[int, list[int]]:
        """Generated tokens that are all different, but for the last one where an answer was stopped."""
        first = TOKENS["vocab_size"]
        outputs = {}
        for row, length in zip(self._requests, self._outputs, strict=True):
            tokens = list(range(first, first + length))
            first += length
            outputs[row["i"]] = [*tokens[:-1], STOP_TOKEN] if row["reason"] == "stop" else tokens
        return outputs

    def request_rows(self, prompts: list[list[list[int]]]) -> list[dict[str, Any]]:
        """The rows of the requests."""
        rows = []
        for row, prompt in zip(self._requests, prompts, strict=True):
            i, finished = row["i"], row["finish"] is not None
            rows.append(
                {
                    "id": i,
                    "ingest": i,
                    "session": None,
                    "after": None,
                    "arrival_ns": _ns(row["arrival"]),
                    "ingested_ns": _ns(row["queued"]),
                    "first_scheduled_ns": self._first_scheduled.get(i),
                    "first_token_ns": self._first_token.get(i)
                    if row["first_token"] is None
                    else _ns(row["first_token"]),
                    "finish_ns": _ns(row["finish"]) if finished else None,
                    "prompt_tokens": row["prompt"],
                    "max_tokens": row["max_tokens"],
                    "output_tokens": self._outputs[i] if row["output"] is None else row["output"],
                    "cached_tokens": self._cached.get(i, 0) if row["cached"] is None else row["cached"],
                    "preemptions": row["preemptions"],
                    "finish_reason": row.get("reason", "length") if finished else "abort",
                    "refusal": None,
                    "prompt": prompt,
                    "ignore_eos": row.get("reason") != "stop",
                    "stop_token_ids": [STOP_TOKEN] if row.get("reason") == "stop" else [],
                }
            )
            if row.get("priority"):
                rows[-1]["priority"] = row["priority"]
        return rows


class _LoggedAborts:
    """Which requests were aborted before a decision, where the log says when."""

    def __init__(self, requests: list[dict]):
        self._coming = sorted((row["aborted"], row["i"]) for row in requests if row["aborted"] is not None)

    def decided(self, number: int, step: dict[str, Any], emitted: int) -> None:
        """A step is logged, which tells nothing here."""

    def before(self, decided_s: float, committed: int, num_seen: int) -> list[int]:
        """Requests aborted since the decision before."""
        aborted = []
        while self._coming and self._coming[0][0] <= decided_s:
            aborted.append(self._coming.pop(0)[1])
        return aborted


class _Abortions:
    """Which requests the recorder's loop had aborted before a decision.

    In a profile a batch of decodes is aborted after the update of the step in which each got a token alone for the
    13th time. In other runs what is left is aborted when the run ends.
    """

    def __init__(self, run: dict[str, Any], requests: list[dict]):
        self._wall_s = run["wall_s"]
        self._unfinished = [row["i"] for row in requests if row["finish"] is None]
        parts = [part for part in run.get("parts") or () if part["part"] == "decode"]
        self._is_profile = bool(parts)
        self._parts = [(part["steps"], part["batch"], range(*part["requests"])) for part in parts]
        self._num_whole = 0
        self._last_step: int | None = None

    def decided(self, number: int, step: dict[str, Any], emitted: int) -> None:
        """Look whether a step is the last one of a profile's batch."""
        if not self._parts or self._last_step is not None:
            return
        (first, end), batch, _ = self._parts[0]
        if first <= number < end and step["tokens"] == batch == emitted and not step["prompt_tokens"]:
            self._num_whole += 1
            if self._num_whole == _STEPS_OF_A_PROFILE:
                self._last_step = number

    def before(self, decided_s: float, committed: int, num_seen: int) -> list[int]:
        """Requests aborted since the decision before."""
        if self._is_profile:
            if self._last_step is None or committed < self._last_step:
                return []
            aborted = list(self._parts.pop(0)[2])
            self._num_whole, self._last_step = 0, None
        elif decided_s < self._wall_s:
            return []
        else:
            aborted, self._unfinished = [i for i in self._unfinished if i < num_seen], []
        return aborted


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
