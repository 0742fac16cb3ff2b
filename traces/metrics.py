"""Metrics: one definition of each number, for the simulator and for the real engine.

Times in the rows are integer nanoseconds, in the results seconds. A number that is not defined (the time between tokens
of one-token answers, a percentile of nothing) is None, never 0.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

Row = dict[str, Any]

_DELTAS = ("preempted", "admitted", "rows", "usual")

STEP_FIELDS = ("end_ns", "count", *_DELTAS)
"""What `summarize` reads of a step's row."""


def summarize(
    requests: list[Row], steps: list[Row], *, world: str | None = None, wall_s: float | None = None
) -> dict[str, Any]:
    """Every metric of a run.

    Latencies, token sums and throughputs are those of the finished requests: the ones that ended by "stop" or "length".

    - `requests` came in; of them `finished`, `refused` and `aborted` ended so; `shortened` ended by "length" with fewer
      tokens than they asked for, because of max_model_len.
    - `duration_s`: from the first arrival to the last finish.
    - `output_tok_s` = output tokens / duration; `total_tok_s` = (prompt + output tokens) / duration.
    - `ttft_s`, time to first token = first token - arrival.
    - `tpot_s`, time per output token = (finish - first token) / (output tokens - 1), of answers longer than one token.
    - `itl_s`, inter-token latency: the gaps between successive tokens, each token counted at the end of the step that
      sampled it (see `token_gaps`); undefined where `steps` lacks decisions.
    - `e2e_s`, end to end = finish - arrival.
    - `cached_tokens`: prompt tokens found in the prefix cache at the first admission. `preemptions`: of all requests.
    - `steps`: steps executed; `events`: rows of `steps`.

    Args:
        requests: rows of requests.jsonl.
        steps: rows of steps.jsonl, in the order of the decisions.
        world: "sim" or "real", handed through.
        wall_s: seconds that the run took on a wall clock, handed through.
    """
    finished = [row for row in requests if row["finish_reason"] in ("stop", "length")]
    reasons = Counter(row["finish_reason"] for row in requests)
    prompt_tokens = sum(row["prompt_tokens"] for row in finished)
    output_tokens = sum(row["output_tokens"] for row in finished)
    duration_s = None
    if finished:
        first_ns = min(row["arrival_ns"] for row in requests)
        duration_s = (max(row["finish_ns"] for row in finished) - first_ns) / 1e9
    return {
        "world": world,
        "requests": len(requests),
        "finished": len(finished),
        "refused": reasons["refused"],
        "aborted": reasons["abort"],
        "shortened": sum(
            row["finish_reason"] == "length" and row["output_tokens"] < row["max_tokens"] for row in finished
        ),
        "duration_s": duration_s,
        "output_tok_s": output_tokens / duration_s if duration_s else None,
        "total_tok_s": (prompt_tokens + output_tokens) / duration_s if duration_s else None,
        **_latencies(finished, steps),
        "cached_tokens": sum(row["cached_tokens"] for row in finished),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "preemptions": sum(row["preemptions"] for row in requests),
        "steps": sum(row["count"] for row in steps),
        "events": len(steps),
        "wall_s": wall_s,
    }


def _latencies(finished: list[Row], steps: list[Row]) -> dict[str, dict[str, float | None]]:
    return {
        "ttft_s": distribution(row["first_token_ns"] - row["arrival_ns"] for row in finished),
        "tpot_s": distribution(
            (row["finish_ns"] - row["first_token_ns"]) / (row["output_tokens"] - 1)
            for row in finished
            if row["output_tokens"] > 1
        ),
        "itl_s": distribution(token_gaps({row["id"]: row["output_tokens"] for row in finished}, steps)),
        "e2e_s": distribution(row["finish_ns"] - row["arrival_ns"] for row in finished),
    }


def distribution(values_ns: Iterable[float] | Mapping[int, int]) -> dict[str, float | None]:
    """Mean and percentiles, in seconds, of values in nanoseconds, or of a mapping from values to how often they occur.

    With n values x[0] <= x[1] <= ..., the percentile p is x[i] + (x[i + 1] - x[i]) * f, where i and f are the whole
    and the fractional part of p / 100 * (n - 1): linear interpolation, numpy's default.
    """
    counts = Counter(values_ns)
    result: dict[str, float | None] = dict.fromkeys(("mean", "p50", "p90", "p99"))
    if not counts:
        return result
    values = sorted(counts)
    ends = list(accumulate(counts[value] for value in values))
    result["mean"] = math.fsum(value * count for value, count in counts.items()) / ends[-1] / 1e9
    for p in (50, 90, 99):
        result[f"p{p}"] = _percentile(values, ends, p) / 1e9
    return result


