"""Run records: what happened in a run (facts) and what the policies made of it (decisions), in one folder."""

from __future__ import annotations

import gzip
import json
import platform
import re
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from twinserve.policies import Batch, CoreListener, SamplingParams, Sequence
from twinserve.policies.core import Span
from twinserve.policies.horizon import Grown
from twinserve.traces.digest import Digest, exceptions_of
from twinserve.traces.errors import InputError
from twinserve.traces.lines import Line, json_file, json_lines_file
from twinserve.traces.metrics import STEP_FIELDS, summarize
from twinserve.traces.request import Request

SCHEMA = "twinserve-run/1"

_SERVED = ("stop", "length")
_TOTALS = (
    "usual",
    "tokens",
    "prompt_tokens",
    "decode_tokens",
    "kv_tokens",
    "attention_pairs",
    "sampled",
    "used_blocks",
    "waiting",
    "running",
)

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(slots=True)
class _Served:
    """A request that came in, while the run goes on."""

    number: int
    request: Request
    sampling: SamplingParams
    seq: Sequence
    cached_tokens: int | None = None


class RunRecorder(CoreListener):
    """Listens to a Core and writes its run record; the folder appears, complete, at `close`.

    Until then everything lies in a sibling folder named `<out>.partial`, which `discard` removes. As a context
    manager it discards what was not closed.

    Args:
        out: the folder to write.
        world: "sim" or "real"; a real run's record holds the generated tokens too.
        settings: every setting of the run.
        facts: what else a replay has to know: the trace with its sha256 and transforms, the model, seeds and so on.
        device: what executed the steps, in words.

    Raises:
        InputError: `out` exists, another run is writing it, or it cannot be written.
    """

    def __init__(
        self,
        out: Path,
        *,
        world: Literal["sim", "real"],
        settings: dict[str, Any],
        facts: dict[str, Any],
        device: str | None = None,
    ):
        self._out = Path(out)
        self._world, self._settings, self._facts, self._device = world, settings, facts, device
        self._expected: dict[int, tuple[Request, SamplingParams]] = {}
        self._served: dict[int, _Served] = {}
        self._request_rows: dict[int, dict[str, Any]] = {}
        self._outputs: dict[int, dict[str, Any]] = {}
        self._digest = Digest()
        self._decided: deque[dict[str, Any]] = deque()
        self._num_ended = 0
        self._num_rows = 0
        self._summarized: list[dict[str, Any]] = []
        self._partial = _make_partial(self._out)
        self._steps_file = (self._partial / "steps.jsonl").open("w", encoding="utf-8", newline="\n")

    def expect(self, request: Request, sampling: SamplingParams) -> None:
        """Say which request the sequence with id `request.id` will come from, before it is ingested.

        A sequence that was not expected is not recorded as a request. Any thread may call this.
        """
        self._expected[request.id] = (request, sampling)

    # --- what a CoreListener hears ---

    def ingested(self, seq: Sequence, number: int) -> None:
        """A sequence came in."""
        expected = self._expected.pop(seq.seq_id, None)
        if expected is not None:
            self._served[seq.seq_id] = _Served(number, *expected, seq)

    def decided(self, batch: Batch) -> None:
        """A decision was made; what later steps would change is copied now."""
        for row in batch.admitted:
            served = self._served.get(row.seq.seq_id)
            if served is not None and served.cached_tokens is None:
                served.cached_tokens = row.start
        self._decided.append(_step_row(batch, self._digest.of(batch)))

    def repeated(self, batch: Batch, spans: Seq[Span], grown: list[Grown], num_committed: int, latest: Batch) -> None:
        """The latest decision was made again: its row stands for all of them."""
        row = self._decided[-1]
        row["count"] = 1 + len(spans)
        row["start_ns"], row["end_ns"] = batch.start_ns, batch.end_ns
        row["repeats"] = [
            [*span, [[seq.seq_id, block_ids] for seq, block_ids in blocks]]
            for span, blocks in zip(spans, grown, strict=True)
        ]
        row["digest"] = f"{self._digest.grow(latest, [pair for blocks in grown for pair in blocks]):016x}"
        self._num_ended += num_committed

    def committed(self, batch: Batch) -> None:
        """The oldest decided step has ended; a step whose start nobody wrote down counts from its decision."""
        row = self._decided[0]
        self._num_ended += 1
        if self._num_ended < row["count"]:
            return
        self._decided.popleft()
        self._num_ended = 0
        if row["count"] == 1:
            row["start_ns"] = batch.decided_ns if batch.start_ns is None else batch.start_ns
            row["end_ns"] = batch.end_ns
        self._steps_file.write(_encode(row) + "\n")
        self._num_rows += 1
        # A whole row is some 2 kB, and a long run has many of them.
        self._summarized += [{field: step[field] for field in STEP_FIELDS} for step in single_steps(row)]

    def finished(self, seq: Sequence) -> None:
        """A sequence has ended."""
        served = self._served.pop(seq.seq_id, None)
        if served is not None:
            self._keep(served)

    # --- the end ---

    def close(self, summary_extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write what is left, give the folder its name, and return the summary.

        Args:
            summary_extra: joins the summary. Its `shortened` is added to the requests that `summarize` counts as
                shortened; any other value goes in as it is.
        """
        for served in self._served.values():
            self._keep(served)
        self._served.clear()
        rows = [row for _, row in sorted(self._request_rows.items())]
        summary = summarize(rows, self._summarized, world=self._world)
        extra = summary_extra or {}
        summary |= {"events": self._num_rows} | extra | {"shortened": summary["shortened"] + extra.get("shortened", 0)}
        self._steps_file.close()
        _write_lines(self._partial / "requests.jsonl", rows)
        if self._world == "real":
            outputs = [row for _, row in sorted(self._outputs.items())]
            _write_lines(self._partial / "outputs.jsonl.gz", outputs)
        run = {
            "schema": SCHEMA,
            "world": self._world,
            "settings": self._settings,
            "facts": self._facts,
            "device": self._device,
            "versions": _versions(),
            "summary": summary,
        }
        text = json.dumps(run, indent=2, allow_nan=False) + "\n"
        (self._partial / "run.json").write_text(text, encoding="utf-8", newline="\n")
        try:
            self._partial.rename(self._out)
        except OSError as error:
            raise InputError(f"cannot be created: {error.strerror}", path=self._out) from error
        return summary

    def discard(self) -> None:
        """Remove what has been written; a closed record stays."""
        self._steps_file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.discard()

    def _keep(self, served: _Served) -> None:
        """Turn what is known of a request into its row."""
        self._request_rows[served.number] = _request_row(served)
        if self._world == "real":
            self._outputs[served.number] = {"id": served.request.id, "tokens": served.seq.completion_token_ids}


def write_record(record: RunRecord, out: Path) -> None:
    """Write a record that is in memory; complete or not there at all.

    Raises:
        InputError: `out` exists, another run is writing it, or it cannot be written.
    """
    partial = _make_partial(out)
    try:
        _write_lines(partial / "requests.jsonl", record.requests)
        _write_lines(partial / "steps.jsonl", record.steps)
        if record.has_tokens:
            rows = [{"id": request_id, "tokens": tokens} for request_id, tokens in record.outputs.items()]
            _write_lines(partial / "outputs.jsonl.gz", rows)
        text = json.dumps(record.run, indent=2, allow_nan=False) + "\n"
        (partial / "run.json").write_text(text, encoding="utf-8", newline="\n")
        partial.rename(out)
    except OSError as error:
        raise InputError(f"cannot be created: {error.strerror}", path=out) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_partial(out: Path) -> Path:
    """Create the folder in which a record grows."""
    if out.exists() or out.is_symlink():
        raise InputError("exists already, expected a new folder", path=out)
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError(
            "exists already: another run is writing it, or one was killed and it can be removed", path=partial
        ) from error
    except OSError as error:
        raise InputError(f"cannot be created: {error.strerror}", path=partial) from error
    return partial


def decision_fields(batch: Batch, digest: int) -> dict[str, Any]:
    """The decisions of a step's row, as plain values that later steps do not change; the digest comes last."""
    return {
        "admitted": [[row.seq.seq_id, row.start, row.num_tokens, int(row.samples)] for row in batch.admitted],
        "left": [seq.seq_id for seq in batch.left],
        "preempted": [seq.seq_id for seq in batch.preempted],
        "usual": batch.usual_tokens,
        "rows": [[seq.seq_id, num_tokens, int(samples)] for seq, num_tokens, samples in exceptions_of(batch)],
        "grown": [[seq.seq_id, list(block_ids)] for seq, block_ids in batch.grown],
        "tokens": batch.num_tokens,
        "prompt_tokens": batch.num_prompt_tokens,
        "decode_tokens": batch.num_decode_tokens,
        "kv_tokens": batch.num_kv_tokens,
        "attention_pairs": batch.num_attention_pairs,
        "sampled": batch.num_sampled,
        "used_blocks": batch.num_used_blocks,
        "waiting": batch.num_waiting,
        "running": batch.num_running,
        "digest": f"{digest:016x}",
    }


def _step_row(batch: Batch, digest: int) -> dict[str, Any]:
    """A step's row; its start and end are not known yet."""
    return {
        "decision": batch.decision,
        "seen": batch.seen,
        "aborted": [seq.seq_id for seq in batch.aborted],
        "committed": batch.committed,
        "decided_ns": batch.decided_ns,
        "start_ns": None,
        "end_ns": None,
        "count": 1,
        **decision_fields(batch, digest),
    }


def single_steps(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps that a step's row stands for, as a row each; but for the last, those of several have no digest.

    A repeated decision computes for each row as many tokens more as before, so every total but blocks follows from the
    first. A row without decisions stays so.
    """
    if row["count"] == 1:
        yield row
        return
    first = {name: value for name, value in row.items() if name != "repeats"} | {"count": 1}
    digest = first.pop("digest")
    yield first
    repeated: dict[str, Any] = {name: [] for name in ("aborted", "admitted", "left", "preempted") if name in row}
    pairs = row.get("decode_tokens", 0) + sum(num_tokens**2 for _, num_tokens, _ in row.get("rows", ()))
    used_blocks = row.get("used_blocks", 0)
    for number, (decided_ns, start_ns, end_ns, grown) in enumerate(row["repeats"], 1):
        used_blocks += sum(len(block_ids) for _, block_ids in grown)
        step = first | repeated | {"decision": row["decision"] + number, "committed": row["committed"] + number}
        step |= {"decided_ns": decided_ns, "start_ns": start_ns, "end_ns": end_ns}
        if "kv_tokens" in row:
            step["kv_tokens"] = row["kv_tokens"] + number * row["tokens"]
            step["attention_pairs"] = row["attention_pairs"] + number * pairs
            step |= {"grown": grown, "used_blocks": used_blocks}
        yield step | ({"digest": digest} if number == len(row["repeats"]) else {})


def _request_row(served: _Served) -> dict[str, Any]:
    request, seq = served.request, served.seq
    return {
        "id": request.id,
        "ingest": served.number,
        "session": request.session,
        "after": request.after,
        "arrival_ns": request.arrival_ns,
        "ingested_ns": seq.ingested_ns,
        "first_scheduled_ns": seq.first_scheduled_ns,
        "first_token_ns": seq.first_token_ns,
        "finish_ns": seq.finish_ns,
        "prompt_tokens": seq.num_prompt_tokens,
        "max_tokens": seq.sampling_params.max_tokens,
        "output_tokens": seq.num_completion_tokens,
        "cached_tokens": served.cached_tokens or 0,
        "preemptions": seq.num_preemptions,
        "finish_reason": seq.finish_reason,
        "refusal": seq.refusal,
        "prompt": [list(part) for part in request.parts],
        "ignore_eos": served.sampling.ignore_eos,
        "stop_token_ids": list(served.sampling.stop_token_ids),
        **request.labels,
    }


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a line a row; equal rows give equal bytes, packed or not."""
    content = "".join(_encode(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _versions() -> dict[str, str]:
    """Versions of what took part; torch only where something else has imported it."""
    versions = {"python": platform.python_version()}
    with suppress(PackageNotFoundError):
        versions["twinserve"] = version("twinserve")
    if "torch" in sys.modules:
        versions["torch"] = str(sys.modules["torch"].__version__)
    return versions


# --- reading ---


@dataclass(frozen=True)
class RunRecord:
    """A run record in memory.

    Attributes:
        path: the folder.
        run: world, settings, facts, device, versions and summary.
        requests: a row a request, in the order in which they came in.
        steps: a row a step, in the order of the decisions; see `single_steps`.
        outputs: the generated tokens by request id; empty for a simulation.
    """

    path: Path
    run: dict[str, Any]
    requests: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    outputs: dict[int, list[int]]

    @property
    def has_tokens(self) -> bool:
        """Are its tokens known? Not those of a simulation, nor of an engine whose record says `"tokens": null`."""
        return _has_tokens(self.run)


def load_record(path: Path) -> RunRecord:
    """Read the run record in the folder `path`.

    Decision fields other than `digest` may be missing from steps: a replay needs the facts and the digest. The record
    of another engine, whose facts name its `source`, has the other fields and no digest.

    Raises:
        InputError: a file is missing or broken, another version wrote it, or a field is missing or wrong.
    """
    path = Path(path)
    run = _checked_run(path / "run.json")
    requests: list[dict[str, Any]] = []
    taken: dict[str, set[int]] = {"id": set(), "ingest": set()}
    for line in json_lines_file(path / "requests.jsonl"):
        _check_request(line)
        requests.append(line.values)
        for field, values in taken.items():
            values.add(line.values[field])
            if len(values) < len(requests):
                raise line.error("expected another one than those of the lines before", field)
    steps: list[dict[str, Any]] = []
    for line in json_lines_file(path / "steps.jsonl"):
        _check_step(line, len(steps), run["facts"].get("source") is None)
        steps += single_steps(line.values)
    outputs: dict[int, list[int]] = {}
    if _has_tokens(run):
        outputs = {line.integer("id"): line.integers("tokens") for line in json_lines_file(path / "outputs.jsonl.gz")}
        for number, row in enumerate(requests, 1):
            length = len(outputs.get(row["id"], ()))
            if row["output_tokens"] != length:
                line = Line(path / "requests.jsonl", number, row)
                raise line.error(f"expected {length}, the number of tokens in outputs.jsonl.gz", "output_tokens")
    requests.sort(key=lambda row: row["ingest"])
    return RunRecord(path, run, requests, steps, outputs)


def _has_tokens(run: dict[str, Any]) -> bool:
    return run["world"] == "real" and run["facts"].get("tokens", ...) is not None


def _checked_run(path: Path) -> dict[str, Any]:
    value = json_file(path)
    if type(value) is not dict:
        raise InputError("expected a JSON object", path=path, value=value)
    if value.get("schema") != SCHEMA:
        raise InputError(f"expected {SCHEMA!r}", path=path, field="schema", value=value.get("schema"))
    if value.get("world") not in ("sim", "real"):
        raise InputError("expected 'sim' or 'real'", path=path, field="world", value=value.get("world"))
    for field in ("settings", "facts"):
        if type(value.get(field)) is not dict:
            raise InputError("expected a JSON object", path=path, field=field, value=value.get(field))
    return value


def _check_request(line: Line) -> None:
    """Check every field that metrics or a replay need."""
    line.integer("ingest")
    for field in ("id", "arrival_ns", "ingested_ns", "output_tokens", "cached_tokens", "preemptions"):
        line.integer(field)
    line.integer("max_tokens", 1)
    for field in ("session", "after", "first_scheduled_ns", "first_token_ns", "finish_ns"):
        line.get(field)
        line.optional_integer(field)
    reason = line.one_of("finish_reason", (*_SERVED, "abort", "refused", None))
    if reason in _SERVED:
        line.integer("first_token_ns")
        line.integer("finish_ns")
    length = sum(part.length for part in line.parts("prompt"))
    if line.integer("prompt_tokens") != length:
        raise line.error(f"expected {length}, the sum of the lengths in prompt", "prompt_tokens")
    if not isinstance(line.get("refusal"), str | None):
        raise line.error("expected words or null", "refusal")
    line.one_of("ignore_eos", (False, True))
    line.integers("stop_token_ids")
    line.labels()


def _checked_repeats(line: Line) -> list[Any]:
    """The repeats of a step's row: [decided_ns, start_ns, end_ns, [[id, block ids], ...]] each."""
    repeats = line.values.get("repeats", [])
    if type(repeats) is not list or not all(
        type(item) is list
        and len(item) == 4
        and all(type(time_ns) is int and time_ns >= 0 for time_ns in item[:3])
        and type(item[3]) is list
        for item in repeats
    ):
        raise line.error("expected a list of [decided_ns, start_ns, end_ns, grown]", "repeats")
    return repeats


def _check_step(line: Line, decision: int, is_digested: bool) -> None:
    """Check the facts and the digest, and those of the other decision fields that are there."""
    line.one_of("decision", (decision,))
    line.integer("committed", -1)
    repeats = _checked_repeats(line)
    if line.integer("count", 1) != 1 + len(repeats):
        raise line.error(f"expected {1 + len(repeats)}, one more than there are repeats", "count")
    for field in ("seen", "decided_ns", "start_ns", "end_ns"):
        line.integer(field)
    line.integers("aborted")
    if is_digested:
        digest = line.get("digest")
        if type(digest) is not str or not re.fullmatch("[0-9a-f]{16}", digest):
            raise line.error("expected 16 hexadecimal digits", "digest", digest)
    for field in ("left", "preempted"):
        if field in line.values:
            line.integers(field)
    for field, width in (("admitted", 4), ("rows", 3)):
        if field in line.values:
            line.integer_lists(field, width)
    for field in _TOTALS:
        if field in line.values:
            line.integer(field)
