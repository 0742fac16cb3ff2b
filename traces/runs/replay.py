"""Replay: decide a recorded run again from its facts alone, and say where it first differs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from twinserve.orders import Loading
from twinserve.policies import Batch, Core, CoreListener, Runs, SamplingParams, Sequence
from twinserve.policies.orders import Order
from twinserve.settings.build_core import BY_HAND, Settings
from twinserve.settings.errors import InputError
from twinserve.settings.own_class import RULES
from twinserve.traces.lines import LABELS
from twinserve.traces.request import Part, Request, TokenMaker
from twinserve.traces.runs.digest import Digest, exceptions_of
from twinserve.traces.runs.metrics import DECODE, PREFILL
from twinserve.traces.runs.record import RunRecord, decision_fields


@dataclass(frozen=True)
class Difference:
    """The first difference between a replay and the record."""

    decision: int
    field: str
    recorded: Any
    replayed: Any

    def __str__(self) -> str:
        return f"decision {self.decision}: {self.field} is {self.replayed}, the record has {self.recorded}"


@dataclass(frozen=True)
class ReplayResult:
    """Decisions made again equal to the record's, decisions in the record, and the first difference, if any.

    Attributes:
        unanswered: requests that came in, and whose end is not in the record.
    """

    equal: int
    recorded: int
    difference: Difference | None
    unanswered: int = 0

    @property
    def is_exact(self) -> bool:
        return self.difference is None and self.equal == self.recorded


def replay(
    record: RunRecord, *, build_core: Callable[..., Core] | None = None, listener: CoreListener | None = None
) -> ReplayResult:
    """Decide a run again from its facts: settings, requests, outputs, and what each decision could see.

    Args:
        build_core: called with `eos_token_id` and `listener` in place of the recorded settings' own `build_core`.
        listener: hears the decisions as they are made again.

    Raises:
        InputError: without `build_core`, the settings cannot be used: they name a file that is not there or not the
            one that it was, or they do not name what decided.
    """
    build = build_core or settings_of(record).build_core
    source = _Loads(record)
    handed: dict[str, Any] = {"source": source} if source.are_any else {}
    digest = Digest() if any(row.get("digest") for row in record.steps) else None
    core = build(eos_token_id=record.run["facts"].get("eos_token_id"), listener=listener, **handed)
    loading = core.scheduler.waiting if handed else None
    arriving = iter(sorted(record.requests, key=lambda row: row["ingest"]))
    to_sequence = _converter(record)
    equal = 0
    for row in record.steps:
        try:
            while core.last_committed < row["committed"]:
                committing = core.in_flight[0] if core.in_flight else None
                with source.keeping(loading, committing):
                    core.commit(_recorded_output(core, committing, record), row["decided_ns"])
                if (unequal := _unequal_runs(committing, record)) is not None:
                    return ReplayResult(equal, len(record.steps), unequal)
            while core.num_ingested < row["seen"]:
                core.ingest(to_sequence(next(arriving)), row["decided_ns"])
            for seq_id in row["aborted"]:
                core.abort(seq_id, row["decided_ns"])
            if isinstance(loading, Loading):
                source.move(loading, core, row)
            batch = core.decide(row["decided_ns"])
            if isinstance(loading, Loading):
                batch.kv_moves = loading.take_moves()
        except _Impossible as impossible:
            return ReplayResult(equal, len(record.steps), Difference(row["decision"], *impossible.args))
        except (RuntimeError, StopIteration) as error:
            facts = {name: row[name] for name in ("seen", "committed", "aborted")}
            difference = Difference(row["decision"], "facts", facts, f"not possible ({error or 'no such request'})")
            return ReplayResult(equal, len(record.steps), difference)
        if (unfollowed := _unfollowed_fact(batch, row)) is not None:
            return ReplayResult(equal, len(record.steps), unfollowed)
        if (unequal := _first_difference(batch, row, digest.of(batch) if digest else 0)) is not None:
            return ReplayResult(equal, len(record.steps), unequal)
        equal += 1
    return ReplayResult(equal, len(record.steps), _unequal_end(core, record), record.num_unanswered)


class _Loads:
    """What the facts of a record say of KV that lay elsewhere, decision by decision.

    Attributes:
        are_any: do they say anything?
    """

    def __init__(self, record: RunRecord):
        self._stages = {row["id"]: row.get("stage") for row in record.requests}
        self._found: dict[int, int] = {}
        is_split = any(stage is not None for stage in self._stages.values())
        self.are_any = is_split or any("loads" in row for row in record.steps)

    def find(self, seq: Sequence, num_tokens: int) -> int:
        """See `twinserve.orders.loading.Source`."""
        return self._found.get(seq.seq_id, 0)

    def move(self, loading: Loading, core: Core, row: dict) -> None:
        """What had been loaded, and was released, before a decision; what it will find."""
        self._found = {seq_id: found for seq_id, _, found in row.get("loads", ())}
        for seq_id in row.get("released", ()):
            if seq_id not in loading.held:
                raise _Impossible("released", row["released"], f"{seq_id} is not held")
            loading.release(seq_id)
            core.scheduler.refusal = None
        for name, hear in loading.news:
            if name not in row:
                continue
            by_id = {seq.seq_id: seq for seq in (*loading.loading, *loading.without, *loading.order)}
            for seq_id in row[name]:
                if seq_id not in by_id:
                    raise _Impossible(name, row[name], f"{seq_id} does not load")
                hear(by_id[seq_id])
                core.scheduler.refusal = None

    def keeping(self, loading: Order | None, batch: Batch | None) -> AbstractContextManager[None]:
        """Within, a step is committed; the KV of those is kept that another replica goes on with."""
        if not isinstance(loading, Loading) or batch is None:
            return nullcontext()
        return loading.keeping(
            [seq for seq in batch.sampled if self._stages[seq.seq_id] == PREFILL and not seq.is_finished]
        )


class Hearer(CoreListener):
    """Hears records decided again.

    Args:
        also: hears each decision too.

    Attributes:
        core: what decides again the one that is heard.
    """

    core: Core

    def __init__(self, also: CoreListener | None = None):
        self._also = CoreListener() if also is None else also

    def decided(self, batch: Batch) -> None:
        self._also.decided(batch)

    def decide_again(self, record: RunRecord) -> ReplayResult:
        """Have a record decided again.

        Raises:
            InputError: its settings cannot be used, see `replay`.
        """
        settings = settings_of(record)

        def build(**options: Any) -> Core:
            self.core = settings.build_core(**options)
            return self.core

        return replay(record, build_core=build, listener=self)

    def hear(self, record: RunRecord) -> None:
        """Have a record decided again, exactly.

        Raises:
            InputError: that cannot be done, so what its decisions could see is not known.
        """
        result = self.decide_again(record)
        if not result.is_exact:
            raise InputError(f"cannot be decided again exactly: {result.difference}", path=record.path)


def _unequal_end(core: Core, record: RunRecord) -> Difference | None:
    """What is otherwise once the last steps' outputs are known, of a run in which every request was answered."""
    if record.num_unanswered or not record.steps:
        return None
    last = record.steps[-1]
    try:
        while core.in_flight:
            committing = core.in_flight[0]
            core.commit(_recorded_output(core, committing, record), last["decided_ns"])
            if (unequal := _unequal_runs(committing, record)) is not None:
                return unequal
    except _Impossible as impossible:
        return Difference(last["decision"], *impossible.args)
    left = {seq.seq_id for seq in core.scheduler.running}
    for row in record.requests:
        if row["id"] in left and row["finish_reason"] != "abort":
            return Difference(last["decision"], f"end of request {row['id']}", row["finish_reason"], "goes on")
    return None


