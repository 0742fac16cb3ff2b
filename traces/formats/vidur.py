"""Vidur (github.com/microsoft/vidur, processed traces): CSV with arrived_at, num_prefill_tokens, num_decode_tokens.

Times are seconds; time 0 is the first row. Nothing is known of the prompts, so each is a text of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twinserve.traces.formats.reading import Reading, Rows, lengths_by_seconds

NAME = "vidur"
FIELDS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    return lengths_by_seconds(lines, path, FIELDS, reading)
