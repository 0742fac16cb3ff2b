"""What was recorded of another server: a result of `vllm bench serve --save-detailed`, or figures alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from served import Entry, of_rows, row

from twinserve.planning.attainment import Limits
from twinserve.settings.errors import InputError
from twinserve.traces.kinds import checker
from twinserve.traces.lines import Content, Line, json_lines, json_value
from twinserve.traces.readers import read_trace

Distribution = dict[Literal["mean", "p50", "p90", "p95", "p99"], float]


class Figures(BaseModel):
    """Of a server at one rate, named as in a run's summary; what was not kept is left out."""

    model_config = ConfigDict(extra="forbid")

    requests: int | None = Field(default=None, ge=1)
    output_tok_s: float | None = Field(default=None, ge=0)
    ttft_s: Distribution | None = None
    tpot_s: Distribution | None = None
    e2e_s: Distribution | None = None


class Recorded(BaseModel):
    """A server of which figures alone were kept.

    Attributes:
        about: on what, beside what and with which requests they were measured.
        rates: by requests a second.
    """

    model_config = ConfigDict(extra="forbid")

    server: str
    about: str
    rates: dict[float, Figures]


class Detailed(BaseModel):
    """What is read of a result of `vllm bench serve --save-detailed`: a list has an element a request."""

    backend: str = "vllm"
    model_id: str
    request_rate: float | Literal["inf"] | None = None
    start_times: list[float]
    input_lens: list[int]
    output_lens: list[int]
    errors: list[str | None]
    ttfts: list[float]
    itls: list[list[float]]


_check_figures, _check_result = checker(Recorded), checker(Detailed)


def read_peer(path: Path, limits: Limits) -> list[Entry]:
    """What a file says of a server, an entry a rate.

    Raises:
        InputError: it cannot be read, or is neither a result with its requests nor figures.
    """
    with Content(path) as content:
        text = content.whole(next(iter(content), ""))
    try:
        results = [Line(path, None, json_value(text, path, nan=True))]
    except InputError:  # a result a line, by --append-result
        results = list(json_lines(text.splitlines(), path, nan=True))
    if isinstance(results[0].values, dict) and "rates" in results[0].values:
        _check_figures(results[0])
        return _figures(Recorded(**results[0].values), path)
    answered = len(read_trace(path).requests)  # which checks whatever the trace needs
    for result in results:
        _check_result(result)
    entries = [_result(Detailed(**result.values), path, limits) for result in results]
    if sum(entry["summary"]["finished"] for entry in entries) != answered:
        raise InputError(f"expected the time to the first token of {answered} requests", path=path, field="ttfts")
    return entries


def _figures(recorded: Recorded, path: Path) -> list[Entry]:
    about = {"server": recorded.server, "recorded": path.name, "about": recorded.about}
    return [
        about | {"rate": rate, "summary": figures.model_dump(exclude_none=True)}
        for rate, figures in recorded.rates.items()
    ]


def _result(result: Detailed, path: Path, limits: Limits) -> Entry:
    """A request's last token comes all its gaps after the first; one with an error, or without a first, has none."""
    starts = result.start_times
    if len(result.itls) != len(starts):
        problem = f"expected {len(starts)} elements, one for each of start_times"
        raise InputError(problem, path=path, field="itls", value=f"{len(result.itls)} elements")
    rows = []
    columns = zip(result.input_lens, result.output_lens, starts, result.ttfts, result.itls, result.errors, strict=True)
    for number, (prompt_tokens, output_tokens, start_s, ttft_s, itl_s, error) in enumerate(columns):
        at_s = (start_s, start_s + ttft_s, start_s + ttft_s + sum(itl_s))
        arrival_ns, first_ns, finish_ns = (round(one * 1e9) for one in at_s)
        times_ns = (first_ns, finish_ns) if ttft_s and not error else None
        rows.append(row(number, prompt_tokens, output_tokens, arrival_ns, times_ns))
    about = {"server": f"{result.backend}, {path.stem}", "recorded": path.name, "model": result.model_id}
    return about | {"rate": _rate(result, path)} | of_rows(rows, limits)


def _rate(result: Detailed, path: Path) -> float:
    """Requests a second that were asked for; else those that were sent, from the first to the last."""
    if isinstance(result.request_rate, float):
        return result.request_rate
    span_s = max(result.start_times) - min(result.start_times)
    if not span_s:
        raise InputError("expected a number, as all were sent at once", path=path, field="request_rate")
    return (len(result.start_times) - 1) / span_s
