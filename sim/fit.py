"""FittedLatency: step costs linear in what the kernels of a step do, fitted from measured steps."""

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
from twinserve.settings.files import write_whole
from twinserve.sim.devices import device_of
from twinserve.sim.kernels import Kernels, most
from twinserve.sim.latency import StepCost, StepFeatures
from twinserve.sim.latency_file import check_latency_file
from twinserve.sim.roofline import RooflineLatency
from twinserve.sim.shapes import ModelShape
from twinserve.traces.lines import Line, json_file

if TYPE_CHECKING:
    import numpy as np

SCHEMA = "twinserve-latency/2"
FIRST_SCHEMA = "twinserve-latency/1"
"""Files without `kernels`: their steps are not padded, and they have no floor."""

REGIMES = ("decode", "prompt", "eager")
PARTS = ("host", "device", "lead")
FOLDS = 5
DRIFT_NS = 250_000_000
REWEIGHTINGS = 4

LAUNCHES = 40
"""Launches with prompts that tell what a prompt and a token of them cost."""

WAVE_SHARE = 0.5
"""Of a device's multiprocessors; of 0, 1/4, 1/2, 3/4 and 1 the one by which shapes held out of three profiles of an
H200 were predicted best."""

GROWING = ("kv_tokens", "attention_pairs", "longest_decode", "longest_prompt")
"""Features that grow while a step is repeated."""

WATCHED = ("seqs", "prompt_tokens", "decode_tokens", "sampled", "num_prompts", "arrived", "left", *GROWING)
"""Features that cost something, whose range is kept."""

WATCHED_DRAFTS = ("verifying", "drafts", "asked", "drafting", "drafting_tokens")
"""Those of steps with drafts, whose range is kept where there are any."""


@dataclass(frozen=True)
class StepSample:
    """A measured step: its features and what it cost, in nanoseconds; None is what could not be seen.

    Attributes:
        host_ns, device_ns, lead_ns: as in StepCost.
        launch_ns, bookkeeping_ns: the parts of host_ns, the launch and the rest; where the rest is not known, host_ns
            is the launch alone.
    """

    features: StepFeatures
    host_ns: int | None
    device_ns: int | None
    lead_ns: int | None = None
    launch_ns: int | None = None
    bookkeeping_ns: int | None = None


Shapes = dict[StepFeatures, list[int]]
"""What steps of equal features cost, in one of their parts."""

Row = Callable[[StepFeatures], Seq[float]]
"""What coefficients are on."""


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


GROWN = (
    "kv_token", "attention_pair", "decode_kv_token", "decode_pool_token", "decode_cut_token", "decode_span_block",
    "prompt_tile_token", "prompt_token",
)  # fmt: skip
"""Coefficients of the device on what grows while a step is repeated; see `grown`."""

STEADY = ("constant", "seq", "sampled", "decoding", "prompt", "prompt_tile")
"""Coefficients of the device on what does not, but for the ramps over its tokens; see `steady`."""

FITTED = ("constant", *STEADY[2:], *GROWN[2:])
"""Coefficients of the device that a fit gives; files of the first schema have the others."""

DRAFTED = ("verifying", "asking", "asked", "drafting", "drafting_token", "draft", "draft_token")
"""Coefficients of the device on what comes of drafts; see `drafted`."""

HOST = ("constant", "seq", "prompt", "token", "arrived", "left")
"""Coefficients of the host."""


def grown(features: StepFeatures, kernels: Kernels, wave: float) -> tuple[Any, ...]:
    """What GROWN are coefficients on; columns where the features have columns.

    All contexts; query-key pairs; what decodes read, and how much of it from the pool, as no other row has read it just
    now; how much in spans that had to be started; the blocks of the longest of those; the context before the end of
    each tile of a prompt, or while the longest is attended by all that run at once; the longest context of a prompt.

    Args:
        wave: tiles of prompts that attend at once, as if each were alone; 0 if that is not known.
    """
    decodes, prompts = features.decode_tokens, features.prompts
    padded, _, _ = kernels.padded(decodes, features.prompt_tokens, len(prompts), 0)
    return (
        features.kv_tokens,
        features.attention_pairs if features.prompt_tokens else 0,
        features.decode_kv_tokens,
        features.decode_kv_tokens - features.shared_tokens,
        kernels.cut_tokens(decodes, padded, features.decode_kv_tokens),
        kernels.blocks(padded, features.longest_decode) if decodes else 0,
        most(kernels.tiles(prompts)[1], wave * features.longest_prompt),
        features.longest_prompt,
    )


