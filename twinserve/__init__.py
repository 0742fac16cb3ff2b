"""twinserve: the same serving policies in a simulator and in a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinserve.traces.runs.tables import Frames


def load(run: str | Path) -> Frames:
    """A run record as pandas frames: `requests, steps = twinserve.load("runs/sim")`.

    `requests` has a row a request with `ttft_s`, `tpot_s`, `e2e_s` and `wait_s` beside the record's fields, indexed by
    its id; `steps` has a row a step. A fleet's record and a vLLM step log are read as well.

    Raises:
        InputError: it cannot be read, or pandas is not installed.
    """
    from twinserve.traces.runs.tables import load

    return load(run)
