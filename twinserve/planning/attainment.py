"""Attainment: how many requests keep all of some limits, each by itself; goodput: how many a second do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from twinserve.policies import Sequence
from twinserve.settings.errors import InputError
from twinserve.traces.runs.metrics import SERVED, attainment
from twinserve.traces.runs.outcomes import Outcome

_TERM = re.compile(r"(\w+)\s*<=\s*([0-9.]+)\s*(ms|s)", re.IGNORECASE)
_UNITS = {"s": 1.0, "ms": 1e-3}
_METRICS = ("ttft", "tpot", "e2e", "queue")


def seconds_of(number: str, unit: str) -> float:
    """A time as a person writes it, in seconds.

    Raises:
        ValueError: it is no number.
    """
    return float(number) * _UNITS[unit.lower()]


def words_of(limit_s: float) -> str:
    """A time as a person reads it."""
    return f"{limit_s:g} s" if limit_s >= 1 else f"{limit_s * 1e3:g} ms"


@dataclass(frozen=True)
class Limits:
    """What a request has to keep: seconds by metric, of "ttft", "tpot" and "e2e", as a run's summary defines them, and
    "queue", from its arrival until it is first scheduled."""

    of: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Limits:
        """From text such as "TTFT <= 1 s and TPOT <= 50 ms".

        Raises:
            InputError: the text has another form, or names what is not known of a request.
        """
        limits: dict[str, float] = {}
        for part in re.split(r"\s+and\s+", text.strip(), flags=re.IGNORECASE):
            found = _TERM.fullmatch(part.strip())
            try:
                name, limit_s = found[1].lower(), seconds_of(found[2], found[3])  # type: ignore[index]
            except (TypeError, ValueError) as error:
                expected = "expected limits such as 'TTFT <= 1 s', joined by 'and'"
                raise InputError(expected, field="limits", value=part) from error
            if name not in _METRICS or name in limits:
                raise InputError(f"expected each of {', '.join(_METRICS)} once at most", field="limits", value=found[1])  # type: ignore[index]
            limits[name] = limit_s
        return cls(tuple(limits.items()))

    def __str__(self) -> str:
        return " and ".join(
            f"{name if name == 'queue' else name.upper()} <= {words_of(limit_s)}" for name, limit_s in self.of
        )

    def kept(self, seq: Sequence | Outcome) -> bool:
        """Was it served, within all of them? The time per output token of an answer of one token is not limited."""
        if seq.finish_reason not in SERVED or seq.first_token_ns is None or seq.finish_ns is None:
            return False
        gaps = seq.num_completion_tokens - 1
        took_ns = {
            "ttft": float(seq.first_token_ns - seq.arrival_ns),
            "tpot": (seq.finish_ns - seq.first_token_ns) / gaps if gaps else 0.0,
            "e2e": float(seq.finish_ns - seq.arrival_ns),
        }
        if seq.first_scheduled_ns is not None:
            took_ns["queue"] = float(seq.first_scheduled_ns - seq.arrival_ns)
        return all(took_ns[name] <= limit_s * 1e9 for name, limit_s in self.of)


class Attainment:
    """Counts the requests of a run that keep limits."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._kept = self._tokens = 0

    def ended(self, seq: Sequence | Outcome) -> None:
        """Take in a sequence that has ended."""
        if self.limits.kept(seq):
            self._kept += 1
            self._tokens += seq.num_completion_tokens

    def of(self, summary: dict[str, Any]) -> dict[str, Any]:
        """What of a run, whose summary is given, kept the limits, see `metrics.attainment`."""
        return {"limits": str(self.limits), **attainment(self._kept, self._tokens, summary)}
