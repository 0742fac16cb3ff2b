"""Files of settings, and pydantic models made of what they say: a bad value is one line for the person who gave it."""

from __future__ import annotations

import re
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST_KEY_PARTS
from twinserve.settings.own_class import RULES, anchored, read_bytes

Model = TypeVar("Model", bound=BaseModel)
_LONG_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){%d}""" % MOST_KEY_PARTS  # noqa: UP031 - it has braces
)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says; files of one's own classes that it names are looked for beside it.

    Raises:
        InputError: it cannot be read, or is not TOML.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n")
        if (found := _LONG_KEY.search(text)) is not None:
            line = text.count("\n", 0, found.start()) + 1
            raise InputError(f"expected keys of at most {MOST_KEY_PARTS} parts", path=path, line=line, value=found[0])
        return _anchored(tomllib.loads(text), path.parent)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected TOML: {error}", path=path) from error


def _anchored(value: Any, folder: Path, name: str = "") -> Any:
    """A value of a TOML file, with all files of one's own classes in it looked for from `folder`.

    Args:
        name: the field that holds the value, or a list in which it is one of several.
    """
    if isinstance(value, dict):
        return {field: _anchored(inner, folder, field) for field, inner in value.items()}
    if isinstance(value, list):
        return [_anchored(inner, folder, name) for inner in value]
    return (
        anchored(value, folder)
        if name in (*RULES, "router", "decode_router", "draft_length") and isinstance(value, str)
        else value
    )


def read_table(path: Path | None, name: str) -> dict[str, Any]:
    """The table `name` of a TOML file; empty where it has none, or where there is no file.

    Raises:
        InputError: the file cannot be read, is not TOML, or has something else by that name.
    """
    table = {} if path is None else read_toml(path).get(name, {})
    if not isinstance(table, dict):
        raise InputError("expected a table", path=path, field=name, value=table)
    return table


def validated(
    model: type[Model], table: dict[str, Any], values: dict[str, Any], path: Path | None, *, within: str = ""
) -> Model:
    """A pydantic model from `values` over those of `table`, which the file `path` holds.

    Args:
        within: the place of the table in the file, such as "fleet."; stands before a field.

    Raises:
        InputError: a value is unknown, of the wrong kind, out of range, or contradicts another.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        if (text := _without_code(value)) is not None:
            raise InputError("expected text without lone surrogates", field=name, value=text)
    try:
        return model(**(table | given))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        is_given = first["loc"][:1] and first["loc"][0] in given
        source = None if is_given else path
        message = first["msg"].removeprefix("Value error, ")
        if field is None:
            raise InputError(message, path=source) from error
        message = f"expected: {message}"
        if first["type"] == "extra_forbidden":
            close = get_close_matches(str(first["loc"][-1]), model.model_fields, 3)
            message = "there is no such field" + (f", did you mean {' or '.join(close)}?" if close else "")
        field = field if source is None else within + field
        raise InputError(message, path=source, field=field, value=first["input"]) from error


def _without_code(value: Any) -> str | None:
    """A text in a value that UTF-8 cannot say, as an argument of bytes that are none; None if there is none."""
    if isinstance(value, str):
        return None if value.isascii() or value == value.encode("utf-8", "replace").decode() else value
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for part in inner if (found := _without_code(part)) is not None), None)
