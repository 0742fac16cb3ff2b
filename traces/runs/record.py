"""Run records: what happened in a run (facts) and what the policies made of it (decisions), in one folder."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import platform
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from operator import sub
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import orjson
from mypy_extensions import mypyc_attr

from twinserve.policies import IS_COMPILED, Batch, CoreListener, SamplingParams, Sequence
from twinserve.policies.core import Growth, Span
from twinserve.settings.build_core import BY_HAND
from twinserve.settings.errors import InputError
from twinserve.settings.files import Nowhere, WholeFolder, refuse_endless, write_whole, writing
from twinserve.traces.formats import recorded
from twinserve.traces.formats.recorded import segments_of
from twinserve.traces.lines import Line, json_file, json_lines_file
from twinserve.traces.readers import sha256_of
from twinserve.traces.request import Request, plain
from twinserve.traces.runs.digest import Digest, Exceptions
from twinserve.traces.runs.metrics import DECODE, PREFILL, SERVED, RunMetrics, summarize, summary_of
from twinserve.traces.runs.spans import BackToBack

SCHEMA = "twinserve-run/2"
RUNNING = "running-"
"""Begins the names of a segment's files that say what ran when it ended."""
FIRST_SCHEMA = "twinserve-run/1"
"""Of records that lack when a step was launched, and how its engine pads and cuts steps."""

_SAID_BY_REQUESTS = (
    "finished",
    "refused",
    "aborted",
    "duration_s",
    "output_tok_s",
    "total_tok_s",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "cached_tokens",
    "prompt_tokens",
    "output_tokens",
    "preemptions",
)
"""Of a summary, what the requests' rows alone say."""


_SINGLE = ("aborted", "admitted", "left", "preempted", "loads", "loaded", "lost", "found", "released")
"""What a repeated decision has none of."""

_AT_ONCE = 256
"""Rows that a simulation makes together: code that has just run runs faster. One by one, a run takes a tenth longer."""


_FACTS = b'{"decision":%d,"seen":%d,"aborted":%b,"committed":%d,"decided_ns":%d,"start_ns":%d,"end_ns":%d,"count":%d,'
_DECISIONS = (
    b'"admitted":%b,"left":%b,"preempted":%b,"usual":%d,"rows":%b,"grown":%b,"tokens":%d,"prompt_tokens":%d,'
    b'"decode_tokens":%d,"kv_tokens":%d,"attention_pairs":%d,"sampled":%d,"used_blocks":%d,"waiting":%d,"running":%d,'
)
"""How a step's row begins, and its decisions; what few rows have is behind them."""


def line_of(row: dict[str, Any]) -> bytes:
    """A row as its line. With json's own encoder, rows took an eighth of a simulation's time."""
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


class Served:
    """A request that came in, while the run goes on."""

    def __init__(
        self,
        number: int,
        request: Request,
        sampling: SamplingParams,
        seq: Sequence,
        stage: str | None,
        cached_tokens: int | None,
    ):
        self.number, self.request, self.sampling, self.seq = number, request, sampling, seq
        self.stage, self.cached_tokens = stage, cached_tokens
        self.draft_tokens = self.accepted_tokens = 0
        self.has_begun = False


class Decided:
    """A decision whose row is not written yet, and those that repeat it."""

    def __init__(self, batch: Batch, digest: int, exceptions: Exceptions):
        self.batch, self.digest, self.exceptions = batch, digest, exceptions
        self.spans: Seq[Span] = ()
        self.grown: Growth = []
        self.num_ended = 0

    @property
    def repeats(self) -> dict[str, Any] | None:
        """The times of the steps that repeat the first, as `single_steps` reads them, and the blocks that these took;
        None where there are none."""
        if not self.spans:
            return None
        blocks = [[number, seq.seq_id, block_ids] for number, seq, block_ids in self.grown]
        return _times_after(self.batch, self.spans) | {"grown": blocks}


