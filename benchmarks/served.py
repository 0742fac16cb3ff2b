"""What came of requests that a server has served in real time: rows, figures by rate, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

from twinserve.planning.attainment import Attainment, Limits
from twinserve.policies import Sequence
from twinserve.traces.runs.metrics import summarize
from twinserve.traces.runs.outcomes import Measure, Outcome

Row = dict[str, Any]
Entry = dict[str, Any]
"""One server at one rate: `server`, `rate` in requests a second, `summary` and what is known beside."""

STATISTICS = ("mean", "p50", "p90", "p99")
HEADS = ("server", "requests/s", "requests", "output tokens/s", "TTFT p50 / p90 / p99, ms", "TPOT p50 / p90 / p99, ms",
         "queue, ms", "within limits")  # fmt: skip


def row(
    number: int,
    prompt_tokens: int,
    output_tokens: int,
    arrival_ns: int,
    times_ns: tuple[int, int] | None,
    *,
    max_tokens: int | None = None,
    refusal: str | None = None,
) -> Row:
    """A request as a client saw it, as in requests.jsonl of a run.

    Args:
        arrival_ns: when it was sent.
        times_ns: of its first token and its last; None where it was not served.
        max_tokens: as many as it asked for; None: as came.
        refusal: what was said instead of tokens.
    """
    first_ns, finish_ns = times_ns or (None, None)
    return {
        "id": number,
        "session": None,
        "arrival_ns": arrival_ns,
        "first_scheduled_ns": None,
        "first_token_ns": first_ns,
        "finish_ns": finish_ns,
        "prompt_tokens": prompt_tokens,
        "max_tokens": output_tokens if max_tokens is None else max_tokens,
        "output_tokens": output_tokens,
        "cached_tokens": 0,
        "preemptions": 0,
        "finish_reason": "abort" if times_ns is None else "length",
        "refusal": refusal,
    }


def of_rows(rows: list[Row], limits: Limits) -> dict[str, Any]:
    """The figures of requests as a client saw them, by the definitions that a run's summary has."""
    summary = summarize(rows, [])
    return {"summary": summary, "attainment": attained(map(Outcome.of_row, rows), limits, summary)}


def attained(ended: Iterable[Sequence | Outcome], limits: Limits, summary: dict[str, Any]) -> dict[str, Any]:
    """How many of the requests kept limits."""
    counting = Attainment(limits)
    for one in ended:
        counting.ended(one)
    return counting.of(summary)


def queued(outcomes: Seq[Outcome]) -> dict[str, float | None]:
    """Seconds from a request's arrival until it was first scheduled."""
    return {statistic: Measure(statistic, "queue").value(outcomes) for statistic in STATISTICS}


def name_of(entry: Entry) -> str:
    """What an entry is called beside others."""
    return f"{entry['server']} at {entry['rate']:g} requests/s"


def cells(entries: Iterable[Entry]) -> list[list[str]]:
    """The rows of the table, by rate; what is not known is a dash."""
    ordered = sorted(entries, key=lambda entry: (entry["rate"], entry["server"]))
    return [_cells(entry) for entry in ordered]


def _cells(entry: Entry) -> list[str]:
    summary, share = entry["summary"], (entry.get("attainment") or {}).get("share")
    requests, tokens = summary.get("requests"), summary.get("output_tok_s")
    served = summary.get("finished", requests)
    came = "–" if requests is None else f"{requests:,}" if served == requests else f"{served:,} of {requests:,}"
    return [
        entry["server"],
        f"{entry['rate']:g}",
        came,
        "–" if tokens is None else f"{tokens:,.0f}",
        _percentiles(summary.get("ttft_s")),
        _percentiles(summary.get("tpot_s")),
        _ms((entry.get("queue_s") or {}).get("mean")),
        "–" if share is None else f"{share:.1%}",
    ]


def _percentiles(values: dict[str, float | None] | None) -> str:
    return " / ".join(_ms((values or {}).get(name)) for name in ("p50", "p90", "p99"))


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:,.1f}"
