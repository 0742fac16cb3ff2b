"""The kinds of what a record's files hold, as record.schema.json describes them; checked before any of it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from twinserve.settings.errors import InputError
from twinserve.traces.lines import LARGEST, Line

Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# JSON has no tuples: lists of a fixed length are read as such.
Listed = Strict(False)
Part = Annotated[tuple[Whole, Natural, Positive], Listed]
Admitted = Annotated[tuple[Natural, Natural, Natural, Natural], Listed]
Exceptional = Annotated[tuple[Natural, Natural, Natural], Listed]
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
    p99: Number | None


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
    """A run.json."""

    world: Literal["sim", "real"]
    settings: dict[str, Any]
    facts: Facts
    device: str | None
    versions: dict[str, str]
    summary: Summary


def _checker(kind: Any) -> Callable[[Line], None]:
    """Checks a line against a kind.

    Its InputError names the field, the place in it, what is there and what was expected.
    """
    check = TypeAdapter(kind).validate_python

    def checked(line: Line) -> None:
        try:
            check(line.values)
        except ValidationError as error:
            raise _refusal(line, error) from error

    return checked


def _refusal(line: Line, error: ValidationError) -> InputError:
    first = error.errors(include_url=False, include_context=False)[0]
    steps = list(first["loc"])
    value: Any = line.values
    names: list[str] = []
    while steps and isinstance(value, dict) and isinstance(steps[0], str) and steps[0] in value:
        names.append(str(steps.pop(0)))
        value = value[names[-1]]
    if first["type"] == "missing" and len(steps) == 1 and isinstance(steps[0], str):
        return InputError("is missing", path=line.path, line=line.number, field=".".join([*names, steps[0]]))
    place = "".join(f"[{step}]" for step in steps if isinstance(step, int))
    problem = f"expected: {first['msg']}" + (f", at {place}" if place else "")
    return InputError(problem, path=line.path, line=line.number, field=".".join(names), value=value)


check_request = _checker(RequestRow)
check_step = _checker(StepRow)
check_output = _checker(OutputRow)
check_run = _checker(Run)