def steady(features: StepFeatures, kernels: Kernels) -> tuple[float, ...]:
    """What STEADY are coefficients on, and behind it the tokens that are computed, padding included."""
    num_prompts = len(features.prompts)
    _, tokens, sampled = kernels.padded(features.decode_tokens, features.prompt_tokens, num_prompts, features.sampled)
    decoding = 1.0 if features.decode_tokens else 0.0
    return 1.0, features.seqs, sampled, decoding, num_prompts, kernels.tiles(features.prompts)[0], tokens


def drafted(features: StepFeatures) -> tuple[float, ...]:
    """What DRAFTED are coefficients on: rows that are verified; what proposing drafts costs by itself, by each draft of
    a sequence, by each sequence and by each token of its context, and for each draft by these two."""
    asked, drafting, tokens = features.asked, features.drafting, features.drafting_tokens
    if not (asked and drafting):
        return features.verifying, 0, 0, 0, 0, 0, 0
    return features.verifying, 1, asked, drafting, tokens, asked * drafting, asked * tokens


def has_drafts(features: StepFeatures) -> bool:
    """Does a step verify drafts, or have any proposed?"""
    return bool(features.verifying or features.asked)


def host_row(features: StepFeatures) -> list[float]:
    """What HOST are coefficients on."""
    return [1.0, features.seqs, len(features.prompts), features.tokens, features.arrived, features.left]


def coefficient_names(part: str, knots: Seq[int]) -> list[str]:
    """Names of the coefficients, each in nanoseconds a unit; a ramp's is for the whole way to its knot."""
    if part == "lead":
        return ["constant"]
    if part == "host":
        return list(HOST)
    return [*STEADY, *GROWN, *(f"tokens_to_{knot}" for knot in knots[1:])]


