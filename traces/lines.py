"""Lines: the content of a text file as named values, which are checked as they are taken."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from twinserve.settings.errors import InputError
from twinserve.traces.request import Part

LARGEST = (1 << 63) - 1
LABELS = ("priority", "salt", "tenant")
"""Fields of a request that orders and the prefix cache look at."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file, or one object in a document, as named values, which are checked as they are taken.

    Whatever is missing or of another kind (true, 1.0 and "1" are no integers) raises an InputError that names it.

    Attributes:
        path: the file.
        number: the line in it, from 1; None in a document of many lines.
        values: what the line says.
        within: what leads to the values in the line or the document, such as "requests[3]."; stands before a field.
    """

    path: Path
    number: int | None
    values: dict[str, Any]
    within: str = ""

    def get(self, field: str) -> Any:
        """The value of `field`, whatever it is."""
        if field not in self.values:
            raise InputError("is missing", path=self.path, line=self.number, field=self.within + field)
        return self.values[field]

    def integer(self, field: str, at_least: int = 0) -> int:
        """An integer of at most 63 bits."""
        value = self.get(field)
        if type(value) is not int or not at_least <= value <= LARGEST:
            raise self.error(f"expected an integer >= {at_least}", field)
        return value

    def optional_integer(self, field: str) -> int | None:
        """An integer >= 0, or None where the field is null or missing."""
        return None if self.values.get(field) is None else self.integer(field)

    def labels(self) -> dict[str, Any]:
        """The priority, an integer, and the salt and the tenant, which are text; those that are there."""
        for field, kind, words in (("priority", int, "an integer"), ("salt", str, "text"), ("tenant", str, "text")):
            if field in self.values and type(self.values[field]) is not kind:
                raise self.error(f"expected {words}", field)
            if kind is str and not _is_unicode(self.values.get(field, "")):
                raise self.error("expected text without lone surrogates", field)
        if abs(self.values.get("priority", 0)) > LARGEST:
            raise self.error("expected an integer of at most 63 bits", "priority")
        return {field: self.values[field] for field in LABELS if field in self.values}

    def integers(self, field: str) -> list[int]:
        """A list of integers >= 0."""
        value = self.get(field)
        if type(value) is not list or (
            value and not (set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= LARGEST)
        ):
            raise self.error("expected a list of integers >= 0", field)
        return value

    def child(self, field: str) -> Line:
        """An object."""
        value = self.get(field)
        if type(value) is not dict:
            raise self.error("expected an object", field)
        return Line(self.path, self.number, value, f"{self.within}{field}.")

    def items(self, field: str) -> list[Line]:
        """A list of objects, each with its place for errors."""
        value = self.get(field)
        if type(value) is not list:
            raise self.error("expected a list of objects", field)
        for number, item in enumerate(value):
            if type(item) is not dict:
                raise self.error("expected an object", f"{field}[{number}]", item)
        return [
            Line(self.path, self.number, item, f"{self.within}{field}[{number}].") for number, item in enumerate(value)
        ]

    def integer_lists(self, field: str, width: int) -> list[list[int]]:
        """A list of lists of `width` integers."""
        value = self.get(field)
        if type(value) is not list or not all(
            type(item) is list and len(item) == width and set(map(type, item)) <= {int} for item in value
        ):
            raise self.error(f"expected a list of lists of {width} integers", field)
        return value

    def parts(self, field: str) -> tuple[Part, ...]:
        """The parts of a prompt, from lists of text, start and length."""
        parts = tuple(map(Part._make, self.integer_lists(field, 3)))
        for part in parts:
            text, start, length = part
            if not (-LARGEST <= text <= LARGEST and 0 <= start <= LARGEST and 1 <= length <= LARGEST):
                raise self.error("expected text numbers below 2^63, start >= 0 and length >= 1", field, list(part))
        return parts

    def one_of(self, field: str, choices: tuple[Any, ...]) -> Any:
        """One of a few values."""
        value = self.get(field)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            expected = " or ".join(json.dumps(choice) for choice in choices)
            raise self.error(f"expected {expected}", field)
        return value

    def error(self, problem: str, field: str, value: object = ...) -> InputError:
        """The error that says what is wrong with `field`, or with `value` in it."""
        shown = self.values.get(field) if value is ... else value
        return InputError(problem, path=self.path, line=self.number, field=self.within + field, value=shown)


def _is_unicode(text: str) -> bool:
    """Is it text that UTF-8 can say? JSON can escape what is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_content(path: Path) -> bytes:
    """The content of a file, unpacked if it is a gzip file (which its first bytes say, not its name).

    Raises:
        InputError: it cannot be read, or is a gzip file that is broken or cut short.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from error
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"expected a whole gzip file: {error}", path=path) from error


def text_lines(content: bytes, path: Path) -> list[str]:
    """The lines of a UTF-8 text, which end in LF or CRLF, the last one in either or in nothing.

    Empty lines at the end are left out.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"expected UTF-8: {error.reason} at byte {error.start}", path=path, line=line) from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def json_value(text: str, path: Path, line: int | None = None, *, nan: bool = False) -> Any:
    """The value that a JSON text says.

    Args:
        line: the text's line in the file; None if the text is the whole file.
        nan: let NaN and Infinity pass, which some programs write though JSON has neither.

    Raises:
        InputError: it is not JSON.
    """
    try:
        return (_WITH_NAN if nan else _STRICT).decode(text)
    except (ValueError, RecursionError) as error:
        found = getattr(error, "lineno", None) if line is None else line
        raise InputError(f"expected JSON: {error}", path=path, line=found) from error


def nanoseconds(seconds: str | float) -> tuple[int, bool]:
    """Seconds >= 0 in whole nanoseconds, and whether that took rounding; a float counts as the digits it is shown with.

    Raises:
        ValueError: it is no number, or is beyond 63 bits.
    """
    text = str(seconds)
    whole, _, fraction = text.partition(".")
    if len(whole) <= 9 and len(fraction) <= 9 and text.isascii() and (whole + fraction).isdigit():
        return int(whole or 0) * 1_000_000_000 + int(fraction.ljust(9, "0")), False
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    try:
        exact = Decimal(text).scaleb(9)
        if not 0 <= exact <= LARGEST:
            raise ValueError(text)
    except ArithmeticError as error:
        raise ValueError(text) from error
    return round(exact), round(exact) != exact


def json_lines(lines: list[str], path: Path, first: int = 1) -> Iterator[Line]:
    """Each line as a JSON object; the first of `lines` is the file's line number `first`.

    Raises:
        InputError: a line is no JSON object.
    """
    for number, text in enumerate(lines, first):
        value = json_value(text, path, number)
        if type(value) is not dict:
            raise InputError("expected a JSON object", path=path, line=number, value=value)
        yield Line(path, number, value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


_WITH_NAN, _STRICT = json.JSONDecoder(parse_constant=float), json.JSONDecoder(parse_constant=_refuse_constant)


def json_file(path: Path) -> Any:
    """The value that a file of JSON says, packed with gzip or not.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    return json_value("\n".join(text_lines(read_content(path), path)), path)


def json_lines_file(path: Path) -> Iterator[Line]:
    """Each line of a file as a JSON object, packed with gzip or not.

    Raises:
        InputError: it cannot be read, or a line is no JSON object.
    """
    return json_lines(text_lines(read_content(path), path), path)
