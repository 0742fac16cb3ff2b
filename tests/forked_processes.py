"""Processes forked from one that has imported what they need, for tests of what is served and not of how it begins.

A fresh interpreter takes seconds of a processor for its imports before it is a rank, or serves HTTP.
"""

from __future__ import annotations

from multiprocessing import forkserver

from torch import multiprocessing

_PRELOADED = [
    *("transformers.tokenization_utils_fast", "twinserve.commands.app", "twinserve.engine.parallel.worker"),
    *("twinserve.serving.app", "twinserve.serving.run"),
]


def forked() -> tuple[multiprocessing.context.BaseContext, int]:
    """What makes such processes, in place of `get_context("spawn")`, and the number of the process that is forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    forkserver.ensure_running()
    return context, forkserver._forkserver._forkserver_pid
