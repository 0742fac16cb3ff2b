"""When circular garbage is looked for."""

from __future__ import annotations

import gc
import threading
from contextlib import ContextDecorator


class _RareCollections(ContextDecorator):
    """How many are inside `rare_collections`, and the thresholds to go back to when the last leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._usual = gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._usual = gc.get_threshold()
                gc.freeze()
                gc.set_threshold(100_000, *self._usual[1:])
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                gc.collect()
                gc.set_threshold(*self._usual)
                gc.unfreeze()


rare_collections = _RareCollections()
"""Inside it, circular garbage is looked for seldom, and not in what is there already: whoever reads a trace or walks a
Core leaves next to none. Looking as often as usual takes some percent of a simulation, more of reading a trace, and a
search through everything holds an engine up for longer than many steps take.

What is garbage at the end is taken away then. Who enters again and again is hardly ever looked through otherwise, as
what is there already is set aside each time, and a fleet leaves all of itself: so much for each point of a search."""
