"""What a deployment is judged by: objectives, costs, and how sure a mean over seeds is."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twinserve.planning.attainment import Limits, seconds_of, words_of
from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST_TERMS
from twinserve.traces.runs.compare import LATENCIES, STATISTICS, name_of, value_of
from twinserve.traces.runs.outcomes import Measure

CONFIDENCE = 0.95
NOBODY = "no request is left to be judged"
_TERM = re.compile(r"([\w.]+)\s+(\w+)(?:\s+of\s+(\S+))?\s*<=\s*([0-9.]+)\s*(ms|s)", re.IGNORECASE)
_SHARE = re.compile(r"([0-9.]+)\s*%\s+of\s+requests\s+with\s+(.+)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Term:
    """A limit on one metric.

    Attributes:
        metric: its dotted name in a summary, such as "ttft_s.p99"; or what is measured of requests beside, such as
            "p99.9 queue of tenant=a".
        limit_s: what it may be at most, in seconds.
    """

    metric: str
    limit_s: float

    @property
    def is_measured(self) -> bool:
        """Is it no metric that every summary has, but one that has to be measured for it?"""
        return " " in self.metric

    @property
    def name(self) -> str:
        """The metric as people write it, such as "p99 TTFT"."""
        return self.metric if self.is_measured else name_of(self.metric)

    def value(self, summary: dict[str, Any]) -> float | None:
        """What a run has of it, in seconds; where some of its requests are left out by rule, the others."""
        measured = summary.get("measured", {})
        return measured[self.name] if self.name in measured else value_of(summary, self.metric)

    def __str__(self) -> str:
        return f"{self.name} <= {words_of(self.limit_s)}"


@dataclass(frozen=True)
class Objective:
    """Limits that all have to be kept, by a run that serves every request; or by so large a share of its requests.

    Attributes:
        terms: limits on metrics of the whole run.
        limits: of each request; None where there are terms.
        share: of all requests, those that have to keep `limits`.
    """

    terms: tuple[Term, ...]
    limits: Limits | None = None
    share: float = 1.0

    def __str__(self) -> str:
        if self.limits is not None:
            return f"{100 * self.share:g}% of requests with {self.limits}"
        return " and ".join(map(str, self.terms))

    @classmethod
    def parse(cls, text: str) -> Objective:
        """From text such as "p99 TTFT <= 1 s and p99 TPOT <= 50 ms", or "99% of requests with TTFT <= 1 s and TPOT <=
        50 ms".

        Raises:
            InputError: the text has another form, or names what is not measured.
        """
        of_requests = _SHARE.fullmatch(text.strip())
        if of_requests is not None:
            try:
                percent = float(of_requests[1])
            except ValueError:
                percent = 0.0
            if not 0 < percent < 100:
                raise InputError("expected above 0% and below 100%", field="objective", value=text)
            return cls((), Limits.parse(of_requests[2]), percent / 100)
        terms = []
        parts = re.split(r"\s+and\s+", text.strip(), flags=re.IGNORECASE)
        if len(parts) > MOST_TERMS:
            raise InputError(f"expected at most {MOST_TERMS} terms", field="objective", value=text)
        for part in parts:
            found = _TERM.fullmatch(part.strip())
            try:
                limit_s = seconds_of(found[4], found[5])  # type: ignore[index]
            except (TypeError, ValueError) as error:
                raise InputError(
                    "expected terms such as 'p99 TTFT <= 1 s', joined by 'and'", field="objective", value=part
                ) from error
            terms.append(Term(_metric(found[1].lower(), found[2].lower(), found[3]), limit_s))  # type: ignore[index]
        return cls(tuple(terms))

    def asked(self, is_cut: bool, measured: str | None) -> dict[str, str]:
        """What of a point's fields `limits` and `measured` it needs, beside what is to be measured anyway.

        Args:
            is_cut: are some requests left out by rule? Then no summary of all of them will do.

        Raises:
            InputError: a term is not known of single requests, and some are left out.
        """
        if self.limits is not None:
            return {"limits": str(self.limits)}
        needed = [term for term in self.terms if is_cut or term.is_measured]
        for term in needed:
            if term.metric.startswith("itl"):
                raise InputError("expected no ITL beside warm_up_s or drain_s", field="objective", value=str(term))
        names = [*([] if measured is None else [measured]), *(term.name for term in needed)]
        return {"measured": " and ".join(names)} if names else {}

    def missed(self, summary: dict[str, Any]) -> list[str]:
        """What a run does not keep: limits, in words, and that every request is served.

        Raises:
            InputError: a metric is not defined for these requests.
        """
        if summary.get("judged", {}).get("requests") == 0:
            return [NOBODY]
        if self.limits is not None:
            return [str(self)] if (summary["attainment"]["share"] or 0.0) < self.share else []
        unserved = num_unserved(summary)
        missed = [f"{unserved} requests not served"] if unserved else []
        for term in self.terms:
            value = term.value(summary)
            if value is None and not unserved:
                raise InputError(f"expected a metric that these requests have, {term.name} is not defined")
            if value is not None and value > term.limit_s:
                missed.append(str(term))
        return missed

    def load_of(self, summary: dict[str, Any]) -> float:
        """The worst of its terms as a share of its limit; of a share of requests, those that miss it as a share of
        those that may. Without end where a request is not served that has to be.

        Raises:
            InputError: a metric is not defined for these requests.
        """
        if summary.get("judged", {}).get("requests") == 0:
            return math.inf
        if self.limits is not None:
            return (1.0 - (summary["attainment"]["share"] or 0.0)) / (1.0 - self.share)
        self.missed(summary)
        if num_unserved(summary):
            return math.inf
        return max(float(term.value(summary) or 0.0) / term.limit_s for term in self.terms)


def _metric(statistic: str, name: str, of: str | None) -> str:
    """The metric that a term names, see `Term.metric`.

    Raises:
        InputError: there is none such.
    """
    if of is None and statistic in STATISTICS and f"{name}_s" in LATENCIES:
        return f"{name}_s.{statistic}"
    if name == "itl":
        known = ", ".join(STATISTICS)
        raise InputError(f"expected one of {known}, of all requests", field="objective", value=f"{statistic} ITL")
    try:
        return str(Measure(statistic, name, of))
    except ValueError as error:
        raise InputError(str(error), field="objective") from error


def num_unserved(summary: dict[str, Any]) -> int:
    """Requests that were not served, those that were turned away among them, but for those left out by rule."""
    counts = summary.get("judged", summary)
    return counts["requests"] - counts["finished"] + counts.get("rejected", 0)


def cost_per_million_tokens(tokens_per_s: float | None, price_per_hour: float) -> float | None:
    """What a million tokens cost while so many are served a second; None where none are."""
    return price_per_hour / 3600 / tokens_per_s * 1e6 if tokens_per_s else None


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval that holds the mean of what `values` are samples of, with a confidence of 95%: Student's t.

    None where there is one value alone, which does not say how far others would be.
    """
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    mean = statistics.fmean(values)
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