def _percentile(values: list[float], ends: list[int], p: int) -> float:
    """Percentile p of sorted values; value k stands at the ranks below ends[k] that the value before it leaves."""
    rank = p / 100 * (ends[-1] - 1)
    below = math.floor(rank)
    low = values[bisect_right(ends, below)]
    high = values[bisect_right(ends, min(below + 1, ends[-1] - 1))]
    fraction = rank - below
    # Measured from the nearer end, as numpy does, so that the two agree to the last bit.
    return high - (high - low) * (1 - fraction) if fraction >= 0.5 else low + (high - low) * fraction


def token_gaps(output_tokens: Mapping[int, int], steps: list[Row]) -> dict[int, int]:
    """How often each gap, in nanoseconds, lies between successive tokens of a request.

    Costs what changed from step to step, not what runs.

    Args:
        output_tokens: tokens that came out, by id of the request; others are left out. A token that a request samples
            beyond them was discarded (its end was found one step late) and does not count.
        steps: rows of steps.jsonl; where one lacks decisions nothing can be said, and the result is empty.
    """
    gaps = _TokenGaps(output_tokens)
    for row in steps:
        if any(field not in row for field in _DELTAS):
            return {}
        gaps.step(row)
    return gaps.counts


class _TokenGaps:
    """Follows who samples when, from a run's deltas.

    Requests whose last token came at the same step form a group: one entry counts the next gap of all of them. The
    others are `loose` while they run; a request's last token is in `_last_ns` while it is not in the group.
    """

    def __init__(self, output_tokens: Mapping[int, int]):
        self.counts: Counter[int] = Counter()
        self._missing = {seq_id: count for seq_id, count in output_tokens.items() if count}
        self._last_ns: dict[int, int] = {}
        self._loose: dict[int, None] = {}
        self._group: dict[int, int] = {}  # to the tick that brings the request's last token
        self._group_ends: dict[int, list[int]] = defaultdict(list)
        self._group_last_ns = 0
        self._tick = 0

    def step(self, row: Row) -> None:
        """Take in the next step."""
        end_ns = row["end_ns"]
        for seq_id in row["preempted"]:
            self._take_out(seq_id)
        sampling: list[int] = []
        idle: list[int] = []
        for seq_id, *_, samples in (*row["admitted"], *row["rows"]):
            self._take_out(seq_id)
            (sampling if samples else idle).append(seq_id)
        if row["usual"]:
            sampling += self._loose
            self._loose.clear()
            self._sample_group(end_ns)
        for seq_id in sampling:
            self._sample(seq_id, end_ns, joins=bool(row["usual"]))
        self._loose.update((seq_id, None) for seq_id in idle if seq_id in self._missing)

    def _take_out(self, seq_id: int) -> None:
        """Take a request out of the group, or from among the loose ones."""
        self._loose.pop(seq_id, None)
        last_tick = self._group.pop(seq_id, None)
        if last_tick is not None:
            self._missing[seq_id] = last_tick - self._tick
            self._last_ns[seq_id] = self._group_last_ns

    def _sample_group(self, end_ns: int) -> None:
        """Each request of the group gets a token; those that got their last one leave."""
        if self._group:
            self.counts[end_ns - self._group_last_ns] += len(self._group)
        self._group_last_ns = end_ns
        self._tick += 1
        for seq_id in self._group_ends.pop(self._tick, ()):
            if self._group.get(seq_id) == self._tick:
                del self._group[seq_id]

    def _sample(self, seq_id: int, end_ns: int, joins: bool) -> None:
        """A request outside the group gets a token; it `joins` the group if the group got one too."""
        if seq_id not in self._missing:
            return
        last_ns = self._last_ns.pop(seq_id, None)
        if last_ns is not None:
            self.counts[end_ns - last_ns] += 1
        missing = self._missing.pop(seq_id) - 1
        if not missing:
            return
        if joins:
            self._group[seq_id] = self._tick + missing
            self._group_ends[self._tick + missing].append(seq_id)
        else:
            self._missing[seq_id] = missing
            self._last_ns[seq_id] = end_ns
            self._loose[seq_id] = None