@dataclass
class FittedLatency:
    """Costs from a latency file.

    Attributes:
        data: the file's content (schema "twinserve-latency/2" or 1). `captured_tokens`, where it is there, is the most
            tokens of a step that is launched as a captured graph; `kernels`, how steps are padded and cut; a part or a
            coefficient that is absent costs nothing.
        kernels: of `data`, as is `prompt_wave`, the tiles of prompts that attend at once.
        num_outside: steps made beyond the range that was measured (see `watch`).
        worst_excess: the largest ratio of a feature to the end of its range among them.
    """

    data: dict[str, Any]
    num_outside: int = 0
    worst_excess: float = 1.0
    _terms: dict[tuple[str, str], tuple[list[int], list[float]]] = field(default_factory=dict)
    _prices: dict[str, list[float]] = field(default_factory=dict)
    _draft_prices: dict[str, list[float]] = field(default_factory=dict)
    _latest: tuple[tuple, tuple[int, float, int]] = ((), (0, 0.0, 0))

    def __post_init__(self) -> None:
        self._captured_tokens: int | None = self.data.get("captured_tokens")
        self._drift: list[float] = self.data.get("drift", [])
        self._wave: float = self.data.get("prompt_wave", 0.0)
        self.kernels = Kernels.load(self.data.get("kernels", {}))
        self._floor = floor_of(self.data["about"]) if self.data.get("schema") == SCHEMA else None
        for regime in REGIMES[: 2 if self._captured_tokens is None else 3]:
            for part in PARTS:
                fitted = self.data["regimes"][regime].get(part)
                if fitted is None and part != "lead":
                    raise KeyError(part)
                if fitted is not None:
                    knots, ns = fitted["knots"], fitted["ns"]
                    self._terms[regime, part] = knots, [ns.get(name, 0.0) for name in coefficient_names(part, knots)]
                    if part == "device":
                        self._prices[regime] = [ns.get(name, 0.0) for name in GROWN]
                        self._draft_prices[regime] = [ns.get(name, 0.0) for name in DRAFTED]

    @property
    def identity(self) -> str:
        """16 hex digits that only this content has."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def num_devices(self) -> int:
        """How many devices share the model that was measured."""
        return int(self.data["about"].get("tensor_parallel_size", 1))

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

    def at(self, max_num_seqs: int, max_num_batched_tokens: int | None, most_drafts: int = 0) -> FittedLatency:
        """The model of the same engine under these limits, which say to what sizes its steps are padded."""
        sizes = self.kernels.at(max_num_seqs, max_num_batched_tokens, most_drafts)
        return self if sizes == self.kernels else FittedLatency(self.data | {"kernels": sizes.as_dict()})

    def step_cost(self, features: StepFeatures) -> StepCost:
        """What a step with these features costs; on the device no less than it must (see `floor_of`)."""
        features = features.attended(self.kernels.single)
        regime = regime_of(features, self._captured_tokens)
        host, _, lead = self._steady(regime, features)
        if self._drift:
            level = self._drift[features.decided_ns // DRIFT_NS % len(self._drift)]
            host, lead = round(host * level), round(lead * level)
        device_ns = round(self._device(regime, features))
        if self._floor is not None:
            device_ns = max(device_ns, self._floor.step_cost(features)[1])
        return StepCost.of_waiting(host, device_ns) if self.kernels.waits else StepCost(host, device_ns, lead)

    def repeated_costs(self, features: StepFeatures, count: int) -> tuple[int, np.ndarray] | None:
        """See RepeatedCosts; None where the host drifts, a step begins before it is launched, or it is one of an engine
        that drafts."""
        import numpy as np

        if self.kernels.single or self.kernels.waits:
            return None
        first = features.repeated(1, 0)
        regime = regime_of(first, self._captured_tokens)
        host, _, lead = self._steady(regime, first)
        if self._drift or lead:
            return None
        columns = features.repeated(np.arange(1, count + 1), 0)
        devices_ns = np.full(count, np.rint(self._device(regime, columns))).astype(np.int64)
        floor = None if self._floor is None else self._floor.repeated_costs(features, count)
        if floor is not None:
            np.maximum(devices_ns, floor[1], out=devices_ns)
        return host, devices_ns

    def _device(self, regime: str, features: StepFeatures) -> Any:
        """Nanoseconds on the device, of a step or, where the features have columns, of several."""
        _, device, _ = self._steady(regime, features)
        prices = self._prices[regime]
        values = grown(features, self.kernels, self._wave)
        device = device + sum(ns * x for ns, x in zip(prices, values, strict=True) if ns)
        if has_drafts(features):
            device += sum(ns * x for ns, x in zip(self._draft_prices[regime], drafted(features), strict=True))
        return device

    def _steady(self, regime: str, features: StepFeatures) -> tuple[int, float, int]:
        """Nanoseconds, whatever the contexts: of the host, of the device, and of the lead."""
        key = features[1:4], features[6:9], tuple(length for _, length in features.prompts)
        if key != self._latest[0]:
            values = steady(features, self.kernels)
            knots, ns = self._terms[regime, "device"]
            row = [*values[:-1], *(0.0 for _ in GROWN), *ramps(values[-1], knots)]
            device = sum(x * price for x, price in zip(row, ns, strict=True))
            _, prices = self._terms[regime, "host"]
            host = sum(x * price for x, price in zip(host_row(features), prices, strict=True))
            lead = self._terms.get((regime, "lead"), ([], [0.0]))[1][0]
            self._latest = key, (round(host), device, round(lead))
        return self._latest[1]

    def watch(self, features: StepFeatures, count: int = 1) -> None:
        """Note that steps were made, as far as they lie beyond what was measured: one with these features, and those
        that repeat it, whose contexts have each row's tokens more from step to step."""
        features = features.attended(self.kernels.single)
        tops = self.data["range"][regime_of(features, self._captured_tokens)]
        first = watched(features)
        last = first if count == 1 else first | watched(features.repeated(count - 1, 0))
        excess = max(value / max(1, tops[name][1]) for name, value in last.items() if name in tops)
        if excess <= 1.0:
            return
        self.worst_excess = max(self.worst_excess, excess)
        within = count
        for name, value in first.items():
            if name in tops and last[name] > (top := max(1, tops[name][1])):
                within = min(within, self._within(features, name, top, count) if value <= top else 0)
        self.num_outside += count - within

    @staticmethod
    def _within(features: StepFeatures, name: str, top: int, count: int) -> int:
        """How many of the steps, of which the first is within the range of a feature and the last is not, are."""
        low, high = 1, count - 1
        while low < high:
            middle = (low + high + 1) // 2
            is_within = watched(features.repeated(middle - 1, 0))[name] <= top
            low, high = (middle, high) if is_within else (low, middle - 1)
        return low

    @classmethod
    def load(cls, path: Path) -> FittedLatency:
        """Read a latency file.

        Raises:
            InputError: it cannot be read, or is not a latency file of this schema.
        """
        data = json_file(path)
        found = data.get("schema") if isinstance(data, dict) else None
        if found not in (SCHEMA, FIRST_SCHEMA):
            raise InputError(f"expected {SCHEMA!r} or {FIRST_SCHEMA!r}", path=path, field="schema", value=found)
        check_latency_file(Line(path, None, data))
        try:
            return cls(data)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"expected a latency file as `twinserve profile` writes it, lacks {error}", path=path
            ) from error

    def save(self, path: Path) -> None:
        """Write the latency file; a new file only.

        Raises:
            InputError: `path` exists, or cannot be written.
        """
        write_whole(path, self.text())

    def text(self) -> str:
        """What the latency file holds."""
        return json.dumps(self.data, indent=1) + "\n"


