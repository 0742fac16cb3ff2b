"""Splitwise (github.com/Mutinifni/splitwise-sim): CSV with arrival_timestamp, prompt_size, token_size.

Times are seconds; time 0 is the first row. Nothing is known of the prompts, so each is a text of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twinserve.traces.formats.reading import Reading, Rows, lengths_by_seconds

NAME = "splitwise"
FIELDS = ("arrival_timestamp", "prompt_size", "token_size")


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    return lengths_by_seconds(lines, path, FIELDS, reading)
