"""What runs were asked to keep: an objective, whether a run keeps it, and which of its requests do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twinserve.reports.runs import Run
from twinserve.traces.runs.metrics import SERVED, attainment
from twinserve.traces.runs.tables import LATENCY_NS


@dataclass(frozen=True)
class Asked:
    """An objective, as a page judges runs by it.

    Attributes:
        text: the objective in words.
        limits_s: what a request may take at most by "ttft_s", "tpot_s" and "e2e_s"; a limit on a percentile of all
            requests is one on each of them here, which a few may miss.
        missed: given a summary that has `attainment`, what of the objective is missed, in words.
        terms_s: limits on metrics of the whole run by their dotted names, such as "ttft_s.p99".
        share: of the requests, those that have to keep the limits.
    """

    text: str
    limits_s: Mapping[str, float]
    missed: Callable[[dict[str, Any]], list[str]]
    terms_s: Mapping[str, float] = field(default_factory=dict)
    share: float | None = None

    def kept(self, run: Run) -> np.ndarray:
        """Of each of `run.requests`: was it served, within all limits?"""
        return np.array([self._is_kept(row) for row in run.requests], dtype=bool)

    def _is_kept(self, row: dict[str, Any]) -> bool:
        if row["finish_reason"] not in SERVED:
            return False
        took_ns = ((LATENCY_NS[name](row), limit_s) for name, limit_s in self.limits_s.items())
        return all(ns is None or ns <= limit_s * 1e9 for ns, limit_s in took_ns)

    def attainment(self, run: Run) -> dict[str, float | None]:
        """What of a run's requests keep the limits, see `metrics.attainment`."""
        kept = self.kept(run)
        tokens = sum(row["output_tokens"] for row, is_kept in zip(run.requests, kept, strict=True) if is_kept)
        return attainment(int(kept.sum()), tokens, run.summary)

    def missed_by(self, run: Run) -> list[str]:
        """What of the objective a run misses, in words; nothing where it keeps it."""
        return self.missed(run.summary | {"attainment": self.attainment(run)})
