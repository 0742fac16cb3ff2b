"""How many drafts are found and are right in a simulation: by a law, or as they were in a recorded run."""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, Protocol

import xxhash

from twinserve.policies import Batch, Runs, Sequence
from twinserve.settings.errors import InputError
from twinserve.settings.files import write_whole
from twinserve.settings.speculative import SpeculativeConfig
from twinserve.traces.lines import json_file
from twinserve.traces.runs.record import load_record

_PACKED = Struct("=3q").pack
_FOUND, _RIGHT, _REQUEST = range(3)
"""What a draw is for; each is independent of the others."""


class Acceptance(Protocol):
    """Says what comes of drafts in a simulation. The same request at the same place of its answer gets the same."""

    def found(self, seq: Sequence, place: int, asked: int) -> int:
        """Drafts that are proposed behind the first `place` tokens of `seq`, at most `asked`."""

    def right(self, seq: Sequence, place: int, drafts: int) -> int:
        """How many of so many drafts behind them are right: the first ones."""


def output_of(batch: Batch, acceptance: Acceptance, *, is_async: bool) -> Runs:
    """What comes of a simulated step: the length of each run, and the drafts that are proposed behind it.

    Where decisions run ahead the scheduler counts as many drafts as it asked for; those that were not found are wrong.
    The placeholders of a padded admission are never right.
    """
    prompts = set(batch.prompts)
    lengths, proposed = [], []
    for seq in batch.sampled:
        drafts = 0 if seq in prompts else batch.drafts.get(seq, 0)
        if is_async and drafts:
            drafts = min(drafts, acceptance.found(seq, seq.num_tokens, drafts))
        lengths.append(1 + (acceptance.right(seq, seq.num_tokens, drafts) if drafts else 0))
        proposed.append(acceptance.found(seq, seq.num_tokens + lengths[-1], batch.num_drafts_asked))
    return Runs(None, lengths, None if is_async else proposed)


def _uniform(seed: int, purpose: int, request: int, position: int = 0) -> float:
    """A number in [0, 1) that belongs to a place of a request's answer."""
    return (xxhash.xxh64_intdigest(_PACKED(purpose, request, position), seed) >> 11) * 2.0**-53


