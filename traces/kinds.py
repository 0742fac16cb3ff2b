"""Kinds: what a file says, held against the kinds that it should have, by pydantic; a fault is one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from twinserve.settings.errors import InputError
from twinserve.traces.lines import Line


def checker(kind: Any) -> Callable[[Line], None]:
    """Checks a line against a kind.

    Its InputError names the field, the place in it, what is there and what was expected.
    """
    validator = cache(lambda: TypeAdapter(kind).validate_python)  # made for the first line: most runs read none

    def checked(line: Line) -> None:
        try:
            validator()(line.values)
        except ValidationError as error:
            raise _refusal(line, error) from error

    return checked


def _refusal(line: Line, error: ValidationError) -> InputError:
    first = error.errors(include_url=False, include_context=False)[0]
    steps = list(first["loc"])
    value: Any = line.values
    names: list[str] = []
    while steps and isinstance(value, dict) and isinstance(steps[0], str) and steps[0] in value:
        names.append(str(steps.pop(0)))
        value = value[names[-1]]
    if first["type"] == "missing" and len(steps) == 1 and isinstance(steps[0], str):
        return InputError("is missing", path=line.path, line=line.number, field=".".join([*names, steps[0]]))
    place = "".join(f"[{step}]" for step in steps if isinstance(step, int))
    problem = f"expected: {first['msg']}" + (f", at {place}" if place else "")
    return InputError(problem, path=line.path, line=line.number, field=".".join(names), value=value)
