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
from twinserve.traces.runs.compare import LATENCIES, STATISTICS, name_of, value_of

CONFIDENCE = 0.95
_TERM = re.compile(r"(\w+)\s+(\w+)\s*<=\s*([0-9.]+)\s*(ms|s)", re.IGNORECASE)
_SHARE = re.compile(r"([0-9.]+)\s*%\s+of\s+requests\s+with\s+(.+)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Term:
    """A limit on one metric.

    Attributes:
        metric: its dotted name in a summary, such as "ttft_s.p99".
        limit_s: what it may be at most, in seconds.
    """

    metric: str
    limit_s: float

    @property
    def name(self) -> str:
        """The metric as people write it, such as "p99 TTFT"."""
        return name_of(self.metric)

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
        for part in re.split(r"\s+and\s+", text.strip(), flags=re.IGNORECASE):
            found = _TERM.fullmatch(part.strip())
            try:
                statistic, name, limit_s = found[1].lower(), found[2].lower() + "_s", seconds_of(found[3], found[4])  # type: ignore[index]
            except (TypeError, ValueError) as error:
                raise InputError(
                    "expected terms such as 'p99 TTFT <= 1 s', joined by 'and'", field="objective", value=part
                ) from error
            for word, known in ((statistic, STATISTICS), (name, LATENCIES)):
                if word not in known:
                    names = ", ".join(one.removesuffix("_s") for one in known)
                    raise InputError(f"expected one of {names}", field="objective", value=word.removesuffix("_s"))
            terms.append(Term(f"{name}.{statistic}", limit_s))
        return cls(tuple(terms))

    def missed(self, summary: dict[str, Any]) -> list[str]:
        """What a run does not keep: limits, in words, and that every request is served.

        Raises:
            InputError: a metric is not defined for these requests.
        """
        if self.limits is not None:
            return [str(self)] if (summary["attainment"]["share"] or 0.0) < self.share else []
        unserved = summary["requests"] - summary["finished"]
        missed = [f"{unserved} requests not served"] if unserved else []
        for term in self.terms:
            value = value_of(summary, term.metric)
            if value is None and not unserved:
                raise InputError(f"expected a metric that these requests have, {term.metric} is not defined")
            if value is not None and value > term.limit_s:
                missed.append(str(term))
        return missed

    def load_of(self, summary: dict[str, Any]) -> float:
        """The worst of its terms as a share of its limit; of a share of requests, those that miss it as a share of
        those that may. Without end where a request is not served that has to be.

        Raises:
            InputError: a metric is not defined for these requests.
        """
        if self.limits is not None:
            return (1.0 - (summary["attainment"]["share"] or 0.0)) / (1.0 - self.share)
        self.missed(summary)
        if summary["requests"] != summary["finished"]:
            return math.inf
        return max(float(value_of(summary, term.metric) or 0.0) / term.limit_s for term in self.terms)


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
