"""FittedLatency: step costs linear in a few physical features, fitted from measured steps."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinserve.settings.errors import InputError
from twinserve.sim.latency import StepCost, StepFeatures

if TYPE_CHECKING:
    import numpy as np

SCHEMA = "twinserve-latency/1"
REGIMES = ("decode", "prompt", "eager")
PARTS = ("host", "device", "lead")
RANGE_FIELDS = ("seqs", "prompt_tokens", "decode_tokens", "kv_tokens")
FOLDS = 5
DRIFT_NS = 250_000_000
REWEIGHTINGS = 4


@dataclass(frozen=True)
class StepSample:
    """A measured step: its features and what it cost, in nanoseconds; None is what could not be seen.

    Attributes:
        host_ns, device_ns, lead_ns: as in StepCost.
        launch_ns: the part of host_ns that the launch takes; the rest is bookkeeping.
    """

    features: StepFeatures
    host_ns: int | None
    device_ns: int | None
    lead_ns: int | None = None
    launch_ns: int | None = None


def regime_of(features: StepFeatures, captured_tokens: int | None = None) -> str:
    """The name of a step's regime.

    "eager" for a step of more than `captured_tokens` tokens, which is launched kernel by kernel; else "decode" without
    prompt tokens, and "prompt" with some.
    """
    if captured_tokens is not None and features.tokens > captured_tokens:
        return "eager"
    return "prompt" if features.prompt_tokens else "decode"


def ramps(x: float, knots: Seq[int]) -> list[float]:
    """How far x has come between each knot and the next: 0 before, 1 after, beyond the last piece ever more.

    Non-negative coefficients on these make a rising piecewise linear function through the knots.
    """
    last = len(knots) - 2
    return [
        max(0.0, (x - low) / (high - low)) if i == last else min(1.0, max(0.0, (x - low) / (high - low)))
        for i, (low, high) in enumerate(zip(knots, knots[1:], strict=False))
    ]


def choose_knots(tokens: Seq[int]) -> list[int]:
    """The smallest and largest of the measured token counts, and those between that lie a factor of 1.3 apart."""
    ordered = sorted(set(tokens))
    knots = ordered[:1]
    for count in ordered[1:-1]:
        if count >= 1.3 * knots[-1] and 1.3 * count <= ordered[-1]:
            knots.append(count)
    return knots + ordered[-1:] if len(ordered) > 1 else [knots[0], knots[0] + 1]


def design_row(features: StepFeatures, part: str, knots: Seq[int]) -> list[float]:
    """The features that a cost is linear in; `coefficient_names` names them."""
    if part == "lead":
        return [1.0]
    if part == "host":
        return [1.0, features.seqs, features.tokens, features.arrived, features.left]
    pairs = features.attention_pairs if features.prompt_tokens else 0
    return [1.0, features.kv_tokens, pairs, features.seqs, features.sampled, *ramps(features.tokens, knots)]


def coefficient_names(part: str, knots: Seq[int]) -> list[str]:
    """Names of the coefficients, each in nanoseconds a unit; a ramp's is for the whole way to its knot."""
    if part == "lead":
        return ["constant"]
    if part == "host":
        return ["constant", "seq", "token", "arrived", "left"]
    return ["constant", "kv_token", "attention_pair", "seq", "sampled", *(f"tokens_to_{knot}" for knot in knots[1:])]


