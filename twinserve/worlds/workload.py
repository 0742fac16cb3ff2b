"""A trace as a run replays it: read, changed as asked for, every change counted; and what a point of a sweep adds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from twinserve.settings.config import validated
from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST, MOST_TOKENS, plain
from twinserve.sim.clients import Clients
from twinserve.traces import transforms
from twinserve.traces.lines import LATEST_NS
from twinserve.traces.readers import Trace, made_trace, read_trace
from twinserve.traces.request import Request
from twinserve.traces.requests import as_requests

LIKE_HELP = (
    "vllm-VERSION@DEVICE[:offline], whose defaults hold where nothing is set, or own for twinserve's; "
    "unless given, the newest vLLM's on the device of a roofline"
)


class TraceOptions(BaseModel):
    """How a trace is read, and changed before it is replayed; applied in this order."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    columns: str | None = Field(
        default=None,
        description="of a CSV file of your own, what its columns are: time=COLUMN,prompt=COLUMN,output=COLUMN",
    )
    spread_seed: int | None = Field(default=None, description="spread arrivals of coarse steps, with this seed")
    shuffle_seed: int | None = Field(default=None, description="requests trade arrival times, with this seed")
    session_rate: float | None = Field(default=None, description="sessions begin at random, so many a second")
    session_seed: int = Field(default=0, description="of session_rate: another seed, other times")
    window_s: str | None = Field(default=None, description="only arrivals from START to END seconds, as START:END")
    limit: int | None = Field(default=None, description="only the first so many requests")
    rate_scale: float | None = Field(default=None, description="so many times the trace's rate")
    all_at_zero: bool | None = Field(default=None, description="every request arrives at the start")
    max_prompt_tokens: int | None = Field(default=None, description="cut longer prompts to their first tokens")
    max_output_tokens: int | None = Field(default=None, description="cut longer outputs")

    @property
    def is_random(self) -> bool:
        """Whether another seed gives another workload."""
        return any(value is not None for value in (self.spread_seed, self.shuffle_seed, self.session_rate))

    @property
    def read(self) -> dict[str, Any]:
        """As far as a trace has to be read: arguments of `read_trace`."""
        read: dict[str, Any] = {} if self.columns is None else {"columns": self.columns}
        if not self.is_random and self.window_s is not None:
            read["until_s"] = _window(self.window_s)[1]
        elif not self.is_random and self.limit is not None and self.limit > 0:
            read["limit"] = self.limit
        return read

    def with_seed(self, number: int) -> TraceOptions:
        """The options with a number added to every seed."""
        seeds = {name: getattr(self, name) for name in ("spread_seed", "shuffle_seed", "session_seed")}
        return self.model_copy(update={name: seed + number for name, seed in seeds.items() if seed is not None})


class ClientOptions(BaseModel):
    """What clients and the door of an engine do; see `sim.clients.Clients`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_num_queued_reqs: int | None = Field(
        default=None, ge=0, le=MOST, description="requests of a replica that have not ended; those beyond get a 503"
    )
    max_num_queued_tokens: int | None = Field(
        default=None, ge=0, le=MOST, description="prompt tokens without a first token of its own; beyond it, a 503"
    )
    client_timeout_s: float | None = Field(
        default=None, gt=0, le=1e9, description="seconds from its arrival after which a client gives up"
    )

    @property
    def clients(self) -> Clients:
        """What a simulation makes of it."""
        timeout = self.client_timeout_s
        timeout_ns = None if timeout is None else round(timeout * 1e9)
        return Clients(self.max_num_queued_reqs, self.max_num_queued_tokens, timeout_ns)


class RateOptions(BaseModel):
    """At which rate a trace is replayed, whatever its own is.

    With `rate`, the trace's own arrivals are scaled to so many requests a second (requests - 1 over the time from the
    first to the last), or, with `arrivals` "poisson", sessions begin at random so often that requests come at that
    rate in the long run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="requests a second")
    arrivals: Literal["trace", "poisson"] = Field(
        default="trace", description="what rate makes denser or thinner: the trace's arrivals, or random ones"
    )

    def check(self, options: TraceOptions) -> None:
        """Refuse what contradicts the rate.

        Raises:
            InputError: an option says how dense arrivals are, too; or they are random, and no rate is given.
        """
        if self.arrivals == "poisson" and self.rate is None:
            raise InputError("expected a rate beside it", field="arrivals", value=self.arrivals)
        for name in ("rate_scale", "session_rate", "all_at_zero") if self.rate is not None else ():
            if (value := getattr(options, name)) is not None:
                raise InputError("expected none of it beside rate", field=name, value=value)


class PointOptions(RateOptions):
    """What a point of a sweep has beside its trace, settings and trace options."""

    latency: str | None = Field(default=None, description="a latency, as twinserve sim takes it")
    seed: int = Field(default=0, ge=0, description="added to every seed of the trace options")
    like: str | None = Field(default=None, description=LIKE_HELP)
    limits: str | None = Field(
        default=None, description="count the requests that keep such as 'TTFT <= 1 s and TPOT <= 50 ms'"
    )
    measured: str | None = Field(default=None, description="measure such as 'p99.9 TTFT and max queue of tenant=a' too")
    warm_up_s: float = Field(
        default=0.0, ge=0, le=1e9, description="requests of so many first seconds of the arrivals are not judged"
    )
    drain_s: float = Field(default=0.0, ge=0, le=1e9, description="nor are those of so many last ones")