def settings_of(record: RunRecord) -> Settings:
    """The settings of a record, if they name all that decided.

    Raises:
        InputError: they do not, or cannot be used.
    """
    path, settings = record.path / "run.json", record.run["settings"]
    for name in RULES:
        if str(settings.get(name)).startswith(BY_HAND):
            problem = "expected a class that settings can name: replay() takes this one as build_core"
            raise InputError(problem, path=path, field=f"settings.{name}", value=settings[name])
    return Settings.recorded(settings, path)


class _Impossible(Exception):
    """The facts ask for something that the replay cannot do: (field, recorded, replayed)."""


def _converter(record: RunRecord) -> Callable[[dict], Sequence]:
    """From a request's row to its Sequence: with tokens where the run's are known, without for a simulation."""
    maker = TokenMaker(**record.told("facts", "tokens")) if record.has_tokens else None

    def convert(row: dict) -> Sequence:
        parts = tuple(Part(*part) for part in row["prompt"])
        labels = {name: row[name] for name in LABELS if name in row}
        request = Request(
            row["id"], row["arrival_ns"], parts, row["max_tokens"], row["session"], row["after"], **labels
        )
        # Before ignore_eos left them alone, records said stop tokens that it had switched off.
        stops = () if row["ignore_eos"] and row["finish_reason"] != "stop" else tuple(row["stop_token_ids"])
        params = SamplingParams(ignore_eos=row["ignore_eos"], stop_token_ids=stops)
        if maker is None:
            seq = request.to_sequence(params)
            if row.get("stage") == DECODE:
                seq.append_token(None)  # the first token, as it was generated with the prompt
                seq.first_token_ns = row["first_token_ns"]
            return seq
        try:
            token_ids = record.prompts.get(request.id) or maker.token_ids(request, record.outputs)
            return request.to_sequence(params, token_ids)
        except (LookupError, ValueError) as error:
            raise InputError(
                f"expected parts of texts and of answers that the record has, for request {request.id}",
                path=record.path / "requests.jsonl",
                field="prompt",
                value=row["prompt"],
            ) from error

    return convert


