"""What a point is judged by beside its run's summary: limits of each request, and what is measured of some of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from twinserve.planning.attainment import Attainment, Limits
from twinserve.policies import Sequence
from twinserve.settings.errors import InputError
from twinserve.traces.runs.outcomes import Measure, Outcome, judged

_MEASURE = re.compile(r"([\w.]+)\s+(\w+)(?:\s+of\s+(\S+))?")


def parse_measures(text: str) -> list[Measure]:
    """Measures from text such as "p99.9 TTFT and max queue of tenant=a".

    Raises:
        InputError: the text has another form, or names what is not measured.
    """
    measures = []
    for part in re.split(r"\s+and\s+", text.strip(), flags=re.IGNORECASE):
        found = _MEASURE.fullmatch(part.strip())
        if found is None:
            raise InputError("expected such as 'p99.9 TTFT', joined by 'and'", field="measured", value=part)
        try:
            measures.append(Measure(found[1].lower(), found[2].lower(), found[3]))
        except ValueError as error:
            raise InputError(str(error), field="measured") from error
    return measures


@dataclass(frozen=True)
class Rules:
    """What is measured of a run's requests beside what its summary has.

    Attributes:
        limits: those that keep them are counted; None: nothing is.
        measures: what is measured.
        warm_up_s, drain_s: requests that come in so many of the first and of the last seconds of the arrivals are left
            out of both; then `judged` counts the others.
    """

    limits: Limits | None = None
    measures: tuple[Measure, ...] = ()
    warm_up_s: float = 0.0
    drain_s: float = 0.0

    @classmethod
    def parse(cls, limits: str | None, measured: str | None, warm_up_s: float, drain_s: float) -> Rules:
        """From texts, see `Limits.parse` and `parse_measures`.

        Raises:
            InputError: one cannot be read.
        """
        measures = () if measured is None else tuple(parse_measures(measured))
        return cls(None if limits is None else Limits.parse(limits), measures, warm_up_s, drain_s)


class Judge:
    """Takes in the requests of a run, and adds to its summary what the rules ask for."""

    def __init__(self, rules: Rules):
        self._rules = rules
        self._outcomes: list[Outcome] = []

    def ended(self, seq: Sequence) -> None:
        """Take in a sequence that has ended."""
        if self._rules != Rules():
            self._outcomes.append(Outcome.of(seq))

    def add_to(self, summary: dict[str, Any]) -> None:
        """Add `attainment`, `measured` by name, and `judged`, where there is something to be said of them."""
        rules = self._rules
        within, counts = self._outcomes, summary
        if rules.warm_up_s or rules.drain_s:
            within = judged(self._outcomes, rules.warm_up_s, rules.drain_s)
            arrivals_ns = [one.arrival_ns for one in self._outcomes] or [0]
            span_s = max(0.0, (max(arrivals_ns) - min(arrivals_ns)) / 1e9 - rules.warm_up_s - rules.drain_s)
            finished = sum(one.is_served for one in within)
            counts = summary["judged"] = {"requests": len(within), "finished": finished, "duration_s": span_s}
        if rules.measures:
            summary["measured"] = {str(measure): measure.value(within) for measure in rules.measures}
        if rules.limits is not None:
            attainment = Attainment(rules.limits)
            for one in within:
                attainment.ended(one)
            summary["attainment"] = attainment.of(counts)
