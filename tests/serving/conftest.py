"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forked_processes import forked
from live_servers import Running
from shell import latency, twinserve

from twinserve.serving import run
from twinserve.serving.hosts import Model

__all__ = ["latency", "twinserve"]


@contextmanager
def _services() -> Iterator[Callable[..., Running]]:
    """Makes services, and stops them; their policies hold together at the end, with no block in use.

    What serves HTTP in a process of its own is forked.
    """
    made: list[Running] = []

    def make(model: Model, record: Path | None = None, **options: Any) -> Running:
        made.append(Running(model, record, **options))
        return made[-1].wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "get_context", lambda method: forked()[0])
        yield make
        for running in made:
            running.stop()
            for core in running.cores:
                core.scheduler.check_integrity()
                assert core.scheduler.block_manager.num_used_blocks == 0


@pytest.fixture
def serving() -> Iterator[Callable[..., Running]]:
    """Makes services for a test."""
    with _services() as make:
        yield make


@pytest.fixture(scope="module")
def serving_all() -> Iterator[Callable[..., Running]]:
    """Makes services for all tests of a module."""
    with _services() as make:
        yield make