def _recorded_output(core: Core, batch: Batch | None, record: RunRecord) -> Runs | list[int] | None:
    """What came out of a step, as `Core.commit` takes it."""
    if batch is None or not core.scheduler.speculation.most:
        return _recorded_tokens(batch, record)
    row = record.steps[batch.decision]
    made = {seq_id: number for seq_id, number, _ in row.get("runs", ())}
    proposed = dict(row.get("proposed", ()))
    lengths = [made.get(seq.seq_id, 1) for seq in batch.sampled]
    for seq, length in zip(batch.sampled, lengths, strict=True):
        most = 1 + batch.drafts.get(seq, 0)
        if length > most:
            raise _Impossible(f"runs of request {seq.seq_id}", length, f"at most {most}")
    tokens: list[int] | None = None
    if record.has_tokens:
        tokens = []
        for seq, length in zip(batch.sampled, lengths, strict=True):
            known = [] if seq.is_finished else record.outputs[seq.seq_id][seq.num_completion_tokens :][:length]
            if not (known or seq.is_finished):
                raise _Impossible(f"tokens of request {seq.seq_id}", f"{seq.num_completion_tokens} of them", "one more")
            tokens += known + [0] * (length - len(known))  # any token where it was thrown away
    is_async = core.scheduler.speculation.is_async
    return Runs(tokens, lengths, None if is_async else [proposed.get(seq.seq_id, 0) for seq in batch.sampled])


def _unequal_runs(batch: Batch | None, record: RunRecord) -> Difference | None:
    """The first step whose runs were kept otherwise than recorded, if this is one."""
    if batch is None:
        return None
    replayed = [[seq.seq_id, made, kept] for seq, made, kept in batch.runs]
    recorded = [list(run) for run in record.steps[batch.decision].get("runs", [])]
    if replayed == recorded:
        return None
    return Difference(batch.decision, "runs", recorded, replayed)


def _recorded_tokens(batch: Batch | None, record: RunRecord) -> list[int] | None:
    """The tokens that came out of a step; any token where it was discarded."""
    if batch is None or not record.has_tokens:
        return None
    tokens = []
    for seq in batch.sampled:
        recorded, position = record.outputs[seq.seq_id], seq.num_completion_tokens
        if seq.is_finished:
            tokens.append(0)
        elif position < len(recorded):
            tokens.append(recorded[position])
        else:
            raise _Impossible(f"tokens of request {seq.seq_id}", f"{len(recorded)} of them", f"one more at {position}")
    return tokens


def _unfollowed_fact(batch: Batch, row: dict) -> Difference | None:
    """The first fact of a decision that could not be followed, such as fewer requests seen than before."""
    followed = {"seen": batch.seen, "aborted": [seq.seq_id for seq in batch.aborted], "committed": batch.committed}
    followed |= {name: batch.kv_moves.get(name, []) for name in ("loads", "loaded", "lost", "found", "released")}
    for field, value in followed.items():
        recorded = row.get(field, [])
        if recorded != value:
            return Difference(batch.decision, field, recorded, value)
    return None


def _first_difference(batch: Batch, row: dict, digest: int) -> Difference | None:
    """The first field of a decision that differs from the record, as far as the record keeps it."""
    for field, value in decision_fields(batch, digest, exceptions_of(batch)).items():
        if field in row and row[field] != value:
            return Difference(batch.decision, field, row[field], value)
    return None
