"""Lines: the content of a text file as named values, which are checked as they are taken."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any

from twinserve.settings.errors import InputError
from twinserve.settings.limits import whole_number
from twinserve.traces.request import Part

LARGEST = (1 << 63) - 1
LATEST_NS = LARGEST // 2
"""When something may arrive that is replayed, 146 years in: it is served later, and no time has more than 63 bits."""
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


_PIECE = 1 << 16
"""Of a line that does not end within so many bytes, these are looked at before the others are read."""
LARGEST_VALUE = 512 << 20
"""Bytes of a line, or of a document that is one value; TWINSERVE_LARGEST_VALUE is another number of them."""

_UNPACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


class Content:
    """The lines of a UTF-8 text, read as they are asked for and packed with gzip or zstd or not, as its bytes say.

    Lines end in LF or CRLF, the last one in either or in nothing; empty lines at the end are left out. As a context
    manager it is closed in the end.

    Args:
        path: of the file.
        digest: a sha256 of what was read before, which goes on; one of its own unless given.

    Raises:
        InputError: the file cannot be read, holds what is no text, is packed and cut short, or has a line of more than
            `LARGEST_VALUE` bytes; some of it only where that is met.
    """

    def __init__(self, path: Path, digest: Any = None):
        self._path, self._digest = path, digest or hashlib.sha256()
        self._most = whole_number("TWINSERVE_LARGEST_VALUE", LARGEST_VALUE)
        self._files: list[Any] = []
        self._number = self._offset = 0
        with self._reading():
            file = path.open("rb")
            self._files.append(file)
            packed = next((name for magic, name in _UNPACKED.items() if file.peek(4).startswith(magic)), None)
            self._stream: Any = file
            if packed is not None:
                self._stream = io.BufferedReader(_unpacked(packed, file, path), 1 << 16)
                self._files.append(self._stream)
            self.begin = self._stream.peek(64)[:64]

    def __iter__(self) -> Iterator[str]:
        num_empty = 0
        for raw in self._raw_lines():
            text = self._decoded(raw)
            if not text:
                num_empty += 1
                continue
            yield from [""] * num_empty
            num_empty = 0
            yield text

    def rest_of_lines(self) -> int:
        """Read on to the end without a look at what is there; the number of lines that are not empty."""
        count, last = 0, b"\n"
        with self._reading():
            while chunk := self._stream.read(1 << 20):
                self._digest.update(chunk)
                chunk = last + chunk.replace(b"\r", b"")
                count += chunk.count(b"\n") - chunk.count(b"\n\n") - chunk.endswith(b"\n")
                last = chunk[-1:]
        return count

    def sha256(self) -> str:
        """Of the content, unpacked; reads what was not read yet."""
        self.rest_of_lines()
        return self._digest.hexdigest()

    def whole(self, first: str) -> str:
        """The text from `first`, a line that was read, to the end.

        Raises:
            InputError: it has more than `LARGEST_VALUE` bytes.
        """
        lines, size = [first], len(first)
        for line in self:
            size += len(line)
            if size > self._most:
                raise self._too_large(f"a text of at most {self._most} bytes")
            lines.append(line)
        return "\n".join(lines)

    def _raw_lines(self) -> Iterator[bytes]:
        with self._reading():
            while raw := self._stream.readline(_PIECE):
                self._number += 1
                if len(raw) == _PIECE and b"\0" not in raw:
                    raw = self._long_line(raw)
                self._digest.update(raw)
                yield raw

    def _long_line(self, raw: bytes) -> bytes:
        """A line that begins with `raw`, in pieces until it is known not to be too long."""
        pieces, size = [raw], len(raw)
        while not pieces[-1].endswith(b"\n") and (piece := self._stream.readline(_PIECE)):
            pieces.append(piece)
            size += len(piece)
            if size > self._most:
                raise self._too_large(f"lines of at most {self._most} bytes")
        return b"".join(pieces)

    def _decoded(self, raw: bytes) -> str:
        try:
            text = raw.decode("utf-8-sig" if self._number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = f"{error.reason} at byte {self._offset + error.start}"
            raise InputError(f"expected UTF-8: {where}", path=self._path, line=self._number) from error
        self._offset += len(raw)
        if "\0" in text:
            raise InputError("expected text, it holds NUL", path=self._path, line=self._number)
        return text.removesuffix("\n").removesuffix("\r")

    def _too_large(self, expected: str) -> InputError:
        problem = f"expected {expected}; TWINSERVE_LARGEST_VALUE can name a larger number"
        return InputError(problem, path=self._path, line=self._number)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"expected a whole gzip file: {error}", path=self._path) from error
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}", path=self._path) from error
        except ValueError as error:  # of a name that holds NUL
            raise InputError(f"cannot be read: {error}", path=self._path) from error

    def __enter__(self) -> Content:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in reversed(self._files):
            file.close()


def _unpacked(name: str, file: Any, path: Path) -> Any:
    """A stream of what is packed in `file`."""
    if name == "gzip":
        return gzip.GzipFile(fileobj=file)
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            "is packed with zstd: expected the package zstandard, pip install 'twinserve[traces]'", path=path
        ) from error
    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


def _whole_text(path: Path) -> str:
    with Content(path) as content:
        lines = iter(content)
        return content.whole(next(lines, ""))


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


def nanoseconds(seconds: str | float, unit_ns: int = 1_000_000_000) -> tuple[int, bool]:
    """Seconds >= 0, or units of so many nanoseconds, in whole nanoseconds, and whether that took rounding.

    A float counts as the digits it is shown with.

    Raises:
        ValueError: it is no number, or is beyond 63 bits.
    """
    text = str(seconds)
    whole, _, fraction = text.partition(".")
    if (
        unit_ns == 1_000_000_000
        and len(whole) <= 9
        and len(fraction) <= 9
        and text.isascii()
        and (whole + fraction).isdigit()
    ):
        return int(whole or 0) * 1_000_000_000 + int(fraction.ljust(9, "0")), False
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    try:
        exact = Decimal(text) * unit_ns
        if not 0 <= exact <= LARGEST:
            raise ValueError(text)
    except ArithmeticError as error:
        raise ValueError(text) from error
    return round(exact), round(exact) != exact


def json_lines(lines: Iterable[str], path: Path, first: int = 1, *, nan: bool = False) -> Iterator[Line]:
    """Each line as a JSON object; the first of `lines` is the file's line number `first`.

    Raises:
        InputError: a line is no JSON object.
    """
    for number, text in enumerate(lines, first):
        value = json_value(text, path, number, nan=nan)
        if type(value) is not dict:
            raise InputError("expected a JSON object", path=path, line=number, value=value)
        yield Line(path, number, value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} stands twice in an object")
    return values


_WITH_NAN = json.JSONDecoder(parse_constant=float, object_pairs_hook=_object)
_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def json_file(path: Path) -> Any:
    """The value that a file of JSON says, packed or not.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    return json_value(_whole_text(path), path)


def json_lines_file(path: Path) -> Iterator[Line]:
    """Each line of a file as a JSON object, packed or not.

    Raises:
        InputError: it cannot be read, or a line is no JSON object.
    """
    with Content(path) as content:
        yield from json_lines(content, path)