@dataclass
class FittedLatency:
    """Costs from a latency file.

    Attributes:
        data: the file's content (schema "twinserve-latency/1"). `captured_tokens`, where it is there, is the most
            tokens of a step that is launched as a captured graph; a part or a coefficient that is absent costs nothing.
        num_outside: steps made beyond the range that was measured (see `watch`).
        worst_excess: the largest ratio of a feature to the end of its range among them.
    """

    data: dict[str, Any]
    num_outside: int = 0
    worst_excess: float = 1.0
    _terms: dict[tuple[str, str], tuple[list[int], list[float]]] = field(default_factory=dict)
    _latest: tuple[tuple, tuple[int, float, int, float, float]] = ((), (0, 0.0, 0, 0.0, 0.0))

    def __post_init__(self) -> None:
        self._captured_tokens: int | None = self.data.get("captured_tokens")
        self._drift: list[float] = self.data.get("drift", [])
        for regime in REGIMES[: 2 if self._captured_tokens is None else 3]:
            for part in PARTS:
                fitted = self.data["regimes"][regime].get(part)
                if fitted is None and part != "lead":
                    raise KeyError(part)
                if fitted is not None:
                    knots, ns = fitted["knots"], fitted["ns"]
                    self._terms[regime, part] = knots, [ns.get(name, 0.0) for name in coefficient_names(part, knots)]

    @property
    def identity(self) -> str:
        """16 hex digits that only this content has."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def drift(self) -> list[float]:
        """How slow the host was, each for DRIFT_NS; see `with_drift`."""
        return self._drift

    def with_drift(self, levels: Seq[float]) -> FittedLatency:
        """The model whose host is slower and faster by these levels, each for DRIFT_NS; none is an even host.

        A shared machine's host is faster and slower for seconds at a time. A simulation goes through the levels in
        their order, again and again, by the time at which a step is decided.
        """
        return FittedLatency(self.data | {"drift": [round(level, 3) for level in levels]})

    def phases(self, count: int) -> list[FittedLatency]:
        """The same model, begun at so many places of its drift, evenly spaced.

        When another run's host will be slow is not known; the mean over phases is what is to be expected of it.
        """
        starts = [len(self._drift) * number // count for number in range(count)]
        return [self.with_drift(self._drift[start:] + self._drift[:start]) for start in starts]

    def with_captured_tokens(self, captured_tokens: int) -> FittedLatency:
        """The model of the same engine where its largest captured graph is of so many tokens.

        Raises:
            ValueError: the model knows no steps beyond captured graphs.
        """
        if self._captured_tokens is None:
            raise ValueError("this latency knows no steps beyond captured graphs, so it cannot have fewer of them")
        return FittedLatency(self.data | {"captured_tokens": captured_tokens})

    def step_cost(self, features: StepFeatures) -> StepCost:
        """What a step with these features costs."""
        regime = regime_of(features, self._captured_tokens)
        host, device, lead, kv_token_ns, pair_ns = self._parts_of(regime, features)
        device_ns = round(device + (features.kv_tokens * kv_token_ns + features.attention_pairs * pair_ns))
        if self._drift:
            level = self._drift[features.decided_ns // DRIFT_NS % len(self._drift)]
            host, lead = round(host * level), round(lead * level)
        return StepCost(host, device_ns, lead)

    def repeated_costs(self, features: StepFeatures, num_new_pairs: int, count: int) -> tuple[int, np.ndarray] | None:
        """See RepeatedCosts; None where the host drifts, or a step begins before it is launched."""
        import numpy as np

        first = features.repeated(1, num_new_pairs, 0)
        regime = regime_of(first, self._captured_tokens)
        host, device, lead, kv_token_ns, pair_ns = self._parts_of(regime, first)
        if self._drift or lead:
            return None
        numbers = np.arange(count)
        kv_tokens = first.kv_tokens + features.tokens * numbers
        pairs = first.attention_pairs + num_new_pairs * numbers
        return host, np.rint(device + (kv_tokens * kv_token_ns + pairs * pair_ns)).astype(np.int64)

    def _parts_of(self, regime: str, features: StepFeatures) -> tuple[int, float, int, float, float]:
        """Nanoseconds: of the host; of the device, whatever the contexts; of the lead; of a context token, and of a
        query-key pair."""
        short = features._replace(decision=0, kv_tokens=0, attention_pairs=0, decided_ns=0)
        known, parts = self._latest
        if short != known:
            host, device, lead = (self._cost(regime, part, short) for part in PARTS)
            _, kv_token_ns, pair_ns = self._terms[regime, "device"][1][:3]
            parts = round(host), device, round(lead), kv_token_ns, pair_ns if features.prompt_tokens else 0.0
            self._latest = short, parts
        return parts

    def _cost(self, regime: str, part: str, features: StepFeatures) -> float:
        if (regime, part) not in self._terms:
            return 0.0
        knots, coefficients = self._terms[regime, part]
        row = design_row(features, part, knots)
        return sum(x * ns for x, ns in zip(row, coefficients, strict=True))

    def watch(self, features: StepFeatures, count: int = 1) -> None:
        """Note that steps were made, as far as they lie beyond what was measured: one with these features, and those
        that repeat it, whose contexts have each row's tokens more from step to step."""
        tops = self.data["range"][regime_of(features, self._captured_tokens)]
        excess = max(getattr(features, name) / max(1, top) for name, (_, top) in tops.items() if name != "kv_tokens")
        top = max(1, tops["kv_tokens"][1])
        last = features.kv_tokens + (count - 1) * features.tokens
        longest = max(excess, last / top)
        if longest > 1.0:
            within = 0 if excess > 1.0 else max(0, (top - features.kv_tokens) // features.tokens + 1)
            self.num_outside += count - within
            self.worst_excess = max(self.worst_excess, longest)

    @classmethod
    def load(cls, path: Path) -> FittedLatency:
        """Read a latency file.

        Raises:
            InputError: it cannot be read, or is not a latency file of this schema.
        """
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", path=path) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"expected JSON: {error}", path=path) from error
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise InputError(f"expected {SCHEMA!r}", path=path, field="schema", value=found)
        try:
            return cls(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"expected a latency file as `twinserve profile` writes it, lacks {error}", path=path
            ) from error

    def save(self, path: Path) -> None:
        """Write the latency file; a new file only."""
        with path.open("x") as file:
            json.dump(self.data, file, indent=1)
            file.write("\n")


def fit(
    samples: list[StepSample], about: dict[str, Any], captured_tokens: int | None = None, *, holds_out: bool = True
) -> FittedLatency:
    """Fit what steps cost in each regime, non-negative, on relative error.

    Coefficients come from non-negative least squares. A row is divided by the cost that the fit before it gave, which
    makes errors relative and sums right: dividing by the measured cost would pull the fit to the cheap steps.
    Residuals are those of shapes held out of the fit (5 folds over shapes) and say how well the model predicts what it
    has not seen.

    Args:
        samples: measured steps; None where a part was not seen.
        about: what was measured, where and with what; copied into the file.
        captured_tokens: the most tokens of a step that is launched as a captured graph; None where none is.
        holds_out: work out the residuals too.

    Raises:
        ValueError: a regime has fewer than 2 shapes.
    """
    data: dict[str, Any] = {"schema": SCHEMA, "about": about, "regimes": {}, "residuals": {}, "range": {}}
    if captured_tokens is not None:
        data["captured_tokens"] = captured_tokens
    bookkeeping = _by_shape(samples, "bookkeeping")
    for regime in REGIMES[: 2 if captured_tokens is None else 3]:
        mine = [sample for sample in samples if regime_of(sample.features, captured_tokens) == regime]
        fitted, residuals = {}, {}
        for part in PARTS:
            shapes = _by_shape(mine, part)
            if part == "lead" and not shapes:
                continue
            if len(shapes) < 2:
                raise ValueError(f"{len(shapes)} shapes were measured for {regime} steps, expected at least 2")
            if part == "host" and bookkeeping:
                solve = partial(_solve_host, bookkeeping, _by_shape(mine, "launch"), regime)
            else:
                solve = partial(_solve, part=part)
            knots, coefficients = solve(shapes)
            names = coefficient_names(part, knots)
            fitted[part] = {"knots": knots, "ns": dict(zip(names, coefficients, strict=True))}
            if holds_out:
                residuals[part] = _held_out_errors(shapes, part, solve)
        data["regimes"][regime] = fitted
        features = {sample.features for sample in mine}
        data["residuals"][regime] = residuals | {"shapes": len(features), "samples": len(mine)}
        data["range"][regime] = {
            name: [min(values), max(values)]
            for name in RANGE_FIELDS
            if (values := [getattr(shape, name) for shape in features])
        }
    return FittedLatency(data)


Shapes = dict[StepFeatures, list[int]]
"""What steps of equal features cost, in one of their parts."""

Solution = tuple[list[int], list[float]]
"""Knots and coefficients."""


def _by_shape(samples: list[StepSample], part: str) -> Shapes:
    shapes: Shapes = defaultdict(list)
    for sample in samples:
        if part == "bookkeeping":
            known = sample.host_ns is not None and sample.launch_ns is not None
            cost = sample.host_ns - sample.launch_ns if known else None  # type: ignore[operator]
        else:
            cost = getattr(sample, f"{part}_ns")
        if cost is not None:
            shapes[sample.features._replace(decision=0, decided_ns=0)].append(cost)
    return dict(shapes)


def _solve(shapes: Shapes, part: str) -> Solution:
    """Knots and coefficients for one part of one regime."""
    knots = choose_knots([features.tokens for features in shapes])
    return knots, _least_squares(shapes, lambda features: design_row(features, part, knots))


def _solve_host(bookkeeping: Shapes, launches: Shapes, regime: str, shapes: Shapes) -> Solution:
    """The host's coefficients where launches were measured, from those of `shapes` alone.

    Bookkeeping costs the same whatever the regime. What a launch takes is a constant, and for a captured decode step a
    constant and a cost a row: a host that happens to be slow lets the queue grow, so that over a run slow launches go
    with many rows and tokens, though neither makes them slow.
    """
    kept = {
        features: costs for features, costs in bookkeeping.items() if features in shapes or features not in launches
    }
    coefficients = _least_squares(kept, lambda features: design_row(features, "host", []))
    width = 2 if regime == "decode" else 1
    measured = {features: costs for features, costs in launches.items() if features in shapes}
    for index, ns in enumerate(_least_squares(measured, lambda features: design_row(features, "host", [])[:width])):
        coefficients[index] += ns
    return [], coefficients


def _least_squares(shapes: Shapes, row_of: Callable[[StepFeatures], list[float]]) -> list[float]:
    """Non-negative coefficients by relative error."""
    import numpy as np
    from scipy.optimize import nnls

    rows = np.array([row_of(features) for features in shapes])
    counts = np.array([len(costs) for costs in shapes.values()])
    means = np.array([sum(costs) / len(costs) for costs in shapes.values()])
    norms = np.where((size := np.linalg.norm(rows, axis=0)) > 0, size, 1.0)
    floor = max(1.0, float(means.mean()) / 100)
    scale = np.maximum(means, max(1.0, float(means.mean())))
    solution = norms
    for _ in range(REWEIGHTINGS):
        weight = np.sqrt(counts) / scale
        solution = nnls(rows / norms * weight[:, None], means * weight)[0] / norms
        scale = np.maximum(rows @ solution, floor)
    return [float(f"{value:.6g}") for value in solution]


def _held_out_errors(shapes: Shapes, part: str, solve: Callable[[Shapes], Solution]) -> dict[str, float]:
    """Relative errors on the means of held-out shapes; `total` is that of their sum."""
    import numpy as np

    order = sorted(shapes, key=lambda f: (f.tokens, f.kv_tokens, f.attention_pairs, f.seqs, f.arrived, f.left))
    pairs: list[tuple[float, float]] = []
    for fold in range(FOLDS):
        held_out = order[fold::FOLDS]
        training = {features: shapes[features] for number, features in enumerate(order) if number % FOLDS != fold}
        if not held_out or not training:
            continue
        knots, coefficients = solve(training)
        for features in held_out:
            costs = shapes[features]
            mean = max(1.0, sum(costs) / len(costs))
            pairs.append((float(np.dot(design_row(features, part, knots), coefficients)), mean))
    predicted, measured = np.array(pairs).T
    errors = predicted / measured - 1.0
    size = np.abs(errors)
    return {
        "mean_abs": round(float(size.mean()), 4),
        "p90_abs": round(float(np.percentile(size, 90)), 4),
        "bias": round(float(np.mean(errors)), 4),
        "total": round(float(predicted.sum() / measured.sum() - 1.0), 4),
    }
