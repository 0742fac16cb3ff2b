"""Metrics: one definition of each number, for the simulator and for the real engine.

Times in the rows are integer nanoseconds, in the results seconds. A number that is not defined (the time between tokens
of one-token answers, a percentile of nothing) is None, never 0.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from operator import mul
from typing import Any

import numpy as np

from twinserve.policies import Batch
from twinserve.policies.core import Span
from twinserve.traces.runs.digest import Exceptions

Row = dict[str, Any]
Column = Any
"""A list of integers, or an int64 array."""

SERVED = ("stop", "length")
"""How requests end whose latencies count."""

PERCENTILES = (50, 90, 95, 99)
"""Those of every distribution."""

PREFILL, DECODE = "prefill", "decode"
"""Stages of a request whose prompt is computed on one replica, and whose answer behind the first token on another."""

_DELTAS = ("preempted", "admitted", "rows", "usual")
_LOADS = ("left", "tokens", "waiting", "running")
_BINS, _IN_A_BIN = 1 << 16, 1 << 6
_CHUNK = 1 << 17
_PIECE = 1 << 14


def is_handed_over(row: Row) -> bool:
    """Was the prompt of a request computed here, and does another replica go on with it?"""
    return row.get("stage") == PREFILL and row["finish_reason"] in SERVED


def summarize(
    requests: Iterable[Row], steps: list[Row], *, world: str | None = None, wall_s: float | None = None
) -> dict[str, Any]:
    """Every metric of a run, from its rows; see `RunMetrics.summary`.

    Args:
        requests: rows of requests.jsonl.
        steps: rows of steps.jsonl, in the order of the decisions, as they lie there or a row a step.
        world: "sim" or "real", handed through.
        wall_s: seconds that the run took on a wall clock, handed through.
    """
    return summary_of(metrics_of(requests, steps).whole, world=world, wall_s=wall_s)


def metrics_of(requests: Iterable[Row], steps: list[Row]) -> RunMetrics:
    """The metrics of a run from its rows, see `summarize`."""
    metrics = RunMetrics()
    for row in requests:
        metrics.request(row)
        if row["finish_reason"] in SERVED:
            is_begun = row.get("stage") == DECODE
            begun_ns = row["first_token_ns"] if is_begun else None
            metrics.gaps.begin(row["id"], row["output_tokens"] - is_begun, begun_ns)
    metrics.steps = sum(row["count"] for row in steps)
    metrics.events = len(steps)
    if _have(steps, _DELTAS):
        for row in steps:
            metrics.gaps.row(row)
    if _have(steps, _LOADS):
        for row in steps:
            metrics.waits.row(row)
    for row in steps:
        metrics.drafts.row(row)
    return metrics


def token_gaps(output_tokens: Mapping[int, int], steps: list[Row]) -> dict[int, int]:
    """How often each gap, in nanoseconds, lies between successive tokens of a request.

    Args:
        output_tokens: tokens that came out, by id of the request; others are left out. A token that a request samples
            beyond them was discarded (its end was found one step late) and does not count.
        steps: rows of steps.jsonl; where one lacks decisions nothing can be said, and the result is empty.
    """
    gaps = TokenGaps()
    for seq_id, count in output_tokens.items():
        gaps.begin(seq_id, count)
    if _have(steps, _DELTAS):
        for row in steps:
            gaps.row(row)
    return gaps.counts()


def _have(steps: list[Row], fields: Seq[str]) -> bool:
    return all(name in row for row in steps for name in fields)


@dataclass
class DraftCounts:
    """What came of the drafts of a run.

    Attributes:
        drafts: rows that had any.
        tokens: draft tokens that were computed, by position in their row.
        accepted: those of them that were right, thrown away ones behind an end among them.
        made: tokens that those rows gave.
    """

    drafts: int = 0
    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    made: int = 0

    def row(self, row: Row) -> None:
        """Take in the next step, told as its row in steps.jsonl."""
        if "drafts" in row:
            for (_, number), (_, made, _) in zip(row["drafts"], row.get("runs", ()), strict=False):
                self.add(number, made)

    def add(self, number: int, made: int) -> None:
        """Take in a row with so many drafts that gave so many tokens."""
        while len(self.tokens) < number:
            self.tokens.append(0)
            self.accepted.append(0)
        for position in range(number):
            self.tokens[position] += 1
            self.accepted[position] += position < made - 1
        self.drafts += 1
        self.made += made


def speculation_of(parts: Iterable[DraftCounts]) -> dict[str, Any] | None:
    """What came of the drafts of a run, or of the replicas of a fleet together; None without drafts.

    - `drafts`: rows that had any; `draft_tokens` were computed in them, `accepted_tokens` were right, the others
      `wasted_tokens`. `acceptance_rate` is the share of those that were right.
    - `acceptance_by_position`: of the rows with a draft at a position, the share in which it and all before it were
      right.
    - `tokens_per_step`: tokens that such a row gave, on average.
    """
    total = DraftCounts()
    for part in parts:
        total.drafts += part.drafts
        total.made += part.made
        missing = len(part.tokens) - len(total.tokens)
        total.tokens += [0] * missing
        total.accepted += [0] * missing
        for position, number in enumerate(part.tokens):
            total.tokens[position] += number
            total.accepted[position] += part.accepted[position]
    if not total.drafts:
        return None
    tokens, accepted = sum(total.tokens), sum(total.accepted)
    return {
        "drafts": total.drafts,
        "draft_tokens": tokens,
        "accepted_tokens": accepted,
        "wasted_tokens": tokens - accepted,
        "acceptance_rate": accepted / tokens,
        "acceptance_by_position": [right / number for right, number in zip(total.accepted, total.tokens, strict=True)],
        "tokens_per_step": total.made / total.drafts,
    }


@dataclass
class RunMetrics:
    """The metrics of a run, taken in as it goes on, in a few bytes a request and a step.

    Attributes:
        steps: steps executed.
        events: rows that say them.
        gaps: between tokens; told of requests by itself.
        waits: of the device for the host.
        drafts: what came of them.
        handed_over: of requests whose prompts were computed here, and that another replica has answered.
    """

    requests: int = 0
    reasons: Counter[str | None] = field(default_factory=Counter)
    shortened: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    events: int = 0
    first_arrival_ns: int | None = None
    last_finish_ns: int | None = None
    ttft: array[int] = field(default_factory=lambda: array("q"))
    tpot: array[float] = field(default_factory=lambda: array("d"))
    e2e: array[int] = field(default_factory=lambda: array("q"))
    handed_over: RunMetrics | None = None

    def __post_init__(self) -> None:
        self.gaps = TokenGaps()
        self.waits = DeviceWaits()
        self.drafts = DraftCounts()

    @property
    def whole(self) -> list[RunMetrics]:
        """What to sum up for all that this replica did, for itself; a fleet's requests are counted where they end."""
        return [self] if self.handed_over is None else [self, self.handed_over]

    def _span(self, arrival_ns: int, finish_ns: int | None) -> None:
        """Widen the duration, so that it holds these."""
        if self.first_arrival_ns is None or arrival_ns < self.first_arrival_ns:
            self.first_arrival_ns = arrival_ns
        if finish_ns is not None and (self.last_finish_ns is None or finish_ns > self.last_finish_ns):
            self.last_finish_ns = finish_ns

    @property
    def duration_ns(self) -> int | None:
        """From the first arrival to the last finish of a finished request; None where there is none."""
        if self.first_arrival_ns is None or self.last_finish_ns is None:
            return None
        return self.last_finish_ns - self.first_arrival_ns

    def step(self, batch: Batch, exceptions: Exceptions, repeats: Row | None) -> None:
        """Take in the next step, or those that share its row: `repeats` is what the row says of those behind it."""
        self.steps += 1
        self.events += 1
        end_ns = batch.end_ns or 0
        sampled = [(row.seq.seq_id, int(row.samples)) for row in batch.admitted]
        sampled += [(seq.seq_id, int(samples)) for seq, _, samples in exceptions]
        if batch.runs:
            kept = {seq.seq_id: number for seq, _, number in batch.runs}
            sampled = [(seq_id, kept.get(seq_id, samples)) for seq_id, samples in sampled]
            for number, (_, made, _) in zip(batch.drafts.values(), batch.runs, strict=False):
                self.drafts.add(number, made)
        self.gaps.step(end_ns, batch.usual_tokens > 0, [seq.seq_id for seq in batch.preempted], sampled)
        span = batch.decided_ns, batch.start_ns or 0, end_ns
        self.waits.step(batch.num_tokens, span, len(batch.left), batch.num_waiting, batch.num_running)
        if repeats is not None:
            periods_ns = repeats["end_ns"]
            last_ns = end_ns + total_of(periods_ns)
            self.steps += len(periods_ns)
            self.gaps.repeat(periods_ns, last_ns, batch.usual_tokens > 0)
            self.waits.repeat(repeats, span, last_ns)

    def request(self, row: Row) -> None:
        """Take in a request that has ended, or that was left unanswered."""
        is_served, arrival_ns = row["finish_reason"] in SERVED, row["arrival_ns"]
        self.preemptions += row["preemptions"]
        self._span(arrival_ns, row["finish_ns"] if is_served else None)
        if is_handed_over(row):
            if self.handed_over is None:
                self.handed_over = RunMetrics()
            self.handed_over.request(row | {"stage": None, "preemptions": 0})
            return
        self.requests += 1
        self.reasons[row["finish_reason"]] += 1
        if not is_served:
            return
        first_ns, finish_ns, output_tokens = row["first_token_ns"], row["finish_ns"], row["output_tokens"]
        self.prompt_tokens += row["prompt_tokens"]
        self.output_tokens += output_tokens
        self.cached_tokens += row["cached_tokens"]
        self.shortened += row["finish_reason"] == "length" and output_tokens < row["max_tokens"]
        self.ttft.append(first_ns - arrival_ns)
        self.e2e.append(finish_ns - arrival_ns)
        if output_tokens > 1:
            self.tpot.append((finish_ns - first_ns) / (output_tokens - 1))


