"""What ends a command with one line for the person who gave it: bad input, and a run that failed."""

from __future__ import annotations


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
            shown = repr(value)
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            what += f" is {shown}" if what else shown
        joined = ": ".join(part for part in (where, what) if part)
        super().__init__(joined + (", " if what else ": " if where else "") + problem)


class RunError(RuntimeError):
    """A run failed by something else than what it was given; commands print it to stderr and exit with status 1."""