@dataclass(frozen=True)
class Workload:
    """Requests to replay and what the run record says of where they came from.

    Attributes:
        requests: with ids 0, 1, 2...
        facts: path, format and sha256 of the trace, its notes, what its reader handled, and each transform with its
            counts. Of requests that no file holds their own sha256, so that runs of the same ones are known to be.
        capped: requests whose prompt or answer was cut to a cap.
        dropped: rows of the trace that are not replayed.
        epoch_ns: when time 0 was, see `Trace`; None if a transform may have moved it.
    """

    requests: Seq[Request]
    facts: dict[str, Any] = field(default_factory=dict)
    capped: int = 0
    dropped: int = 0
    epoch_ns: int | None = None

    def __post_init__(self) -> None:
        if not self.facts:
            digest = hashlib.sha256()
            for request in self.requests:
                digest.update(repr(request).encode())
            made = {"path": "requests", "format": "made", "sha256": digest.hexdigest()}
            self.facts.update(made, notes={}, handled={}, transforms=[])

    def at_rate_scale(self, factor: float) -> Workload:
        """The same requests, so many times as dense.

        Raises:
            InputError: `factor` is not a number above 0.
        """
        log = [*self.facts["transforms"]]
        requests = transforms.scale_rate(self.requests, factor, log)
        return replace(self, requests=requests, facts=self.facts | {"transforms": log}, epoch_ns=None)


def load_workload(path: Path, options: dict[str, Any], *, is_replayed: bool = True) -> Workload:
    """Read a trace, as far as it is wanted, and apply `TraceOptions` to it.

    Args:
        is_replayed: whether it has to be known when requests come.

    Raises:
        InputError: the trace or an option cannot be used, or no request is left.
    """
    wanted = validated(TraceOptions, {}, options, None)
    return make_workload(read_requests(path, **wanted.read), path, wanted, is_replayed=is_replayed)


def workload_at(trace: Trace, path: Path, options: TraceOptions, wanted: RateOptions) -> Workload:
    """A trace that was read from `path`, with `options` applied to it, at the rate that is wanted.

    Raises:
        InputError: an option cannot be used, or there is a rate, and all requests arrive at once or wait for answers.
    """
    wanted.check(options)
    if wanted.rate is None:
        return make_workload(trace, path, options)
    if wanted.arrivals == "poisson":
        rate = wanted.rate * _share_of_sessions(trace.requests, wanted.rate)
        return make_workload(trace, path, TraceOptions(**options.model_dump() | {"session_rate": rate}))
    unscaled = make_workload(trace, path, options)
    if any(request.after is not None for request in unscaled.requests):
        problem = "expected 'poisson', which has sessions begin denser: when a turn comes, its answers decide"
        raise InputError(problem, field="arrivals", value=wanted.arrivals)
    own = arrival_rate(unscaled.requests)
    if own is None:
        raise InputError("expected a trace whose requests do not all arrive at once", field="rate", value=wanted.rate)
    return unscaled.at_rate_scale(wanted.rate / own)


def _share_of_sessions(requests: Seq[Request], rate: float) -> float:
    """Sessions a request.

    Raises:
        InputError: there are too few of them: at that rate they would all have begun before the longest has had its
            turns, even if every answer came at once.
    """
    begins = transforms.session_begins(requests)
    keys = transforms.session_keys(requests)
    longest_ns = max(r.arrival_ns - begins[key] for r, key in zip(requests, keys, strict=True))
    begin_s = len(requests) / rate
    if begin_s < longest_ns / 1e9:
        raise InputError(
            f"expected at most {len(requests) / (longest_ns / 1e9):.4g}: the {len(begins)} sessions would begin "
            f"within {begin_s:.4g} s, and the longest lasts {longest_ns / 1e9:.4g} s without its answers",
            field="rate",
            value=rate,
        )
    return len(begins) / len(requests)


def arrivals_span_s(requests: Seq[Request]) -> float:
    """Seconds from the first arrival to the last."""
    return (requests[-1].arrival_ns - requests[0].arrival_ns) / 1e9


def arrival_rate(requests: Seq[Request]) -> float | None:
    """Requests a second, from the first arrival to the last; None where all arrive at once."""
    span_s = arrivals_span_s(requests)
    return (len(requests) - 1) / span_s if span_s else None


def read_requests(path: Path, **read: Any) -> Trace:
    """A trace, see `read_trace`, or the traffic of a vLLM from the step log or the journal in a folder.

    Raises:
        InputError: it cannot be read.
    """
    if not path.is_dir():
        return read_trace(path, **read)
    from twinserve.traces.runs.vllm_records import is_step_log, load_run, requests_of

    if not is_step_log(path):
        return read_trace(path, **read)
    traces = os.environ.get("TWINSERVE_TRACES")
    record = load_run(path, Path(traces) if traces else None)
    trace = record.run["facts"]["trace"]
    return made_trace(requests_of(record), trace["format"], trace["sha256"])