@mypyc_attr(allow_interpreted_subclasses=True)
class RowMaker(CoreListener):
    """Listens to a Core and holds what the rows of its run record are made of; subclasses say what becomes of them.

    Attributes:
        rules: what decides, see `built`.
    """

    def __init__(self) -> None:
        self.rules: dict[str, str | None] = {"scheduling_policy": BY_HAND}
        self._expected: dict[int, tuple[Request, SamplingParams, str | None, int | None]] = {}
        self._served: dict[int, Served] = {}
        self._digest = Digest()
        self._decided: deque[Decided] = deque()

    def expect(
        self,
        request: Request,
        sampling: SamplingParams,
        *,
        stage: str | None = None,
        cached_tokens: int | None = None,
    ) -> None:
        """Say which request the sequence with id `request.id` will come from, before it is ingested.

        A sequence that was not expected is not recorded as a request. Any thread may call this.

        Args:
            stage: "prefill" where another replica answers behind the first token, which is then the only one here;
                "decode" on that other one.
            cached_tokens: of a "decode", tokens that were found in the prefix cache where its prompt was computed.
        """
        self._expected[request.id] = (request, sampling, stage, cached_tokens)

    # --- what a CoreListener hears ---

    def built(self, rules: dict[str, str | None]) -> None:
        """Settings have built the Core, by these rules: the record says them, whatever settings it was given.

        A Core that was built without Settings tells nothing, and so says the record.
        """
        self.rules = rules

    def ingested(self, seq: Sequence, number: int) -> None:
        """A sequence came in."""
        expected = self._expected.pop(seq.seq_id, None)
        served = None
        if expected is not None:
            request, sampling, stage, cached_tokens = expected
            served = Served(number, request, sampling, seq, stage, cached_tokens)
        if served is not None:
            self._served[seq.seq_id] = served
        self._come(number, served)

    def decided(self, batch: Batch) -> None:
        """A decision was made."""
        for row in batch.admitted:
            served = self._served.get(row.seq.seq_id)
            if served is not None and served.cached_tokens is None:
                served.cached_tokens = row.start
        self._decided.append(Decided(batch, self._digest.of(batch), self._digest.exceptions))

    def repeated(self, batch: Batch, spans: Seq[Span], grown: Growth, num_committed: int, latest: Batch) -> None:
        """The latest decision was made again: its row stands for all of them."""
        row = self._decided[-1]
        row.spans, row.grown = spans, grown
        row.digest = self._digest.grow(latest, [(seq, block_ids) for _, seq, block_ids in grown])
        row.num_ended += num_committed

    def committed(self, batch: Batch) -> None:
        """The oldest decided step has ended; a step whose start nobody wrote down counts from its decision."""
        oldest = self._decided[0]
        oldest.num_ended += 1
        for seq, made, _ in batch.runs:
            if (served := self._served.get(seq.seq_id)) is not None:
                served.draft_tokens += batch.drafts[seq]
                served.accepted_tokens += made - 1
        if oldest.num_ended <= len(oldest.spans):
            return
        self._decided.popleft()
        if not oldest.spans:
            first = oldest.batch
            first.start_ns = batch.decided_ns if batch.start_ns is None else batch.start_ns
            first.end_ns = batch.end_ns
        self._stepped(oldest)

    def finished(self, seq: Sequence) -> None:
        """A sequence has ended."""
        served = self._served.pop(seq.seq_id, None)
        if served is not None:
            self._ended(served)

    # --- what subclasses make of it ---

    def _come(self, number: int, served: Served | None) -> None:
        """The `number`-th sequence has come in; None is one that was not expected."""

    def _stepped(self, decided: Decided) -> None:
        """Steps that share a row have ended."""

    def _ended(self, served: Served) -> None:
        """A request has ended."""