def summary_of(parts: Seq[RunMetrics], *, world: str | None = None, wall_s: float | None = None) -> dict[str, Any]:
    """Every metric of a run, or of the replicas of a fleet together.

    Latencies, token sums and throughputs are those of the finished requests: the ones that ended by "stop" or "length".

    - `requests` came in; of them `finished`, `refused` and `aborted` ended so; `shortened` ended by "length" with fewer
      tokens than they asked for, because of max_model_len.
    - `duration_s`: from the first arrival to the last finish.
    - `output_tok_s` = output tokens / duration; `total_tok_s` = (prompt + output tokens) / duration.
    - `ttft_s`, time to first token = first token - arrival.
    - `tpot_s`, time per output token = (finish - first token) / (output tokens - 1), of answers longer than one token.
    - `itl_s`, inter-token latency: the gaps between successive tokens, each token counted at the end of the step that
      sampled it (see `token_gaps`); undefined where the steps lack decisions.
    - `e2e_s`, end to end = finish - arrival.
    - `cached_tokens`: prompt tokens found in the prefix cache at the first admission. `preemptions`: of all requests.
    - `device_wait_share`: the share of the duration in which the device had work to do but stood idle, waiting for the
      host (see `DeviceWaits`); of a fleet, of the durations of its replicas, added up. Undefined where the steps lack
      decisions.
    - `steps`: steps executed; `events`: rows that say them.
    - `speculation`: see `speculation_of`; only where there were drafts.

    Args:
        parts: whose requests and steps are counted as one run's.
        world: "sim" or "real", handed through.
        wall_s: seconds that the run took on a wall clock, handed through.
    """

    def total(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    reasons = sum((part.reasons for part in parts), Counter[str | None]())
    prompt_tokens, output_tokens = total("prompt_tokens"), total("output_tokens")
    finishes = [part.last_finish_ns for part in parts if part.last_finish_ns is not None]
    duration_s = None
    if finishes:
        duration_s = (max(finishes) - min(p.first_arrival_ns for p in parts if p.first_arrival_ns is not None)) / 1e9
    waits = [(part.waits.total_ns, part.duration_ns) for part in parts]
    known = [(wait_ns, own_ns) for wait_ns, own_ns in waits if wait_ns is not None and own_ns]
    speculation = speculation_of(part.drafts for part in parts)
    return {
        "world": world,
        "requests": total("requests"),
        "finished": sum(reasons[reason] for reason in SERVED),
        "refused": reasons["refused"],
        "aborted": reasons["abort"],
        "shortened": total("shortened"),
        "duration_s": duration_s,
        "output_tok_s": output_tokens / duration_s if duration_s else None,
        "total_tok_s": (prompt_tokens + output_tokens) / duration_s if duration_s else None,
        "ttft_s": distribution(*(part.ttft for part in parts)),
        "tpot_s": distribution(*(part.tpot for part in parts)),
        "itl_s": distribution(*(values for part in parts for values in part.gaps.values())),
        "e2e_s": distribution(*(part.e2e for part in parts)),
        "cached_tokens": total("cached_tokens"),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "preemptions": total("preemptions"),
        "device_wait_share": sum(wait for wait, _ in known) / sum(own for _, own in known) if known else None,
        "steps": total("steps"),
        "events": total("events"),
        "wall_s": wall_s,
        **({"speculation": speculation} if speculation else {}),
    }


def attainment(requests: int, tokens: int, summary: Row) -> dict[str, float | None]:
    """What became of requests that kept limits, in a run whose summary is given.

    `share` is that of all requests that came, those not served or turned away included; `goodput_req_s` and
    `goodput_tok_s` are the requests, and their output tokens, over the run's duration (DistServe, OSDI 2024).

    Args:
        requests: how many kept the limits.
        tokens: how many tokens those put out.
    """
    came, duration_s = summary["requests"] + summary.get("rejected", 0), summary["duration_s"]
    return {
        "share": requests / came if came else None,
        "goodput_req_s": requests / duration_s if duration_s else None,
        "goodput_tok_s": tokens / duration_s if duration_s else None,
    }


def total_of(column: Column) -> int:
    """The sum of a list, or of a column of a long one."""
    return sum(column) if isinstance(column, list) else int(np.add.reduce(column))


Values = array | tuple[array, array]
"""Values in nanoseconds; or values, and how often each occurs."""


def distribution(*parts: Values) -> dict[str, float | None]:
    """Mean and percentiles, in seconds, of all values together.

    With n values x[0] <= x[1] <= ..., the percentile p is x[i] + (x[i + 1] - x[i]) * f, where i and f are the whole
    and the fractional part of p / 100 * (n - 1): linear interpolation, numpy's default.
    """
    result: dict[str, float | None] = dict.fromkeys(("mean", *(f"p{p}" for p in PERCENTILES)))
    pairs: list[tuple[array, array | None]] = []
    for part in parts:
        values, counts = part if isinstance(part, tuple) else (part, None)
        if values:
            pairs.append((values, counts))
    size = sum([len(values) if counts is None else _number_of(counts) for values, counts in pairs])
    if not size:
        return result
    is_exact = all(values.typecode == "q" for values, _ in pairs)
    sums = [_sum_of(values, counts) for values, counts in pairs]
    result["mean"] = (float(sum(sums)) if is_exact else math.fsum(sums)) / size / 1e9
    ranks = {p: p / 100 * (size - 1) for p in PERCENTILES}
    wanted = {math.floor(rank) for rank in ranks.values()}
    found = _values_at(pairs, sorted(wanted | {min(below + 1, size - 1) for below in wanted}))
    for p, rank in ranks.items():
        below = math.floor(rank)
        result[f"p{p}"] = interpolated(found[below], found[min(below + 1, size - 1)], rank - below) / 1e9
    return result


def interpolated(low: float, high: float, fraction: float) -> float:
    """What lies between two values, measured from the nearer end, as numpy does: the two agree to the last bit."""
    return high - (high - low) * (1 - fraction) if fraction >= 0.5 else low + (high - low) * fraction


def _number_of(counts: array) -> int:
    return int(np.add.reduce(np.frombuffer(counts, np.int32), dtype=np.int64))


def _sum_of(values: array, counts: array | None) -> float:
    """The sum of values, each as often as it occurs; of whole ones exactly."""
    if values.typecode != "q":
        return math.fsum(values if counts is None else map(mul, values, counts))
    if counts is None:
        return sum(values)
    columns = np.frombuffer(values, np.int64), np.frombuffer(counts, np.int32).astype(np.int64)
    most = int(np.abs(columns[0]).max()) * int(columns[1].max()) * len(values)
    return int(np.dot(*columns)) if most < 1 << 63 else sum(map(mul, values, counts))


def _values_at(pairs: list[tuple[array, array | None]], ranks: list[int]) -> dict[int, float]:
    """The values at some ranks of all values, sorted.

    Values are counted in bins that rise with them; only the bins in which a rank falls are sorted, so that millions of
    values take no more memory than they lie in.
    """
    columns = []
    num_bins = max(1, min(_BINS, sum([len(values) for values, _ in pairs]) // _IN_A_BIN))
    for values, counts in pairs:
        held = np.frombuffer(values, np.int64 if values.typecode == "q" else np.float64)
        weights = None if counts is None else np.frombuffer(counts, np.int32)
        for begin in range(0, len(held), _CHUNK):
            columns.append((held[begin : begin + _CHUNK], None if weights is None else weights[begin : begin + _CHUNK]))
    least = min(column.min() for column, _ in columns)
    width = float(max(column.max() for column, _ in columns) - least)
    scale = (num_bins - 1) / width if width else 0.0
    totals = np.zeros(num_bins)
    for column, weights in columns:
        totals += np.bincount(((column - least) * scale).astype(np.int64), weights, num_bins)
    ends = np.cumsum(totals)
    found: dict[int, float] = {}
    wanted = sorted({int(np.searchsorted(ends, rank, "right")) for rank in ranks})
    held_in: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {bin_number: [] for bin_number in wanted}
    for column, weights in columns:
        bins = ((column - least) * scale).astype(np.int64)
        for bin_number in wanted:
            inside = bins == bin_number
            chosen = column[inside]
            repeated = np.ones(len(chosen), np.int32) if weights is None else weights[inside]
            held_in[bin_number].append((chosen, repeated))
    for bin_number in wanted:
        inner = np.concatenate([chosen for chosen, _ in held_in[bin_number]])
        order = np.argsort(inner, kind="stable")
        before = ends[bin_number - 1] if bin_number else 0
        own_ends = np.cumsum(np.concatenate([repeated for _, repeated in held_in[bin_number]])[order]) + before
        for rank in ranks:
            if before <= rank < ends[bin_number]:
                found[rank] = inner[order[np.searchsorted(own_ends, rank, "right")]].item()
    return found


class _Gaps:
    """Gaps, and how often each occurs, in pieces: arrays that grow to millions leave as much unused memory behind them.

    A place says a piece and how many gaps of it come before.
    """

    def __init__(self) -> None:
        self.pieces = [(array("q"), array("i"))]

    @property
    def end(self) -> tuple[int, int]:
        """The place of the next gap."""
        return len(self.pieces) - 1, len(self.pieces[-1][0])

    def add(self, gaps_ns: Column, times: int) -> None:
        """Add gaps that occur so many times each."""
        if len(self.pieces[-1][0]) >= _PIECE:
            self.pieces.append((array("q"), array("i")))
        gaps, counts = self.pieces[-1]
        if len(gaps_ns) == 1:
            gaps.append(gaps_ns[0])
            counts.append(times)
        else:
            gaps.frombytes(np.asarray(gaps_ns, np.int64).tobytes())
            counts.extend(array("i", (times,)) * len(gaps_ns))

    def take_back(self, begin: tuple[int, int], end: tuple[int, int]) -> None:
        """Count the gaps between two places once less."""
        for piece in range(begin[0], end[0] + 1):
            counts = self.pieces[piece][1]
            for number in range(begin[1] if piece == begin[0] else 0, end[1] if piece == end[0] else len(counts)):
                counts[number] -= 1


class _Answer:
    """A request whose gaps are being counted.

    Attributes:
        missing: tokens that it may still get; not kept up while it is in the group.
        last_ns: when it got its last one; not kept up while it is in the group.
        last_tick: of the group, the one that brings its last token; None while it is not in the group.
        joined: the place of the group's next gap when it joined.
        shared: of the group's gaps, those that it had, from and to.
        own: the numbers of the gaps that it had by itself.
    """

    def __init__(self, missing: int, last_ns: int | None):
        self.missing, self.last_ns = missing, last_ns
        self.last_tick: int | None = None
        self.joined = (0, 0)
        self.shared: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self.own: list[int] = []


class TokenGaps:
    """The gaps between successive tokens of each request, as steps say them. Costs what changes from step to step.

    Requests whose last token came at the same step form a group: one entry counts the next gap of all of them. The
    others are `loose` while they run.
    """

    def __init__(self) -> None:
        self._answers: dict[int, _Answer] = {}
        self._loose: dict[int, None] = {}
        self._group_size = 0
        self._group_ends: dict[int, list[int]] = defaultdict(list)
        self._group_last_ns = 0
        self._tick = 0
        self._group_gaps = _Gaps()
        self._own_gaps, self._own_counts = array("q"), array("i")

    def values(self) -> list[tuple[array, array]]:
        """All gaps, in nanoseconds, and how often each occurs."""
        passed = [
            seq_id for seq_id, a in self._answers.items() if a.last_tick is not None and a.last_tick <= self._tick
        ]
        assert not passed, f"requests {passed} got their last token within repeated steps, before {self._tick}"
        return [*self._group_gaps.pieces, (self._own_gaps, self._own_counts)]

    def counts(self) -> dict[int, int]:
        """How often each gap occurs."""
        counts: Counter[int] = Counter()
        for gaps, occurrences in self.values():
            for gap, occurs in zip(gaps, occurrences, strict=True):
                counts[gap] += occurs
        return +counts

    def begin(self, seq_id: int, most_tokens: int, last_ns: int | None = None) -> None:
        """A request comes that gets at most so many tokens; the gaps of others are not counted. One that has got tokens
        elsewhere got its last one at `last_ns`."""
        if most_tokens:
            self._answers[seq_id] = _Answer(most_tokens, last_ns)

    def end(self, seq_id: int, *, counts: bool) -> None:
        """A request has its last token; unless it `counts`, its gaps are taken back."""
        answer = self._answers.get(seq_id)
        if answer is None:
            return
        self._leave(answer)
        del self._answers[seq_id]
        self._loose.pop(seq_id, None)
        if not counts:
            for begin, end in answer.shared:
                self._group_gaps.take_back(begin, end)
            for number in answer.own:
                self._own_counts[number] = 0

    def row(self, row: Row) -> None:
        """Take in the next step, or several that share a row, told as their row in steps.jsonl."""
        named: list[list[int]] = row["admitted"] + row["rows"]
        sampled = [(entry[0], entry[-1]) for entry in named]
        if "runs" in row:
            kept = {seq_id: number for seq_id, _, number in row["runs"]}
            sampled = [(seq_id, kept.get(seq_id, samples)) for seq_id, samples in sampled]
        self.step(row["end_ns"], bool(row["usual"]), row["preempted"], sampled)
        if "repeats" in row:
            periods_ns = row["repeats"]["end_ns"]
            self.repeat(periods_ns, row["end_ns"] + total_of(periods_ns), bool(row["usual"]))

    def step(self, end_ns: int, usual: bool, preempted: list[int], rows: list[tuple[int, int]]) -> None:
        """Take in the next step.

        Args:
            usual: do those that run and are not named sample a token?
            preempted: requests that no longer run.
            rows: requests that are named, and how many they get.
        """
        for seq_id in preempted:
            self._take_out(seq_id)
        sampling: list[int] = []
        idle: list[int] = []
        for seq_id, number in rows:
            self._take_out(seq_id)
            (sampling if number else idle).append(seq_id)
            if number > 1:
                self._sample_run(seq_id, number - 1, end_ns)
        if usual:
            sampling += self._loose
            self._loose.clear()
            self._sample_group([end_ns - self._group_last_ns], end_ns)
        for seq_id in sampling:
            self._sample(seq_id, end_ns, joins=usual)
        for seq_id in idle:
            if seq_id in self._answers:
                self._loose[seq_id] = None

    def repeat(self, periods_ns: Column, end_ns: int, usual: bool) -> None:
        """Take in steps that repeat the one before: nobody ends, is admitted or preempted between them.

        Args:
            periods_ns: of each, the time from the end of the one before to its own.
            end_ns: of the last.
        """
        if usual:
            self._sample_group(periods_ns, end_ns)

    def _take_out(self, seq_id: int) -> None:
        """Take a request out of the group, or from among the loose ones."""
        self._loose.pop(seq_id, None)
        answer = self._answers.get(seq_id)
        if answer is not None:
            self._leave(answer)

    def _leave(self, answer: _Answer) -> None:
        if answer.last_tick is not None:
            answer.missing = answer.last_tick - self._tick
            answer.last_ns = self._group_last_ns
            answer.last_tick = None
            answer.shared.append((answer.joined, self._group_gaps.end))
            self._group_size -= 1

    def _sample_group(self, gaps_ns: Column, end_ns: int) -> None:
        """Each request of the group gets a token after each of these gaps; those that got their last one leave."""
        if self._group_size:
            self._group_gaps.add(gaps_ns, self._group_size)
        self._group_last_ns = end_ns
        self._tick += len(gaps_ns)
        for seq_id in self._group_ends.pop(self._tick, ()):
            answer = self._answers.get(seq_id)
            if answer is not None and answer.last_tick == self._tick:
                self._leave(answer)
                del self._answers[seq_id]

    def _sample_run(self, seq_id: int, number: int, end_ns: int) -> None:
        """A request gets so many tokens before the last one that it gets in a step."""
        for _ in range(number):
            self._sample(seq_id, end_ns, joins=False)
            self._loose.pop(seq_id, None)

    def _sample(self, seq_id: int, end_ns: int, *, joins: bool) -> None:
        """A request outside the group gets a token; it `joins` the group if the group got one too."""
        answer = self._answers.get(seq_id)
        if answer is None:
            return
        if answer.last_ns is not None:
            answer.own.append(len(self._own_gaps))
            self._own_gaps.append(end_ns - answer.last_ns)
            self._own_counts.append(1)
        answer.missing -= 1
        if not answer.missing:
            del self._answers[seq_id]
        elif joins:
            answer.last_tick = self._tick + answer.missing
            answer.joined = self._group_gaps.end
            self._group_size += 1
            self._group_ends[answer.last_tick].append(seq_id)
        else:
            answer.last_ns = end_ns
            self._loose[seq_id] = None


class DeviceWaits:
    """How long the device stood idle though it had work to do, told of the steps in order.

    The time between the end of a step and the start of the next counts if there was work all the while: the next had
    been decided by the end of the one before, or at each decision since then something was left of what ran or waited
    at the decision before it. So the first step after the system was empty does not count, which waited for a request.
    A step without tokens has no work for the device.

    Attributes:
        total_ns: in nanoseconds; None until a step is known.
    """

    def __init__(self) -> None:
        self.total_ns: int | None = None
        self._ended_ns: int | None = None
        self._had_work = False
        self._num_waiting = self._num_running = 0

    def row(self, row: Row) -> None:
        """Take in the next step, or several that share a row, told as their row in steps.jsonl."""
        span: Span = row["decided_ns"], row["start_ns"], row["end_ns"]
        self.step(row["tokens"], span, len(row["left"]), row["waiting"], row["running"])
        if "repeats" in row and row["tokens"]:
            self.repeat(row["repeats"], span, row["end_ns"] + total_of(row["repeats"]["end_ns"]))

    def step(self, num_tokens: int, span: Span, num_left: int, num_waiting: int, num_running: int) -> None:
        """Take in the next step.

        Args:
            num_left: sequences that left since the decision before it.
            num_waiting, num_running: behind its own decision.
        """
        ended_ns, total_ns = self._ended_ns, self.total_ns or 0
        self._had_work = self._had_work and is_work_left(self._num_waiting, self._num_running, num_left)
        if num_tokens:
            decided_ns, start_ns, end_ns = span
            if ended_ns is not None and start_ns > ended_ns and (self._had_work or decided_ns <= ended_ns):
                total_ns += start_ns - ended_ns
            self._ended_ns, self._had_work = end_ns, True
        self.total_ns, self._num_waiting, self._num_running = total_ns, num_waiting, num_running

    def repeat(self, repeats: Row, span: Span, last_ns: int) -> None:
        """Take in steps that repeat the one before, of this span, as a row says them; the last ends at `last_ns`."""
        _, start_ns, end_ns = span
        waits_ns = 0
        if "decided_ns" in repeats:
            for later_ns, period_ns in zip(repeats["start_ns"], repeats["end_ns"], strict=True):
                start_ns += later_ns
                waits_ns += max(0, start_ns - end_ns)
                end_ns += period_ns
        else:
            (lag_ns,) = repeats["start_ns"]
            waits_ns = max(0, lag_ns) * len(repeats["end_ns"])
        self.total_ns, self._ended_ns = (self.total_ns or 0) + waits_ns, last_ns


def stayed_busy(row: Row, following: Row) -> bool:
    """Was something left to do between these two decisions, so that the second did not wait for an arrival?"""
    return is_work_left(row["waiting"], row["running"], len(following["left"]))


def is_work_left(num_waiting: int, num_running: int, num_left: int) -> bool:
    """Is something left to do, if so many waited and ran behind a decision, and so many of them left?"""
    return num_waiting > 0 or num_running > num_left