def watched(features: StepFeatures) -> dict[str, int]:
    """The features that cost something, by name; those of drafts where there are any."""
    names = (*WATCHED, *WATCHED_DRAFTS) if has_drafts(features) else WATCHED
    return {name: len(features.prompts) if name == "num_prompts" else getattr(features, name) for name in names}


def floor_of(about: dict[str, Any]) -> RooflineLatency | None:
    """What a step must take at the least, where the model and the device are known: their roofline at its full peaks.

    None for weights or KV of other than two bytes, and for devices without data.
    """
    shape, device = about.get("shape"), device_of(str(about.get("device")))
    types = {about.get("dtype"), about.get("kv_cache_dtype")}
    if shape is None or device is None or about.get("quantization") != "none" or types != {"bfloat16"}:
        return None
    return RooflineLatency(
        ModelShape.of_facts(str(about.get("model")), shape), device.at_peak, about.get("tensor_parallel_size", 1)
    )


def least_price(about: dict[str, Any]) -> float:
    """Nanoseconds that a token of a decode's context takes at the least, as it is read through the device's memory; 0
    where model or device are not known."""
    floor = floor_of(about)
    return 0.0 if floor is None else floor.kv_token_ns


def prompt_wave(about: dict[str, Any]) -> float:
    """Tiles of prompts that attend beside the longest as if alone, where the device and the KV heads are known, else 0:
    each multiprocessor has the tile of one KV head, and with WAVE_SHARE of them busy the rest of the device holds
    nobody up."""
    device, shape = device_of(str(about.get("device"))), about.get("shape")
    if device is None or device.multiprocessors is None or shape is None:
        return 0.0
    kv_heads = max(1, shape["num_kv_heads"] // about.get("tensor_parallel_size", 1))
    return WAVE_SHARE * device.multiprocessors / kv_heads


def fit(
    samples: list[StepSample],
    about: dict[str, Any],
    captured_tokens: int | None = None,
    kernels: Kernels | None = None,
    *,
    holds_out: bool = True,
    launches_vary: bool = True,
) -> FittedLatency:
    """Fit what steps cost, non-negative, on relative error.

    Coefficients come from non-negative least squares. A row is divided by the cost that the fit before it gave, which
    makes errors relative and sums right: dividing by the measured cost would pull the fit to the cheap steps.
    Residuals are those of shapes held out of the fit (5 folds over shapes) and say how well the model predicts what it
    has not seen.

    On the device decodes and prompts share their coefficients, as they share their kernels, but for the constant: so
    prompts say what decodes of as many rows cost, and the other way round. Where some steps are captured and others
    are not, as with `captured_tokens`, each regime has its own, as the host's are in any case. An engine whose rows all
    have drafts may have no steps of decodes alone: where there are drafts, a regime that nobody saw costs what another
    one does.

    Args:
        samples: measured steps; None where a part was not seen.
        about: what was measured, where and with what; copied into the file.
        captured_tokens: the most tokens of a step that is launched as a captured graph; None where none is.
        kernels: how the engine pads and cuts steps; None where it does not.
        holds_out: work out the residuals too.
        launches_vary: with prompts, a launch costs more the more it launches; see `_solve_host`.

    Raises:
        ValueError: a regime has fewer than 2 shapes.
    """
    kernels = kernels or Kernels()
    data: dict[str, Any] = {"schema": SCHEMA, "about": about, "regimes": {}, "residuals": {}, "range": {}}
    if captured_tokens is not None:
        data["captured_tokens"] = captured_tokens
    if kernels != Kernels():
        data["kernels"] = kernels.as_dict()
    if wave := prompt_wave(about):
        data["prompt_wave"] = wave
    regimes = REGIMES[: 2 if captured_tokens is None else 3]
    by_regime = {
        regime: [sample for sample in samples if regime_of(sample.features, captured_tokens) == regime]
        for regime in regimes
    }
    unseen: list[str] = []
    for regime, mine in by_regime.items():
        if (count := len(_by_shape(mine, "device"))) < 2:
            unseen.append(regime)
            if len(unseen) == len(regimes) or not any(has_drafts(sample.features) for sample in samples):
                raise ValueError(f"{count} shapes were measured for {regime} steps, expected at least 2")
    for regime in unseen:
        del by_regime[regime]
    devices, errors = _fit_devices(by_regime, kernels, wave, least_price(about), holds_out)
    bookkeeping = _by_shape(samples, "bookkeeping")
    for regime, mine in by_regime.items():
        others, residuals = _fit_host(regime, mine, bookkeeping, launches_vary, holds_out)
        data["regimes"][regime] = {"device": devices[regime]} | others
        features = {sample.features for sample in mine}
        residuals |= {"device": errors[regime]} if holds_out else {}
        data["residuals"][regime] = residuals | {"shapes": len(features), "samples": len(mine)}
        columns = [watched(shape) for shape in features]
        data["range"][regime] = {
            name: [min(values), max(values)]
            for name in (*WATCHED, *WATCHED_DRAFTS)
            if (values := [column[name] for column in columns if name in column])
        }
    for regime, other in zip(unseen, by_regime, strict=False):
        data["regimes"][regime], data["range"][regime] = data["regimes"][other], data["range"][other]
        data["residuals"][regime] = {"shapes": 0, "samples": 0}
    return FittedLatency(data)


def _fit_host(
    regime: str, samples: list[StepSample], bookkeeping: Shapes, launches_vary: bool, holds_out: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Knots and coefficients of the host, and of the lead if there is one; where `holds_out`, the errors of both."""
    fitted: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for part, row_of in (("host", host_row), ("lead", _one)):
        shapes = _by_shape(samples, part)
        if part == "lead" and not shapes:
            continue
        solve: Callable[[Shapes], list[float]] = partial(_solve, row_of=row_of)
        if part == "host" and bookkeeping:
            solve = partial(_solve_host, bookkeeping, _by_shape(samples, "launch"), shapes, regime, launches_vary)
        elif len(shapes) < 2:
            raise ValueError(f"{len(shapes)} shapes were measured for {regime} steps, expected at least 2")
        fitted[part] = {"knots": [], "ns": dict(zip(coefficient_names(part, []), solve(shapes), strict=True))}
        if holds_out and len(shapes) >= FOLDS:
            errors[part] = _errors(_held_out(shapes, solve, row_of))
    return fitted, errors


def _fit_devices(
    by_regime: dict[str, list[StepSample]], kernels: Kernels, wave: float, least: float, holds_out: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """By regime, knots and coefficients of the device, and where `holds_out`, the errors on shapes held out."""
    fitted: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    regimes = list(by_regime)
    for alike in [regimes] if "eager" not in regimes else [[regime] for regime in regimes]:
        devices = _Devices({regime: _by_shape(by_regime[regime], "device") for regime in alike}, kernels, wave, least)
        for regime, prices in devices.solve().items():
            ns = {name: price for name, price in zip(devices.names, prices, strict=True) if price or name in FITTED}
            fitted[regime] = {"knots": devices.knots, "ns": ns}
        errors |= devices.held_out_errors() if holds_out else {}
    return fitted, errors


def _by_shape(samples: list[StepSample], part: str) -> Shapes:
    """What was measured of a part, by the features that it depends on."""
    shapes: Shapes = defaultdict(list)
    for sample in samples:
        features, cost = sample.features._replace(decision=0, decided_ns=0), getattr(sample, f"{part}_ns")
        if cost is not None and part == "device":
            shapes[features._replace(arrived=0, left=0)].append(cost)
        elif cost is not None:
            prompts = ((0, 0),) * len(features.prompts)
            unseen = {"kv_tokens": 0, "attention_pairs": 0, "longest_decode": 0, "shared_tokens": 0}
            shapes[features._replace(prompts=prompts, drafting_tokens=0, **unseen)].append(cost)
    return dict(shapes)


def _one(features: StepFeatures) -> list[float]:
    return [1.0]


class _Devices:
    """The shapes of all regimes, for a fit in which they share all but the constant.

    Args:
        wave: see `grown`.
        least: what `decode_kv_token` and `decode_pool_token` are together at the least. Where all that were measured
            are few or short, other terms explain them as well, and more or longer ones would come out too cheap.

    Attributes:
        knots: of the ramps over the padded tokens.
        names: of the coefficients.
    """

    def __init__(self, shapes: dict[str, Shapes], kernels: Kernels, wave: float, least: float):
        import numpy as np

        self._regimes = list(shapes)
        ordered = [
            (number, features, costs)
            for number, mine in enumerate(shapes.values())
            for features, costs in sorted(mine.items())
        ]
        values = [(*steady(features, kernels), *grown(features, kernels, wave)) for _, features, _ in ordered]
        width = len(STEADY)
        counts = [int(row[width]) for row in values]
        self.knots = sorted({*choose_knots(counts), *(set(counts) & set(kernels.tokens))})
        self._of = np.array([number for number, _, _ in ordered])
        self._rows = np.array([
            [*row[:width], *row[width + 1 :], *ramps(row[width], self.knots)] for row in values
        ])  # fmt: skip
        # A constant for each regime, of which the first stands for all, stands where the common one did.
        self.names = coefficient_names("device", self.knots)
        if any(has_drafts(features) for _, features, _ in ordered):
            self.names += DRAFTED
            own = np.array([drafted(features) for _, features, _ in ordered])
            self._rows = np.concatenate((self._rows, own), axis=1)
        unused = [name not in (*FITTED, *DRAFTED) and not name.startswith("tokens_to_") for name in self.names]
        self._rows[:, unused] = 0.0
        apart = self._of[:, None] == np.arange(1, len(self._regimes))
        self._rows = np.concatenate((self._rows, apart.astype(float)), axis=1)
        self._least = least
        self._counts = np.array([len(costs) for _, _, costs in ordered])
        self._means = np.array([sum(costs) / len(costs) for _, _, costs in ordered])

    def solve(self) -> dict[str, list[float]]:
        """The coefficients of each regime."""
        common = self._coefficients(self._rows, self._means, self._counts)
        width = len(self.names)
        extra = [0.0, *common[width:]]
        return {regime: [common[0] + extra[number], *common[1:width]] for number, regime in enumerate(self._regimes)}

    def _coefficients(self, rows: np.ndarray, means: np.ndarray, counts: np.ndarray) -> list[float]:
        """Of some shapes, the common coefficients and what the constants of the other regimes are above the first's."""
        prices = least_squares(rows, means, counts)
        kv, pool = self.names.index("decode_kv_token"), self.names.index("decode_pool_token")
        if prices[kv] + prices[pool] >= self._least:
            return prices
        # With their sum fixed, a token from the pool costs it, and one that was read just now anything up to it.
        alone, rows = rows[:, pool], rows.copy()
        rows[:, kv] -= alone
        rows[:, pool] = 0.0
        prices = least_squares(rows, means, counts, fixed=self._least * alone)
        prices[kv] = min(prices[kv], self._least)
        prices[pool] = self._least - prices[kv]
        return prices

    def held_out_errors(self) -> dict[str, dict[str, float]]:
        """By regime, the errors on shapes that were held out."""
        import numpy as np

        predicted = np.zeros(len(self._means))
        for fold in range(FOLDS):
            held_out = np.arange(len(predicted)) % FOLDS == fold
            if held_out.all() or not held_out.any():
                continue
            kept = ~held_out
            coefficients = self._coefficients(self._rows[kept], self._means[kept], self._counts[kept])
            predicted[held_out] = self._rows[held_out] @ coefficients
        return {
            regime: _errors((predicted[self._of == number], self._means[self._of == number]))
            for number, regime in enumerate(self._regimes)
        }


def _solve(shapes: Shapes, row_of: Row) -> list[float]:
    """The coefficients of one part of one regime."""
    import numpy as np

    rows = np.array([row_of(features) for features in shapes], dtype=float)
    counts = np.array([len(costs) for costs in shapes.values()])
    means = np.array([sum(costs) / len(costs) for costs in shapes.values()])
    return least_squares(rows, means, counts)


def _solve_host(
    bookkeeping: Shapes, launches: Shapes, known: Shapes, regime: str, launches_vary: bool, shapes: Shapes
) -> list[float]:
    """The host's coefficients where bookkeeping was measured; of those `known` as a whole, from `shapes` alone.

    Bookkeeping costs the same whatever the regime. What a launch takes is a constant and a cost a row, and with prompts
    one a prompt and a token, or where few were seen, or `launches_vary` is False, the constant alone: an engine whose
    host holds the device up lets its queue grow while it happens to be slow, so that slow launches go with many rows
    and tokens, though neither makes them slow. A launch that was never seen costs nothing: the device was busy for
    longer, in every step there was.
    """
    kept = {features: costs for features, costs in bookkeeping.items() if features in shapes or features not in known}
    coefficients = _solve(kept, host_row)
    launched = {features: costs for features, costs in launches.items() if features in shapes}
    width = 2 if regime == "decode" else 4 if launches_vary and len(launched) >= LAUNCHES else 1
    if launched:
        for index, ns in enumerate(_solve(launched, lambda features: host_row(features)[:width])):
            coefficients[index] += ns
    return coefficients


def least_squares(
    rows: np.ndarray, means: np.ndarray, counts: np.ndarray, fixed: np.ndarray | float = 0.0
) -> list[float]:
    """Non-negative coefficients by relative error.

    Args:
        rows: [shapes, coefficients]
        means, counts: [shapes]: what each cost on average, and how often it was measured.
        fixed: [shapes]: what each costs beside the coefficients' parts.
    """
    import numpy as np
    from scipy.optimize import nnls

    norms = np.where((size := np.linalg.norm(rows, axis=0)) > 0, size, 1.0)
    floor = max(1.0, float(means.mean()) / 100)
    scale = np.maximum(means, max(1.0, float(means.mean())))
    width = rows.shape[1]
    solution = norms
    for _ in range(REWEIGHTINGS):
        weight = np.sqrt(counts) / scale
        # The triangle of a QR factorisation has the same least squares in as many rows as there are coefficients.
        triangle = np.linalg.qr(np.column_stack((rows / norms, means - fixed)) * weight[:, None]).R
        solution = nnls(triangle[:, :width], triangle[:, width], maxiter=100 * width)[0] / norms
        scale = np.maximum(rows @ solution + fixed, floor)
    return [float(f"{value:.6g}") for value in solution]


def _held_out(shapes: Shapes, solve: Callable[[Shapes], list[float]], row_of: Row) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured, of shapes that were held out."""
    import numpy as np

    order = sorted(shapes)
    pairs: list[tuple[float, float]] = []
    for fold in range(FOLDS):
        training = {features: shapes[features] for number, features in enumerate(order) if number % FOLDS != fold}
        coefficients = solve(training)
        for features in order[fold::FOLDS]:
            pairs.append((float(np.dot(row_of(features), coefficients)), sum(shapes[features]) / len(shapes[features])))
    predicted, measured = np.array(pairs).T
    return predicted, measured


def _errors(pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Relative errors of what was predicted against what was measured; `total` is that of their sum."""
    import numpy as np

    predicted, measured = pairs
    measured = np.maximum(measured, 1.0)
    errors = predicted / measured - 1.0
    size = np.abs(errors)
    return {
        "mean_abs": round(float(size.mean()), 4),
        "p90_abs": round(float(np.percentile(size, 90)), 4),
        "bias": round(float(np.mean(errors)), 4),
        "total": round(float(predicted.sum() / measured.sum() - 1.0), 4),
    }