@mypyc_attr(allow_interpreted_subclasses=True)
class RunRecorder(RowMaker):
    """Writes the run record of a Core as the run goes on; the folder appears, complete, at `close`.

    Until then everything lies in a sibling folder named `<out>.partial`, which `discard` removes. As a context
    manager it discards what was not closed. What it holds in memory is what is being served, a few bytes a request and
    a step for the metrics, and of a real run the generated tokens.

    Args:
        out: the folder to write; None writes nothing, and leaves the metrics.
        world: "sim" or "real"; a real run's record holds the generated tokens too.
        settings: every setting of the run; the rules among them are replaced by those that decide, see `built`.
        facts: what else a replay has to know: the trace with its sha256 and transforms, the model, seeds and so on.
        device: what executed the steps, in words.

    Attributes:
        metrics: of the run, once it is closed.
        cached_tokens: of requests whose prompts were computed here and that another replica goes on with.

    Raises:
        InputError: `out` exists, another run is writing it, or it cannot be written.
    """

    def __init__(
        self,
        out: Path | None,
        *,
        world: Literal["sim", "real"],
        settings: dict[str, Any],
        facts: dict[str, Any],
        device: str | None = None,
    ):
        super().__init__()
        self.metrics = RunMetrics()
        self.cached_tokens: dict[int, int] = {}
        self._world, self._settings, self._facts, self._device = world, settings, facts, device
        self._outputs: dict[int, dict[str, Any]] = {}
        self._folder = None if out is None else WholeFolder(Path(out))
        self._steps_file = self._open("steps.jsonl")
        self._requests_file = self._open("requests.jsonl")
        self._next_number = 0
        self._waiting: list[Served | Decided] = []
        self._most_waiting = _AT_ONCE if world == "sim" else 1
        self._lines: dict[int, bytes] = {}

    def _open(self, name: str) -> IO[bytes]:
        return Nowhere() if self._folder is None else (self._folder.partial / name).open("wb", buffering=1 << 16)

    # --- what a RowMaker makes of what it hears ---

    def _come(self, number: int, served: Served | None) -> None:
        if served is None:
            self._write_request(number, b"")
        else:
            self._later(served)

    def _stepped(self, decided: Decided) -> None:
        self._later(decided)

    def _ended(self, served: Served) -> None:
        if served.stage == PREFILL:
            self.cached_tokens[served.request.id] = served.cached_tokens or 0
        self._later(served)

    # --- the end ---

    def close(
        self,
        summary_extra: dict[str, Any] | None = None,
        derived: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Write what is left, give the folder its name, and return the summary.

        Steps that have not ended, as their replica died, are written if it is known when they would have.

        Args:
            summary_extra: joins the summary.
            derived: makes of the summary what joins it, too.
        """
        self._work_off()
        for served in self._served.values():
            self._keep(served)
        self._served.clear()
        for decided in self._decided:
            if decided.batch.end_ns is not None:
                self._write_step(decided)
        summary = summary_of(self.metrics.whole, world=self._world) | (summary_extra or {})
        if derived is not None:
            summary |= derived(summary)
        if self._folder is not None:
            self._finish(self._folder, summary)
        return summary

    def _finish(self, folder: WholeFolder, summary: dict[str, Any]) -> None:
        """Write what is known at the end, and give the folder its name."""
        with writing(folder.out):
            self._steps_file.close()
            self._requests_file.close()
            if self._world == "real":
                outputs = [row for _, row in sorted(self._outputs.items())]
                _write_lines(folder.partial / "outputs.jsonl.gz", outputs)
        finish_record(folder, run_of(self._world, self._settings | self.rules, self._facts, self._device, summary))

    def discard(self) -> None:
        """Remove what has been written; a closed record stays."""
        for file in (self._steps_file, self._requests_file):
            # What is still in its buffer may have no room on the disk.
            with suppress(OSError):
                file.close()
        if self._folder is not None:
            self._folder.discard()

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()
        if self._folder is not None and isinstance(error, OSError):
            raise InputError(f"cannot be written: {error.strerror or error}", path=self._folder.out) from error

    def _later(self, event: Served | Decided) -> None:
        """Write what a request's begin, a step or a request's end says together with others, in order; in a real run,
        whose steps would wait for that, now."""
        self._waiting.append(event)
        if len(self._waiting) >= self._most_waiting:
            self._work_off()

    def flush(self) -> None:
        """Count what has ended up to now."""
        self._work_off()

    def _work_off(self) -> None:
        """Write what is left to write."""
        for event in self._waiting:
            if isinstance(event, Decided):
                self._write_step(event)
            elif event.has_begun:
                self._keep(event)
            else:
                event.has_begun = True
                is_begun = event.stage == DECODE
                begun_ns = event.seq.first_token_ns if is_begun else None
                self.metrics.gaps.begin(event.seq.seq_id, event.seq.max_tokens - is_begun, begun_ns)
        self._waiting.clear()

    def _keep(self, served: Served) -> None:
        """Turn what is known of a request into its row."""
        row = request_row(served)
        self.metrics.request(row)
        self.metrics.gaps.end(row["id"], counts=row["finish_reason"] in SERVED)
        self._write_request(served.number, line_of(row))
        if self._world == "real":
            self._outputs[served.number] = {"id": served.request.id, "tokens": served.seq.completion_token_ids}

    def _write_request(self, number: int, line: bytes) -> None:
        """Write a request's row as soon as those of all that came in before it are there."""
        self._lines[number] = line
        while (ready := self._lines.pop(self._next_number, None)) is not None:
            self._requests_file.write(ready)
            self._next_number += 1

    def _write_step(self, decided: Decided) -> None:
        """Write a step's row, and count it."""
        repeats = decided.repeats
        self.metrics.step(decided.batch, decided.exceptions, repeats)
        self._steps_file.write(step_line(decided, repeats))


def step_line(decided: Decided, repeats: dict[str, Any] | None) -> bytes:
    """The row of a step, or of several that repeat one another, as its line.

    Args:
        repeats: see `Decided`.
    """
    batch = decided.batch
    assert batch.start_ns is not None and batch.end_ns is not None, f"step {batch.decision} has not ended"
    facts = _FACTS % (
        batch.decision,
        batch.seen,
        _ids(batch.aborted),
        batch.committed,
        batch.decided_ns,
        batch.start_ns,
        batch.end_ns,
        1 + len(decided.spans),
    )
    beside: dict[str, Any] = {}
    if batch.launched_ns is not None:
        beside["launched_ns"] = batch.launched_ns
    if batch.kv_moves:
        beside.update(batch.kv_moves)
    if batch.runs:
        beside["runs"] = [[seq.seq_id, made, kept] for seq, made, kept in batch.runs]
    if batch.proposed:
        beside["proposed"] = [[seq.seq_id, number] for seq, number in batch.proposed]
    if repeats is not None:
        beside["repeats"] = repeats
    decisions = decisions_text(batch, decided.digest, decided.exceptions)
    if not beside:
        return b"%b%b}\n" % (facts, decisions)
    return b"%b%b,%b\n" % (facts, decisions, orjson.dumps(beside, option=orjson.OPT_SERIALIZE_NUMPY)[1:])


def _times_after(batch: Batch, spans: Seq[Span]) -> dict[str, Any]:
    """The times of the steps that repeat that of `batch`, as `single_steps` reads them; long ones as columns."""
    if isinstance(spans, BackToBack) and spans.instants_ns[0] == batch.end_ns:
        return {"end_ns": spans.periods_ns, "start_ns": [spans.lag_ns]}
    decided_ns, start_ns, end_ns = zip(*spans, strict=True)
    ends = (batch.end_ns or 0, *end_ns[:-1])
    periods = list(map(sub, end_ns, ends))
    lags = set(map(sub, start_ns, ends)) if decided_ns == ends else set()
    if len(lags) == 1:
        return {"end_ns": periods, "start_ns": list(lags)}
    return {
        "decided_ns": list(map(sub, decided_ns, (batch.decided_ns, *decided_ns[:-1]))),
        "end_ns": periods,
        "start_ns": list(map(sub, start_ns, (batch.start_ns or 0, *start_ns[:-1]))),
    }


def run_of(
    world: str, settings: dict[str, Any], facts: dict[str, Any], device: str | None, summary: dict[str, Any] | None
) -> dict[str, Any]:
    """What run.json says of a run that was made here; the summary of one that goes on is not known."""
    return {
        "schema": SCHEMA,
        "world": world,
        "settings": settings,
        "facts": facts,
        "device": device,
        "versions": versions(),
        "summary": summary,
    }


def finish_record(folder: WholeFolder, run: dict[str, Any]) -> None:
    """Write run.json, and give a folder its name.

    Raises:
        InputError: it cannot be written.
    """
    with writing(folder.out):
        (folder.partial / "run.json").write_text(_run_text(run), encoding="utf-8", newline="\n")
    folder.finish()


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json, in place of one that is there.

    Raises:
        InputError: it cannot be written.
    """
    write_whole(folder / "run.json", _run_text(run), replaces=True)


def _run_text(run: dict[str, Any]) -> str:
    return json.dumps(run, indent=2, allow_nan=False) + "\n"


def write_record(record: RunRecord, out: Path) -> None:
    """Write a record that is in memory; complete or not there at all.

    Raises:
        InputError: `out` exists, another run is writing it, or it cannot be written.
    """
    with WholeFolder(out) as folder:
        with writing(out):
            _write_lines(folder.partial / "requests.jsonl", record.requests)
            _write_lines(folder.partial / "steps.jsonl", record.steps)
            if record.has_tokens:
                rows = [{"id": request_id, "tokens": tokens} for request_id, tokens in record.outputs.items()]
                _write_lines(folder.partial / "outputs.jsonl.gz", rows)
        finish_record(folder, record.run)


def decisions_text(batch: Batch, digest: int, exceptions: Exceptions) -> bytes:
    """The decisions of a step's row, as JSON's text without the braces; the digest comes last."""
    text = _DECISIONS % (
        _lists([[row.seq.seq_id, row.start, row.num_tokens, int(row.samples)] for row in batch.admitted]),
        _ids(batch.left),
        _ids(batch.preempted),
        batch.usual_tokens,
        _lists([[seq.seq_id, num_tokens, int(samples)] for seq, num_tokens, samples in exceptions]),
        _lists([[seq.seq_id, block_ids] for seq, block_ids in batch.grown]),
        batch.num_tokens,
        batch.num_prompt_tokens,
        batch.num_decode_tokens,
        batch.num_kv_tokens,
        batch.num_attention_pairs,
        batch.num_sampled,
        batch.num_used_blocks,
        batch.num_waiting,
        batch.num_running,
    )
    if batch.num_drafts_asked:
        text += b'"asked":%d,' % batch.num_drafts_asked
    if batch.drafts:
        text += b'"drafts":%b,' % _lists([[seq.seq_id, number] for seq, number in batch.drafts.items()])
    return text + b'"digest":"%016x"' % digest


def decision_fields(batch: Batch, digest: int, exceptions: Exceptions) -> dict[str, Any]:
    """The decisions of a step's row, as plain values that later steps do not change."""
    fields: dict[str, Any] = orjson.loads(b"{%b}" % decisions_text(batch, digest, exceptions))
    return fields


def _ids(seqs: list[Sequence]) -> bytes:
    return orjson.dumps([seq.seq_id for seq in seqs]) if seqs else b"[]"


def _lists(lists: list[list[Any]]) -> bytes:
    return orjson.dumps(lists) if lists else b"[]"


def single_steps(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps that a step's row stands for, as a row each; but for the last, those of several have no digest.

    `repeats` has the times of the steps that repeat the first, as differences from the step before, and the blocks that
    they took: [number of the step from 1, request, block ids]. Without `decided_ns`, each was decided when the one
    before ended, and started `start_ns[0]` after that.

    A repeated decision computes for each row as many tokens more as before, so every total but blocks follows from the
    first. A row without decisions stays so.
    """
    if row["count"] == 1:
        yield row
        return
    first = {name: value for name, value in row.items() if name != "repeats"} | {"count": 1}
    digest = first.pop("digest")
    yield first
    repeated: dict[str, Any] = {name: [] for name in _SINGLE if name in row}
    pairs = row.get("decode_tokens", 0) + sum(num_tokens**2 for _, num_tokens, _ in row.get("rows", ()))
    used_blocks = row.get("used_blocks", 0)
    grown: dict[int, list[Any]] = defaultdict(list)
    for number, seq_id, block_ids in row["repeats"]["grown"]:
        grown[number].append([seq_id, block_ids])
    for number, (decided_ns, start_ns, end_ns) in enumerate(_repeated_times(row), 1):
        used_blocks += sum(len(block_ids) for _, block_ids in grown[number])
        step = first | repeated | {"decision": row["decision"] + number, "committed": row["committed"] + number}
        step |= {"decided_ns": decided_ns, "start_ns": start_ns, "end_ns": end_ns}
        if "kv_tokens" in row:
            step["kv_tokens"] = row["kv_tokens"] + number * row["tokens"]
            step["attention_pairs"] = row["attention_pairs"] + number * pairs
            step |= {"grown": grown[number], "used_blocks": used_blocks}
        yield step | ({"digest": digest} if number == row["count"] - 1 else {})


def _repeated_times(row: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """When the steps that repeat the first were decided, started and ended."""
    times = row["repeats"]
    ends = list(accumulate(times["end_ns"], initial=row["end_ns"]))
    if "decided_ns" not in times:
        (lag,) = times["start_ns"]
        yield from zip(ends[:-1], [end + lag for end in ends[:-1]], ends[1:], strict=True)
        return
    decided, starts = (accumulate(times[name], initial=row[name]) for name in ("decided_ns", "start_ns"))
    next(decided), next(starts)
    yield from zip(decided, starts, ends[1:], strict=True)


def request_row(served: Served) -> dict[str, Any]:
    """The row of a request, as far as it is known."""
    request, seq = served.request, served.seq
    row: dict[str, Any] = {
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
        "max_tokens": seq.max_tokens,
        "output_tokens": seq.num_completion_tokens,
        "cached_tokens": served.cached_tokens or 0,
        "preemptions": seq.num_preemptions,
    }
    if served.draft_tokens:
        row["draft_tokens"], row["accepted_tokens"] = served.draft_tokens, served.accepted_tokens
    if served.stage:
        row["stage"] = served.stage
    row["finish_reason"], row["refusal"], row["prompt"] = seq.finish_reason, seq.refusal, plain(request.parts)
    row["ignore_eos"], row["stop_token_ids"] = served.sampling.ignore_eos, served.sampling.stop_token_ids
    row.update(request.labels)
    return row


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a line a row; equal rows give equal bytes, packed or not."""
    content = b"".join(map(line_of, rows))
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


@cache
def _own_version() -> str | None:
    try:
        return version("twinserve")
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of what took part; torch only where something else has imported it."""
    versions = {"python": platform.python_version(), "policies": "compiled" if IS_COMPILED else "interpreted"}
    if (own := _own_version()) is not None:
        versions["twinserve"] = own
    if "torch" in sys.modules:
        versions["torch"] = str(sys.modules["torch"].__version__)
    return versions


# --- reading ---


@cache
def _kinds() -> Any:
    """What rows are checked by, which who writes a record does without."""
    from twinserve.traces.runs import rows

    return rows


@mypyc_attr(native_class=False)  # it is copied, which a frozen native class cannot be
@dataclass(frozen=True)
class RunRecord:
    """A run record in memory.

    Attributes:
        path: the folder.
        run: world, settings, facts, device, versions and summary.
        requests: a row a request, in the order in which they came in.
        steps: a row a step, in the order of the decisions; see `single_steps`.
        outputs: the generated tokens by request id; empty for a simulation.
        prompts: the prompts' tokens by request id, where the record holds them.
    """

    path: Path
    run: dict[str, Any]
    requests: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    outputs: dict[int, list[int]]
    prompts: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    def told(self, *names: str) -> Any:
        """What its run.json says at a place, such as `told("facts", "trace", "sha256")`.

        Raises:
            InputError: it says nothing there.
        """
        value: Any = self.run
        for depth, name in enumerate(names, 1):
            if not isinstance(value, dict) or name not in value:
                raise InputError("is missing", path=self.path / "run.json", field=".".join(names[:depth]))
            value = value[name]
        return value

    @property
    def num_unanswered(self) -> int:
        """Requests that came in, and whose end is not in the record."""
        return sum(row["finish_reason"] is None for row in self.requests)

    @property
    def has_tokens(self) -> bool:
        """Are its tokens known? Not those of a simulation, nor of an engine whose record says `"tokens": null`."""
        return _has_tokens(self.run)


def load_record(path: Path) -> RunRecord:
    """Read the run record in the folder `path`.

    Decision fields other than `digest` may be missing from steps: a replay needs the facts and the digest. The record
    of another engine, whose facts name its `source`, has the other fields and no digest.

    Raises:
        InputError: a file is missing or broken, another version wrote it, a field is missing or wrong, or the files are
            not all of one run: rows are missing, say.
    """
    path = Path(path)
    run = checked_run(path / "run.json")
    pieces = segments_of(path)
    for piece in pieces:
        refuse_endless(piece)
    if run["summary"] is None and not pieces:
        raise InputError("expected an object, as there are no segments", path=path / "run.json", field="summary")
    requests = _read_requests(_in_pieces(path, pieces, "requests.jsonl"))
    steps: list[dict[str, Any]] = []
    num_rows = 0
    for piece in pieces or [path]:
        for line in json_lines_file(piece / "steps.jsonl"):
            _check_step(line, len(steps), run["facts"].get("source") is None)
            steps += single_steps(line.values)
            num_rows += 1
    if not pieces:
        _check_ends(path, run["summary"], len(requests), len(steps), num_rows)
    outputs: dict[int, list[int]] = {}
    prompts: dict[int, list[int]] = {}
    if _has_tokens(run):
        name = "outputs.jsonl" if pieces else "outputs.jsonl.gz"
        _read_outputs(_in_pieces(path, pieces, name), requests, outputs, prompts)
    rows = [line.values for line in requests]
    if not pieces:
        _check_summary(path, run["summary"], rows)
    rows.sort(key=lambda row: row["ingest"])
    if pieces:
        run["facts"]["trace"] = own_trace(path)
        run["summary"] = summarize(rows, steps, world=run["world"])
    return RunRecord(path, run, rows, steps, outputs, prompts)


def own_trace(path: Path) -> dict[str, Any]:
    """What the facts of a record of live traffic say of its trace: it is its own."""
    facts = {"path": path.name, "format": recorded.NAME, "sha256": sha256_of(recorded.request_files(path))}
    return facts | {"notes": {}, "handled": {}, "transforms": []}


def _in_pieces(path: Path, pieces: list[Path], name: str) -> list[Path]:
    """The files of a name; in segments, what ran when the last one ended lies in a file beside."""
    if not pieces:
        return [path / name]
    return [*(piece / name for piece in pieces), pieces[-1] / f"{RUNNING}{name}"]


def _read_requests(paths: list[Path]) -> list[Line]:
    """The rows of requests, checked."""
    lines: list[Line] = []
    taken: dict[str, set[int]] = {"id": set(), "ingest": set()}
    for path in paths:
        for line in json_lines_file(path):
            _check_request(line)
            lines.append(line)
            for field, values in taken.items():
                values.add(line.values[field])
                if len(values) < len(lines):
                    raise line.error("expected another one than those of the lines before", field)
    return lines


def _read_outputs(
    paths: list[Path], requests: list[Line], outputs: dict[int, list[int]], prompts: dict[int, list[int]]
) -> None:
    """Read the tokens of a run; each request has as many as its row says."""
    known = {line.values["id"] for line in requests}
    for path in paths:
        for line in json_lines_file(path):
            _kinds().check_output(line)
            request_id = line.values["id"]
            if request_id not in known or request_id in outputs:
                raise line.error("expected a request of requests.jsonl, and each once", "id")
            outputs[request_id] = line.values["tokens"]
            if "prompt" in line.values:
                prompts[request_id] = line.values["prompt"]
    for line in requests:
        request_id = line.values["id"]
        counts = [("output_tokens", len(outputs.get(request_id, ())))]
        if request_id in prompts:
            counts.append(("prompt_tokens", len(prompts[request_id])))
        for field, count in counts:
            if line.values[field] != count:
                raise line.error(f"expected {count}, the number of its tokens in {paths[0].name}", field)


def _check_ends(path: Path, summary: dict[str, Any], num_requests: int, num_steps: int, num_rows: int) -> None:
    """Hold the numbers of rows against the summary, which was written when all were there.

    Raises:
        InputError: rows are missing, or there are more.
    """
    for name, number, found, line in (
        ("steps", summary["steps"], num_steps, num_rows),
        ("requests", summary["requests"], num_requests, num_requests),
    ):
        if found != number:
            raise InputError(
                f"the record is not whole: it ends here after {found} {name}, expected {number}, as run.json has it",
                path=path / f"{name}.jsonl",
                line=line,
            )


def _check_summary(path: Path, summary: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    """Hold the summary against the requests' rows.

    Raises:
        InputError: they are not of one run.
    """
    metrics = RunMetrics()
    for row in requests:
        metrics.request(row)
    found = summary_of(metrics.whole)
    for name in _SAID_BY_REQUESTS:
        values, expected = (of[name] if isinstance(of[name], dict) else {"": of[name]} for of in (summary, found))
        for statistic, value in values.items():
            if not _is_same(value, expected[statistic]):
                raise InputError(
                    f"the record is not of one piece: expected {expected[statistic]!r}, as requests.jsonl has it",
                    path=path / "run.json",
                    field=f"summary.{name}" + (f".{statistic}" if statistic else ""),
                    value=value,
                )


def _is_same(value: float | None, expected: float | None) -> bool:
    """Are two numbers alike but for rounding?"""
    if value is None or expected is None:
        return value is expected
    return math.isclose(value, expected, rel_tol=1e-9)


def _has_tokens(run: dict[str, Any]) -> bool:
    return run["world"] == "real" and run["facts"].get("tokens", ...) is not None


def checked_run(path: Path) -> dict[str, Any]:
    """The content of a run.json.

    Raises:
        InputError: it cannot be read, or a field is missing or wrong.
    """
    refuse_endless(path.parent)
    value = json_file(path)
    if type(value) is not dict:
        raise InputError("expected a JSON object", path=path, value=value)
    if value.get("schema") not in (SCHEMA, FIRST_SCHEMA):
        problem = f"expected {SCHEMA!r} or {FIRST_SCHEMA!r}"
        raise InputError(problem, path=path, field="schema", value=value.get("schema"))
    _kinds().check_run(Line(path, None, value))
    return value


def _check_request(line: Line) -> None:
    """Check a request's row, and what its fields say of one another."""
    _kinds().check_request(line)
    row = line.values
    if row["finish_reason"] in SERVED:
        line.integer("first_token_ns", row["arrival_ns"])
        line.integer("finish_ns", row["first_token_ns"])
    length = sum([length for _, _, length in row["prompt"]])
    if row["prompt_tokens"] != length:
        raise line.error(f"expected {length}, the sum of the lengths in prompt", "prompt_tokens")


def _check_step(line: Line, decision: int, is_digested: bool) -> None:
    """Check a step's row, and what its fields say of one another."""
    _kinds().check_step(line)
    row = line.values
    if row["decision"] != decision:
        raise line.error(f"expected {decision}", "decision")
    if is_digested:
        line.get("digest")
    if row["count"] > 1:
        _check_repeats(line.child("repeats"), row["count"])
        if "kv_tokens" in row:
            for field in ("tokens", "decode_tokens", "attention_pairs", "used_blocks", "rows"):
                line.get(field)


def _check_repeats(times: Line, count: int) -> None:
    """Check that the row of several steps says as much as it stands for."""
    names = ["end_ns"]
    if "decided_ns" in times.values:
        names += ["decided_ns", "start_ns"]
    elif len(times.values["start_ns"]) != 1:
        raise times.error("expected one number, as there is no decided_ns", "start_ns")
    for name in names:
        if len(times.values[name]) != count - 1:
            raise times.error(f"expected {count - 1} numbers, one less than count", name)
    for entry in times.values["grown"]:
        if entry[0] >= count:
            raise times.error(f"expected numbers of steps below count ({count})", "grown", entry)
