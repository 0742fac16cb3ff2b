"""FittedLatency: step costs linear in a few physical features, fitted from measured steps."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinserve.sim.latency import StepFeatures
from twinserve.traces.errors import InputError

SCHEMA = "twinserve-latency/1"
REGIMES = ("decode", "prompt")
PARTS = ("host", "device")
RANGE_FIELDS = ("seqs", "prompt_tokens", "decode_tokens", "kv_tokens")
FOLDS = 5


@dataclass(frozen=True)
class StepSample:
    """A measured step: its features and what it cost, in nanoseconds."""

    features: StepFeatures
    host_ns: int
    device_ns: int


def regime_of(features: StepFeatures) -> str:
    """The name of a step's regime: "decode" without prompt tokens, else "prompt"."""
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
    if part == "host":
        return [1.0, features.seqs, features.tokens]
    pairs = features.attention_pairs if features.prompt_tokens else 0
    return [1.0, features.kv_tokens, pairs, features.seqs, features.sampled, *ramps(features.tokens, knots)]


def coefficient_names(part: str, knots: Seq[int]) -> list[str]:
    """Names of the coefficients, each in nanoseconds a unit; a ramp's is for the whole way to its knot."""
    if part == "host":
        return ["constant", "seq", "token"]
    return ["constant", "kv_token", "attention_pair", "seq", "sampled", *(f"tokens_to_{knot}" for knot in knots[1:])]


@dataclass
class FittedLatency:
    """Costs from a latency file.

    Attributes:
        data: the file's content (schema "twinserve-latency/1").
        num_outside: steps asked for beyond the range that was measured.
        worst_excess: the largest ratio of a feature to the end of its range among them.
    """

    data: dict[str, Any]
    num_outside: int = 0
    worst_excess: float = 1.0
    _terms: dict[tuple[str, str], tuple[list[int], list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for regime in REGIMES:
            for part in PARTS:
                fitted = self.data["regimes"][regime][part]
                self._terms[regime, part] = (fitted["knots"], list(fitted["ns"].values()))

    @property
    def identity(self) -> str:
        """16 hex digits that only this content has."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()[:16]

    def step_cost(self, features: StepFeatures) -> tuple[int, int]:
        """(host_ns, device_ns) of a step with these features."""
        regime = regime_of(features)
        self._watch_range(regime, features)
        return self._cost(regime, "host", features), self._cost(regime, "device", features)

    def _cost(self, regime: str, part: str, features: StepFeatures) -> int:
        knots, coefficients = self._terms[regime, part]
        row = design_row(features, part, knots)
        return round(sum(x * ns for x, ns in zip(row, coefficients, strict=True)))

    def _watch_range(self, regime: str, features: StepFeatures) -> None:
        excess = max(getattr(features, name) / max(1, top) for name, (_, top) in self.data["range"][regime].items())
        if excess > 1.0:
            self.num_outside += 1
            self.worst_excess = max(self.worst_excess, excess)

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


def fit(samples: list[StepSample], about: dict[str, Any]) -> FittedLatency:
    """Fit host and device cost for each regime, non-negative, on relative error.

    Coefficients come from non-negative least squares on rows divided by the mean cost of their shape. Residuals are
    those of shapes held out of the fit (5 folds over shapes) and say how well the model predicts what it has not seen.

    Args:
        samples: repeated measurements of each shape.
        about: what was measured, where and with what; copied into the file.

    Raises:
        ValueError: a regime has fewer than 2 shapes.
    """
    data: dict[str, Any] = {"schema": SCHEMA, "about": about, "regimes": {}, "residuals": {}, "range": {}}
    for regime in REGIMES:
        mine = [sample for sample in samples if regime_of(sample.features) == regime]
        shapes = _by_shape(mine)
        if len(shapes) < 2:
            raise ValueError(f"{len(shapes)} shapes were measured for {regime} steps, expected at least 2")
        fitted, residuals = {}, {}
        for part in PARTS:
            knots, coefficients = _solve(shapes, part)
            names = coefficient_names(part, knots)
            fitted[part] = {"knots": knots, "ns": dict(zip(names, coefficients, strict=True))}
            residuals[part] = _held_out_errors(shapes, part)
        data["regimes"][regime] = fitted
        data["residuals"][regime] = residuals | {"shapes": len(shapes), "samples": len(mine)}
        data["range"][regime] = {
            name: [min(values), max(values)]
            for name in RANGE_FIELDS
            if (values := [getattr(features, name) for features in shapes])
        }
    return FittedLatency(data)


Shapes = dict[StepFeatures, list[StepSample]]


def _by_shape(samples: list[StepSample]) -> Shapes:
    shapes: Shapes = defaultdict(list)
    for sample in samples:
        shapes[sample.features].append(sample)
    return dict(shapes)


def _solve(shapes: Shapes, part: str) -> tuple[list[int], list[float]]:
    """Knots and coefficients for one part of one regime."""
    import numpy as np
    from scipy.optimize import nnls

    knots = choose_knots([features.tokens for features in shapes])
    rows, targets = [], []
    for features, repeats in shapes.items():
        costs = [getattr(sample, f"{part}_ns") for sample in repeats]
        scale = max(1.0, sum(costs) / len(costs))
        row = np.array(design_row(features, part, knots)) / scale
        rows += [row] * len(costs)
        targets += [cost / scale for cost in costs]
    matrix = np.array(rows)
    norms = np.where((size := np.linalg.norm(matrix, axis=0)) > 0, size, 1.0)
    solution, _ = nnls(matrix / norms, np.array(targets))
    return knots, [float(f"{value:.6g}") for value in solution / norms]


def _held_out_errors(shapes: Shapes, part: str) -> dict[str, float]:
    """Relative errors on the means of held-out shapes."""
    import numpy as np

    order = sorted(shapes, key=lambda f: (f.tokens, f.kv_tokens, f.attention_pairs))
    errors = []
    for fold in range(FOLDS):
        held_out = order[fold::FOLDS]
        training = {features: shapes[features] for features in order if features not in held_out}
        if not held_out or not training:
            continue
        knots, coefficients = _solve(training, part)
        for features in held_out:
            costs = [getattr(sample, f"{part}_ns") for sample in shapes[features]]
            mean = max(1.0, sum(costs) / len(costs))
            predicted = float(np.dot(design_row(features, part, knots), coefficients))
            errors.append(predicted / mean - 1.0)
    size = np.abs(errors)
    return {
        "mean_abs": round(float(size.mean()), 4),
        "p90_abs": round(float(np.percentile(size, 90)), 4),
        "bias": round(float(np.mean(errors)), 4),
    }