@dataclass(frozen=True)
class AcceptanceLaw:
    """Drafts that are right by chance.

    Attributes:
        by_position: the probability that the draft at a position is right if all before it are, for the mean request;
            the last holds for all behind it.
        concentration: how alike requests are: the first draft is right with a probability that is drawn for each
            request from a beta distribution with the mean `by_position[0]`, a + b being this; p at another position
            becomes p ** g with the g that makes the first one so. None: all requests are the same.
        found_share: the probability that the proposer finds drafts, for the mean request; then it finds as many as it
            is asked for.
        seed: of the draws.
        found_concentration: as `concentration`, of `found_share`; one draw says both.
    """

    by_position: tuple[float, ...]
    concentration: float | None = None
    found_share: float = 1.0
    seed: int = 0
    found_concentration: float | None = None

    def __post_init__(self) -> None:
        if not self.by_position:
            raise ValueError("by_position is empty, expected a probability for the first draft at least")
        for name, values in (("by_position", self.by_position), ("found_share", (self.found_share,))):
            for value in values:
                if not 0.0 <= value <= 1.0:
                    raise ValueError(f"{name} has {value}, expected probabilities from 0 to 1")
        if type(self.seed) is not int:
            raise ValueError(f"seed is {self.seed!r}, expected an integer")
        for name in ("concentration", "found_concentration"):
            if (value := getattr(self, name)) is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} is {value}, expected a number > 0, or None")

    def found(self, seq: Sequence, place: int, asked: int) -> int:
        share = self._own(self.found_share, self.found_concentration, seq.seq_id)
        return asked if _uniform(self.seed, _FOUND, seq.seq_id, place) < share else 0

    def right(self, seq: Sequence, place: int, drafts: int) -> int:
        power = self._power(seq.seq_id)
        for position in range(drafts):
            chance = self.by_position[min(position, len(self.by_position) - 1)] ** power
            if _uniform(self.seed, _RIGHT, seq.seq_id, place + position) >= chance:
                return position
        return drafts

    def _power(self, request: int) -> float:
        """What a request's probabilities are raised to."""
        first = self.by_position[0]
        own = self._own(first, self.concentration, request)
        return 1.0 if own == first else math.log(min(max(own, 1e-12), 1.0 - 1e-12)) / math.log(first)

    def _own(self, mean: float, concentration: float | None, request: int) -> float:
        """A request's own share, from a beta distribution with this mean; the mean where all are the same."""
        if concentration is None or mean in (0.0, 1.0):
            return mean
        from scipy.special import betaincinv  # heavy

        draw = _uniform(self.seed, _REQUEST, request)
        return float(betaincinv(mean * concentration, (1.0 - mean) * concentration, draw))

    def to_dict(self) -> dict[str, Any]:
        """Its values, as `of` reads them."""
        return {
            "by_position": list(self.by_position),
            "concentration": self.concentration,
            "found_share": self.found_share,
            "seed": self.seed,
            "found_concentration": self.found_concentration,
        }

    def text(self) -> str:
        """What its file holds."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def of(cls, values: dict[str, Any]) -> AcceptanceLaw:
        """The law that `to_dict` gave; ValueError if it is none."""
        known = {"by_position", "concentration", "found_share", "seed", "found_concentration"}
        if not isinstance(values, dict) or set(values) - known or "by_position" not in values:
            raise ValueError(f"by_position, and perhaps {', '.join(sorted(known - {'by_position'}))}")
        return cls(**(values | {"by_position": tuple(values["by_position"])}))


class RecordedAcceptance:
    """Drafts that are found and right where they were in a recorded run, request by request.

    A row that begins at another place of the answer than any recorded one takes what the recorded row before it has
    left: of a run of 4 tokens that began two tokens earlier, one draft is right yet.

    Args:
        steps: rows of steps.jsonl, in the order of the decisions.
        else_law: for requests that the record lacks, or beyond their recorded answers.
    """

    def __init__(self, steps: list[dict[str, Any]], else_law: Acceptance):
        self._else_law = else_law
        self._places: dict[int, list[int]] = defaultdict(list)
        self._rows: dict[int, list[tuple[int, int]]] = defaultdict(list)
        answered: dict[int, int] = defaultdict(int)
        drafts: dict[int, int] = {}
        rows = _sampled_rows(steps)
        for request, num_drafts, made, kept in rows:
            drafts[request] = num_drafts
            self._places[request].append(answered[request])
            self._rows[request].append((num_drafts, made))
            answered[request] += kept

    def _row(self, seq: Sequence, place: int) -> tuple[int, int] | None:
        """Drafts and tokens of the recorded row that covers a place of `seq`, less what lies before the place; None if
        none does."""
        place -= seq.num_prompt_tokens
        index = bisect_right(self._places[seq.seq_id], place) - 1
        if index < 0:
            return None
        behind = place - self._places[seq.seq_id][index]
        drafts, made = self._rows[seq.seq_id][index]
        return (max(0, drafts - behind), made - behind) if behind < made else None

    def found(self, seq: Sequence, place: int, asked: int) -> int:
        row = self._row(seq, place)
        return self._else_law.found(seq, place, asked) if row is None else min(asked, row[0])

    def right(self, seq: Sequence, place: int, drafts: int) -> int:
        row = self._row(seq, place)
        return self._else_law.right(seq, place, drafts) if row is None else min(drafts, row[1] - 1)


def _sampled_rows(steps: list[dict[str, Any]]) -> list[tuple[int, int, int, int]]:
    """Of each row that sampled: request, drafts, tokens made and tokens kept, in the order of the steps."""
    running: dict[int, None] = {}
    found = []
    for step in steps:
        for request in (*step["left"], *step["preempted"]):
            running.pop(request, None)
        named = {entry[0]: entry[-1] for entry in (*step["rows"], *step["admitted"])}
        running.update(dict.fromkeys(entry[0] for entry in step["admitted"]))
        drafts = dict(step.get("drafts", ()))
        runs = {request: (made, kept) for request, made, kept in step.get("runs", ())}
        for request in running:
            if named.get(request, step["usual"]):
                made, kept = runs.get(request, (1, 1))
                found.append((request, drafts.get(request, 0), made, kept))
    return found


def acceptance_of(config: SpeculativeConfig | None) -> Acceptance | None:
    """What comes of drafts in a simulation, as the settings have it; None without drafts.

    Raises:
        InputError: they do not say it, or name what cannot be used.
    """
    if config is None:
        return None
    if config.synthetic_acceptance_rate is not None:
        return AcceptanceLaw((config.synthetic_acceptance_rate,))
    if config.acceptance is None:
        problem = "expected one of synthetic_acceptance_rate and acceptance, as nothing is computed in a simulation"
        raise InputError(problem, field="speculative_config")
    path = Path(config.acceptance)
    if not path.is_dir():
        return load_law(path)
    steps = load_record(path).steps
    try:
        return RecordedAcceptance(steps, fit_law(steps))
    except ValueError as error:
        raise InputError(str(error), path=path) from error


def load_law(path: Path) -> AcceptanceLaw:
    """The law in a file.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    values = json_file(path)
    try:
        return AcceptanceLaw.of(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"expected a law of acceptance: {error}", path=path) from error


