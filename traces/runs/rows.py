"""The kinds of what a record's files hold, as record.schema.json describes them; checked before any of it is used."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, Strict, with_config
from typing_extensions import TypedDict

from twinserve.traces.kinds import checker
from twinserve.traces.lines import LARGEST

Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# JSON has no tuples: lists of a fixed length are read as such.
Listed = Strict(False)
Part = Annotated[tuple[Whole, Natural, Positive], Listed]
Admitted = Annotated[tuple[Natural, Natural, Natural, Natural], Listed]
Exceptional = Annotated[tuple[Natural, Natural, Natural], Listed]
Drafts = Annotated[tuple[Natural, Positive], Listed]
VerifiedRun = Annotated[tuple[Natural, Positive, Natural], Listed]
Load = Annotated[tuple[Natural, Natural, Positive], Listed]
Grown = Annotated[tuple[Natural, list[Natural]], Listed]
RepeatedGrown = Annotated[tuple[Positive, Natural, list[Natural]], Listed]

_STRICT = with_config(ConfigDict(strict=True))


@_STRICT
class RequestRow(TypedDict):
    """A row of requests.jsonl."""

    id: Natural
    ingest: Natural
    session: Natural | None
    after: Natural | None
    arrival_ns: Natural
    ingested_ns: Natural
    first_scheduled_ns: Natural | None
    first_token_ns: Natural | None
    finish_ns: Natural | None
    prompt_tokens: Natural
    max_tokens: Positive
    output_tokens: Natural
    cached_tokens: Natural
    preemptions: Natural
    draft_tokens: NotRequired[Natural]
    accepted_tokens: NotRequired[Natural]
    stage: NotRequired[Literal["prefill", "decode"]]
    finish_reason: Literal["stop", "length", "abort", "refused"] | None
    refusal: str | None
    prompt: list[Part]
    ignore_eos: bool
    stop_token_ids: list[Natural]
    priority: NotRequired[Whole]
    salt: NotRequired[str]
    tenant: NotRequired[str]


@_STRICT
class Repeats(TypedDict):
    """What a row of several steps says of those that repeat the first."""

    end_ns: list[Natural]
    decided_ns: NotRequired[list[Natural]]
    start_ns: list[Natural]
    grown: list[RepeatedGrown]


@_STRICT
class StepRow(TypedDict):
    """A row of steps.jsonl; of the decisions, those that are there."""

    decision: Natural
    seen: Natural
    aborted: list[Natural]
    committed: Annotated[int, Field(ge=-1, le=LARGEST)]
    decided_ns: Natural
    start_ns: Natural
    end_ns: Natural
    count: Positive
    launched_ns: NotRequired[Natural | None]
    schedule_end_ns: NotRequired[Natural]
    output_ready_ns: NotRequired[Natural]
    loads: NotRequired[list[Load]]
    loaded: NotRequired[list[Natural]]
    lost: NotRequired[list[Natural]]
    found: NotRequired[list[Natural]]
    released: NotRequired[list[Natural]]
    repeats: NotRequired[Repeats]
    admitted: NotRequired[list[Admitted]]
    left: NotRequired[list[Natural]]
    preempted: NotRequired[list[Natural]]
    usual: NotRequired[Annotated[int, Field(ge=0, le=1)]]
    rows: NotRequired[list[Exceptional]]
    grown: NotRequired[list[Grown]]
    tokens: NotRequired[Natural]
    prompt_tokens: NotRequired[Natural]
    decode_tokens: NotRequired[Natural]
    kv_tokens: NotRequired[Natural]
    attention_pairs: NotRequired[Natural]
    sampled: NotRequired[Natural]
    used_blocks: NotRequired[Natural]
    waiting: NotRequired[Natural]
    running: NotRequired[Natural]
    asked: NotRequired[Positive]
    drafts: NotRequired[list[Drafts]]
    runs: NotRequired[list[VerifiedRun]]
    proposed: NotRequired[list[Drafts]]
    digest: NotRequired[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]]


@_STRICT
class OutputRow(TypedDict):
    """A row of outputs.jsonl.gz."""

    id: Natural
    tokens: list[Natural]
    prompt: NotRequired[list[Natural]]


@_STRICT
class Distribution(TypedDict):
    """Mean and percentiles, in seconds; None where there were no values."""

    mean: Number | None
    p50: Number | None
    p90: Number | None
    p95: NotRequired[Number | None]
    p99: Number | None


@_STRICT
class SpeculationSummary(TypedDict):
    """What came of the drafts of a run, see `metrics.DraftCounts`."""

    drafts: Natural
    draft_tokens: Natural
    accepted_tokens: Natural
    wasted_tokens: Natural
    acceptance_rate: Number
    acceptance_by_position: list[Number]
    tokens_per_step: Number


@_STRICT
class Summary(TypedDict):
    """The metrics of a run, see `metrics.summary_of`; what older records lack is not required."""

    requests: Natural
    finished: Natural
    refused: Natural
    aborted: Natural
    shortened: Natural
    duration_s: Number | None
    output_tok_s: Number | None
    total_tok_s: Number | None
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    e2e_s: Distribution
    cached_tokens: Natural
    prompt_tokens: Natural
    output_tokens: Natural
    preemptions: Natural
    steps: Natural
    device_wait_share: NotRequired[Number | None]
    capped: NotRequired[Natural]
    dropped: NotRequired[Natural]
    retries: NotRequired[Natural]
    handed_over: NotRequired[Natural]
    rejected: NotRequired[Natural]
    timed_out: NotRequired[Natural]
    speculation: NotRequired[SpeculationSummary]


@_STRICT
class Tokens(TypedDict):
    """What makes the prompts' tokens, see `TokenMaker`."""

    vocab_size: Positive
    first_id: NotRequired[Natural]
    seed: NotRequired[Natural]


@_STRICT
class TraceFacts(TypedDict):
    """Which requests were replayed."""

    sha256: NotRequired[str]
    transforms: NotRequired[list[dict[str, Any]]]


@_STRICT
class Facts(TypedDict):
    """Of the facts, those that code reads."""

    trace: NotRequired[TraceFacts]
    tokens: NotRequired[Tokens | None]
    eos_token_id: NotRequired[Natural | list[Natural] | None]
    source: NotRequired[dict[str, Any] | None]
    captured_tokens: NotRequired[Natural | None]
    shape: NotRequired[dict[str, Any]]
    kernels: NotRequired[dict[str, Any]]


@_STRICT
class Run(TypedDict):
    """A run.json; that of live traffic, which lies in segments, has no summary."""

    world: Literal["sim", "real"]
    settings: dict[str, Any]
    facts: Facts
    device: str | None
    versions: dict[str, str]
    summary: Summary | None


check_request = checker(RequestRow)
check_step = checker(StepRow)
check_output = checker(OutputRow)
check_run = checker(Run)
