"""Wrong versions of the guide's functions, and how one is put in the right one's place.

Those of cycle N stand in `cycle_N.py`, each a function behind `@planted` that takes the right version and gives the
wrong one, the simplest that is wrong in one way:

    @planted("twinserve.engine.sampler:greedy_sample", "takes the worst token", "test_compare_with_hf_generate")
    def _(right):
        return lambda logits: int(logits.argmin())

A new file `cycle_N.py` is found by its name. For a property the right version is its getter; a static method stays one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plant:
    """A wrong version.

    Attributes:
        target: "module:function" or "module:Class.method", what it stands in for.
        wrong: what is wrong with it, in words.
        test: the guide's test that has to fail.
        make: gives the wrong version, called with the right one.
    """

    target: str
    wrong: str
    test: str
    make: Callable[[Any], Any]

    def apply(self) -> None:
        """Put the wrong version in the right one's place, in this process and for good."""
        module_name, path = self.target.split(":")
        module = importlib.import_module(module_name)
        *owners, name = path.split(".")
        if owners:
            self._replace_in_class(getattr(module, owners[0]), name)
        else:
            self._replace_everywhere(getattr(module, name))

    def _replace_in_class(self, owner: type, name: str) -> None:
        right = owner.__dict__[name]
        wrong: Any
        if isinstance(right, property):
            wrong = property(self.make(right.fget))
        elif isinstance(right, staticmethod):
            wrong = staticmethod(self.make(right.__func__))
        else:
            wrong = self.make(right)
        setattr(owner, name, wrong)

    def _replace_everywhere(self, right: Any) -> None:
        """A function has a name in every module that imported it."""
        wrong = self.make(right)
        ours = [module for name, module in sys.modules.items() if name.startswith("twinserve.")]
        for module in ours:
            for name, value in list(vars(module).items()):
                if value is right:
                    setattr(module, name, wrong)


PLANTS: list[Plant] = []


def planted(target: str, wrong: str, test: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Registers a wrong version; see `Plant` for the arguments."""

    def register(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        PLANTS.append(Plant(target, wrong, test, make))
        return make

    return register


def load_all() -> list[Plant]:
    """The wrong versions of every cycle, in their order."""
    for path in sorted(HERE.glob("cycle_*.py")):
        importlib.import_module(path.stem)
    return PLANTS