def save_law(law: AcceptanceLaw, path: Path) -> None:
    """Write a law to a file that is not there yet.

    Raises:
        InputError: it is there, or cannot be written.
    """
    write_whole(path, law.text())


def fit_law(*runs: list[dict[str, Any]], seed: int = 0) -> AcceptanceLaw:
    """The law of recorded runs' drafts: each position's share of right ones, how often drafts were found, and how much
    requests differ in both, by the variance of their own shares beyond that of chance. The share found, and that of
    right first drafts, are the means of the requests' own: of all rows together, more are of requests guessed badly.

    Args:
        runs: rows of steps.jsonl, of each run in the order of the decisions.

    Raises:
        ValueError: they have no drafts.
    """
    tried: dict[int, int] = defaultdict(int)
    right: dict[int, int] = defaultdict(int)
    first: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    found: dict[tuple[int, int], list[int]] = {}
    for number, steps in enumerate(runs):
        for request, drafts, made, _ in _sampled_rows(steps):
            for position in range(min(drafts, made)):
                tried[position] += 1
                right[position] += position < made - 1
            own = number, request
            if drafts:
                first[own][0] += 1
                first[own][1] += made > 1
            if own in found:
                found[own][0] += 1
                found[own][1] += drafts > 0
            else:
                found[own] = [0, 0]  # the first token of an answer has none behind it
    if not tried:
        raise ValueError("the runs have no drafts, expected some to fit a law of acceptance to")
    mean, concentration = _shares(first.values())
    shares = (mean, *(right[position] / tried[position] for position in sorted(tried)[1:]))
    is_asked = any(step.get("asked", 0) for steps in runs for step in steps)
    found_share, found_concentration = _shares(found.values()) if is_asked else (1.0, None)
    return AcceptanceLaw(shares, concentration, found_share, seed, found_concentration)


def _shares(own: Iterable[list[int]]) -> tuple[float, float | None]:
    """The mean of requests' shares, each given as trials and successes, and the a + b of the beta distribution of which
    they come, by its moments: the variance of shares of n trials each is m (1 - m) (1 + (n - 1) / (a + b + 1)) / n.
    None where they differ by no more than chance."""
    counted = [(number, right) for number, right in own if number]
    mean = statistics.fmean(right / number for number, right in counted) if counted else 1.0
    counted = [(number, right) for number, right in counted if number > 1]
    if len(counted) < 2 or mean in (0.0, 1.0):
        return mean, None
    chance = sum(mean * (1.0 - mean) / number for number, _ in counted)
    between = sum((right / number - mean) ** 2 for number, right in counted)
    scale = sum(mean * (1.0 - mean) * (number - 1) / number for number, _ in counted)
    share = (between - chance) / scale
    return mean, None if share <= 1e-6 else max(1e-3, 1.0 / share - 1.0)
