"""When tests look for circular garbage: hardly ever in what is imported, as that takes the better part of a second."""

from __future__ import annotations

import gc


def leave_imports_alone() -> None:
    """Freeze what is imported by now, and put off the searches through what is old.

    Whoever walks a Core freezes and unfreezes as well: from then on the imports are old, and no longer frozen, and each
    such search went through all of them.
    """
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1000)
