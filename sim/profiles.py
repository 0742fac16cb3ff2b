"""Profiles: steps that were run to measure them, kept so that a model can be fitted from them again, or with runs."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinserve.settings.errors import InputError
from twinserve.settings.files import write_whole
from twinserve.sim.fit import StepSample
from twinserve.sim.kernels import Kernels
from twinserve.sim.latency import StepFeatures
from twinserve.traces.lines import Line, json_lines_file

SCHEMA = "twinserve-profile/1"

COUNTS = (
    "seqs", "prompt_tokens", "decode_tokens", "kv_tokens", "attention_pairs", "sampled", "arrived", "left",
    "longest_decode", "shared_tokens",
)  # fmt: skip
"""Features of a step that are a number; `prompts` is the other."""

DRAFT_COUNTS = ("asked", "drafting", "drafting_tokens", "verifying", "drafts")
"""Those of an engine that drafts, which the rows of others lack."""

TIMES = ("device_ns", "launch_ns", "bookkeeping_ns")


@dataclass(frozen=True)
class Profile:
    """Measured steps of an engine on a device.

    Attributes:
        about: what was measured, where and with what, as a latency file has it.
        kernels: how the engine pads and cuts steps.
        samples: of which launch, bookkeeping and the device's time are known.
    """

    about: dict[str, Any]
    kernels: Kernels
    samples: list[StepSample]

    def save(self, path: Path) -> None:
        """Write the profile, a gzip file of JSON lines. Equal profiles are equal bytes.

        Raises:
            InputError: `path` exists, or cannot be written.
        """
        write_whole(path, self.packed())

    def packed(self) -> bytes:
        """What its file holds."""
        return gzip.compress(self._text().encode(), mtime=0)

    @property
    def identity(self) -> str:
        """16 hex digits that only this content has."""
        return hashlib.sha256(self._text().encode()).hexdigest()[:16]

    def _text(self) -> str:
        rows = [{"schema": SCHEMA, "about": self.about, "kernels": self.kernels.as_dict()}, *map(_row, self.samples)]
        return "".join(json.dumps(row) + "\n" for row in rows)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile.

        Raises:
            InputError: it cannot be read, or is none.
        """
        lines = json_lines_file(path)
        head = next(lines, None)
        if head is None:
            raise InputError("is empty, expected a profile as `twinserve profile` keeps it", path=path)
        head.one_of("schema", (SCHEMA,))
        about = head.child("about").values
        try:
            kernels = Kernels.load(head.child("kernels").values)
        except TypeError as error:
            raise head.error("expected sizes by the names that `twinserve profile` gives them", "kernels") from error
        return cls(about, kernels, [_sample(line) for line in lines])


def profile_beside(latency: Path) -> Path:
    """Where the profile is kept that a latency file was fitted from."""
    return latency.parent / f"{latency.stem}.profile.jsonl.gz"


def _row(sample: StepSample) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(sample.features, name) for name in COUNTS}
    drafts = {name: getattr(sample.features, name) for name in DRAFT_COUNTS}
    row |= drafts if any(drafts.values()) else {}
    return row | {"prompts": sample.features.prompts} | {name: getattr(sample, name) for name in TIMES}


def _sample(line: Line) -> StepSample:
    drafts = DRAFT_COUNTS if any(name in line.values for name in DRAFT_COUNTS) else ()
    counts = {name: line.integer(name) for name in (*COUNTS, *drafts)}
    prompts = tuple((start, length) for start, length in line.integer_lists("prompts", 2))
    device, launch, bookkeeping = (line.integer(name) for name in TIMES)
    features = StepFeatures(decision=0, prompts=prompts, **counts)
    return StepSample(features, launch + bookkeeping, device, launch_ns=launch, bookkeeping_ns=bookkeeping)
