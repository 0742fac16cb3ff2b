"""A class of one's own in a setting: the file and the class that a text names, and the object that it stands for."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from typing_extensions import get_protocol_members

from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST_SETTINGS_BYTES

_OF_MYPYC = {"__mypyc_attrs__", "__getstate__", "__setstate__"}
"""What a compiled class has beside its members."""
RULES = ("scheduling_policy", "admission", "victim")
"""Settings of the policies that may name a class of one's own."""
FORM = "FILE.py:CLASS or FILE.py:CLASS(name=value, ...)"
_TEXT = re.compile(r"(.+?\.py):(.+?)(?:@([0-9a-f]{64}))?", re.DOTALL)


@dataclass(frozen=True)
class OwnClass:
    """A class in a file, as a text of the form FILE.py:CLASS(name=value, ...)@SHA256 says it.

    Attributes:
        path: the file; a relative one is looked for from the working directory.
        parameters: what the class is built with, plain values by name.
        sha256: of the file that was meant, in hexadecimal digits; None is whatever it holds.
    """

    path: Path
    name: str
    parameters: dict[str, Any]
    sha256: str | None = None

    @classmethod
    def parse(cls, text: str) -> OwnClass:
        """The class that a text names.

        Raises:
            ValueError: the text has another form; the message is what was expected.
        """
        found = _TEXT.fullmatch(text)
        try:
            name, parameters = _called(found[2].strip() if found else "")
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise ValueError(FORM) from error
        assert found is not None
        return cls(Path(found[1]), name, parameters, found[3])

    @property
    def call(self) -> str:
        """The class and its parameters, as Python would call it; the name alone where there are none."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        return f"{self.name}({given})" if given else self.name

    def __str__(self) -> str:
        return f"{self.path.as_posix()}:{self.call}" + (f"@{self.sha256}" if self.sha256 else "")

    def read(self) -> bytes:
        """The content of the file.

        Raises:
            ValueError: it cannot be read, or has another sha256; the message is what was expected.
        """
        try:
            content = read_bytes(self.path)
        except OSError as error:
            raise ValueError(f"a file that can be read ({self.path}: {error.strerror})") from error
        found = hashlib.sha256(content).hexdigest()
        if self.sha256 not in (None, found):
            raise ValueError(f"{self.path} with sha256 {str(self.sha256)[:12]}, it has {found[:12]}")
        return content


def read_bytes(path: Path) -> bytes:
    """The content of a small file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than `MOST_SETTINGS_BYTES`; or no file can have its name.
    """
    with path.open("rb") as file:
        content = file.read(MOST_SETTINGS_BYTES + 1)
    if len(content) > MOST_SETTINGS_BYTES:
        raise ValueError(f"at most {MOST_SETTINGS_BYTES} bytes in {path.as_posix()} (TWINSERVE_MOST_SETTINGS_BYTES)")
    return content


def _called(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the parameters of a call with plain values by name; SyntaxError, ValueError or TypeError if not."""
    call = ast.parse(text, mode="eval").body
    kind, values, words = (call.func, call.args, call.keywords) if isinstance(call, ast.Call) else (call, [], [])
    parameters = {str(word.arg): ast.literal_eval(word.value) for word in words if word.arg}
    if not isinstance(kind, ast.Name) or values or len(parameters) < len(words):
        raise ValueError(text)
    return kind.id, parameters


def pinned(text: str, known: Collection[str] = ()) -> str:
    """A text with the sha256 of its file behind it; one of the names that are `known` as it is.

    Raises:
        ValueError: it has another form, or its file cannot be read or has another sha256 than the one that stands
            there; the message is what was expected.
    """
    if text in known:
        return text
    try:
        own = OwnClass.parse(text)
    except ValueError as error:
        raise ValueError(", ".join((*known, FORM))) from error
    return str(replace(own, sha256=hashlib.sha256(own.read()).hexdigest()))


def anchored(text: str, folder: Path) -> str:
    """A text that names a class, its file looked for from `folder` where it is relative; any other text as it is."""
    found = _TEXT.fullmatch(text)
    return f"{(folder / found[1]).as_posix()}{text[found.end(1) :]}" if found else text


def identity(text: str) -> str:
    """What is equal for the same class, parameters and content, wherever the file lies; any other text as it is."""
    found = _TEXT.fullmatch(text)
    return text[found.end(1) + 1 :] if found and found[3] else text


def build(text: str, field: str, protocol: type) -> Any:
    """A fresh object of the class that a pinned text names.

    Args:
        field: the setting that holds the text.
        protocol: the protocol that the object has to have the members of.

    Raises:
        InputError: the file is not there or another, is no Python or cannot be imported; it has no such class; the
            class cannot be built with these parameters, or lacks a member of the protocol.
    """
    own = OwnClass.parse(text)

    def refused(expected: str, error: Exception | None = None, line: int | None = None) -> InputError:
        reason = "" if error is None else f" ({type(error).__name__}: {' '.join(str(error).split())})"
        return InputError(f"expected {expected}{reason}", path=own.path, line=line, field=field, value=own.call)

    try:
        module = _imported(own.path, own.read())
    except SyntaxError as error:
        raise refused(f"Python ({error.msg})", line=error.lineno or None) from error
    except ValueError as error:
        raise refused(str(error)) from error
    except _NotImported as error:
        raise refused("a file that can be imported", error.args[0]) from error
    kind = vars(module).get(own.name)
    if not isinstance(kind, type):
        own_kinds = [each for each in vars(module).values() if isinstance(each, type)]
        names = [each.__name__ for each in own_kinds if each.__module__ == module.__name__]
        raise refused(f"a class of this file: {', '.join(names) or 'it has none'}")
    try:
        built = kind(**own.parameters)
    except Exception as error:
        raise refused("a class that can be built", error) from error
    if missing := sorted(n for n in get_protocol_members(protocol) - _OF_MYPYC if not hasattr(built, n)):
        raise refused(f"a class with {', '.join(missing)}")
    return built


class _NotImported(Exception):
    """A file of one's own raised, when it was imported, the exception that is the argument."""


@cache
def _imported(path: Path, content: bytes) -> ModuleType:
    """The module that this content of a file makes, once in a process.

    An import from the path could find another content by now, or bytecode of an earlier one.
    """
    try:
        code = compile(content, str(path), "exec", dont_inherit=True)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error)) from error
    spec = importlib.util.spec_from_file_location(f"own_{hashlib.sha256(content).hexdigest()}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for what their annotations name
    try:
        exec(code, vars(module))
    except Exception as error:
        del sys.modules[spec.name]
        raise _NotImported(error) from error
    return module
