"""What ends a command with one line for the person who gave it: bad input, and a run that failed."""

from __future__ import annotations

from itertools import islice

_LONGEST = 80
"""Characters of a value that are shown."""


class InputError(ValueError):
    """Something given from outside cannot be used; the message is one line for the person who gave it.

    Commands print it to stderr and exit with status 2.

    Args:
        problem: what is wrong and what was expected.
        path: the file, where it is one.
        line: the line in it, from 1.
        field: the field, column or setting.
        value: the value found.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: object = None,
        line: int | None = None,
        field: str | None = None,
        value: object = ...,
    ):
        where = ":".join(str(part) for part in (path, line) if part is not None)
        what = field or ""
        if value is not ...:
            shown = _shown(value)
            what += f" is {shown}" if what else shown
        joined = ": ".join(part for part in (where, what) if part)
        goes_on = what and value is ... and problem.startswith("is ")
        between = " " if goes_on else ", " if what else ": " if where else ""
        super().__init__(printable(joined + between + problem))


class RunError(RuntimeError):
    """A run failed by something else than what it was given; commands print it to stderr and exit with status 1."""


def printable(text: str) -> str:
    """A text as one line: what would end the line, or tell a terminal something, is shown as its escape."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _shown(value: object) -> str:
    """The beginning of a value, which may be larger than what is left of the memory."""
    shown = repr(_head(value))
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."


def _head(value: object, depth: int = 8) -> object:
    """As much of a value as can be shown, made of equal kinds."""
    if isinstance(value, str | bytes):
        return value[: _LONGEST + 1]
    if type(value) is int and value.bit_length() > 4 * _LONGEST:
        return _Words(f"an integer of {value.bit_length()} bits")
    if not depth and isinstance(value, list | tuple | dict):
        return _Words("...")
    if type(value) in (list, tuple):
        heads = [_head(part, depth - 1) for part in islice(value, _LONGEST)]  # type: ignore[call-overload]
        return tuple(heads) if type(value) is tuple else heads
    if type(value) is dict:
        return {_head(name): _head(part, depth - 1) for name, part in islice(value.items(), _LONGEST)}
    return value


class _Words(str):
    """Shown without quotation marks."""

    def __repr__(self) -> str:
        return str(self)