def load_workloads(path: Path, options: dict[str, Any], rates: dict[str, Any], count: int = 1) -> list[Workload]:
    """So many workloads of one kind: with the seeds of the options, and with those after them.

    They are alike where nothing is random.

    Args:
        options: `TraceOptions`.
        rates: `RateOptions`.

    Raises:
        InputError: the trace or an option cannot be used, or no request is left.
    """
    wanted, at = validated(TraceOptions, {}, options, None), validated(RateOptions, {}, rates, None)
    at.check(wanted)
    is_random = wanted.is_random or at.arrivals == "poisson"
    # How dense sessions of random arrivals are, all of them say.
    as_far = {"columns": wanted.columns} if at.arrivals == "poisson" else wanted.read
    trace = read_requests(path, **as_far)
    if not is_random:
        return [workload_at(trace, path, wanted, at)] * count
    return [workload_at(trace, path, wanted.with_seed(number), at) for number in range(count)]


def make_workload(trace: Trace, path: Path, options: TraceOptions, *, is_replayed: bool = True) -> Workload:
    """A trace that was read from `path`, with `options` applied to it.

    Raises:
        InputError: an option cannot be used, no request is left, or the trace does not say when requests come and no
            option does.
    """
    if is_replayed and not trace.is_timed and options.session_rate is None and not options.all_at_zero:
        raise InputError(
            f"a {trace.format} file does not say when requests come: expected session_rate, or all_at_zero", path=path
        )
    requests, capped, log = _transformed(trace, options)
    if is_replayed:
        for request in as_requests(requests).longer_than(MOST_TOKENS):
            most = f"expected at most {MOST_TOKENS} tokens in a prompt and in an answer (TWINSERVE_MOST_TOKENS)"
            value = {"prompt_tokens": request.prompt_tokens, "max_tokens": request.max_tokens}
            raise InputError(most, path=path, field=f"request {request.id}", value=value)
    if not requests:
        raise InputError("no request is left to replay", path=path)
    if is_replayed and requests[-1].arrival_ns > LATEST_NS:
        late = f"arrives after {requests[-1].arrival_ns} ns, expected at most {LATEST_NS}"
        raise InputError(late, path=path, field=f"request {requests[-1].id}")
    name = os.fsencode(path.name).decode("utf-8", "backslashreplace")  # the same in any locale
    facts: dict[str, Any] = {"path": name, "format": trace.format, "sha256": trace.sha256, "notes": trace.notes}
    facts |= {"handled": trace.handled, "transforms": log}
    facts |= {} if options.columns is None else {"columns": options.columns}
    dropped = sum(trace.handled["dropped"].values()) + len(trace.requests) - len(requests) + trace.num_unread
    return Workload(requests, facts, capped, dropped, None if log else trace.epoch_ns)


def _transformed(trace: Trace, wanted: TraceOptions) -> tuple[Seq[Request], int, transforms.TransformLog]:
    """The requests that are wanted, how many of them were cut to a cap, and what was changed."""
    log: transforms.TransformLog = []
    requests: Seq[Request] = trace.requests
    if wanted.spread_seed is not None:
        requests = transforms.spread(requests, wanted.spread_seed, log)
    if wanted.shuffle_seed is not None:
        requests = transforms.shuffle(requests, wanted.shuffle_seed, log)
    if wanted.session_rate is not None:
        requests = transforms.start_sessions(requests, wanted.session_rate, wanted.session_seed, log)
    if wanted.window_s is not None:
        start, end = _window(wanted.window_s)
        requests = transforms.window(requests, start, end, log)
    if wanted.limit is not None:
        requests = transforms.limit(requests, wanted.limit, log)
    if wanted.rate_scale is not None:
        requests = transforms.scale_rate(requests, wanted.rate_scale, log)
    if wanted.all_at_zero:
        requests = transforms.all_at_zero(requests, log)
    whole = requests
    if wanted.max_prompt_tokens is not None:
        requests = transforms.cap_prompt_tokens(requests, wanted.max_prompt_tokens, log)
    if wanted.max_output_tokens is not None:
        requests = transforms.cap_output_tokens(requests, wanted.max_output_tokens, log)
    if trace.num_unread:
        # The window, or the limit, behind whose end nothing was read comes first.
        log[0]["changed"]["requests_dropped"] += trace.num_unread
    capped = 0
    if requests is not whole:
        capped = sum(
            (one.prompt_tokens, one.max_tokens) != (other.prompt_tokens, other.max_tokens)
            for one, other in zip(whole, requests, strict=True)
        )
    return requests, capped, log


def _window(text: str) -> tuple[float, float]:
    start, colon, end = text.partition(":")
    try:
        if colon:
            return float(plain(start)), float(plain(end))
    except ValueError:
        pass
    raise InputError("expected START:END in seconds, such as 60:120", field="window_s", value=text)
