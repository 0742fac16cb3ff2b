"""A class of one's own: how it is named, that its file is the one that was meant, and what is said if it is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import pytest

from twinserve.settings.errors import InputError
from twinserve.settings.own_class import OwnClass, anchored, build, pinned


class Opener(Protocol):
    """What the tests ask for."""

    width: int

    def open(self) -> int: ...
    def __len__(self) -> int: ...


DOOR = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Door:
    width: int = 2

    def open(self):
        return self.width

    def __len__(self):
        return 1

class Wall:
    def __len__(self):
        return 1

HEIGHT = 3
"""


@pytest.fixture
def door(tmp_path) -> Path:
    path = tmp_path / "door.py"
    path.write_text(DOOR)
    return path


@pytest.mark.parametrize(
    ("text", "shown", "parameters"),
    [
        ("a/b.py:C", "a/b.py:C", {}),
        ("a/b.py:C()", "a/b.py:C", {}),
        ("b.py:C( y = -1, x='@:,()' )", "b.py:C(y=-1, x='@:,()')", {"y": -1, "x": "@:,()"}),
        ("b.py:C(x=[1, 2.5], y={'a': None})", "b.py:C(x=[1, 2.5], y={'a': None})", {"x": [1, 2.5], "y": {"a": None}}),
        ("./b.py:C@" + "0" * 64, "b.py:C@" + "0" * 64, {}),
    ],
)
def test_a_text_names_a_file_a_class_and_what_it_is_built_with(text, shown, parameters):
    own = OwnClass.parse(text)
    assert (str(own), own.name, own.parameters) == (shown, "C", parameters)
    assert OwnClass.parse(shown) == own


@pytest.mark.parametrize(
    "text",
    [
        "b.py", "b.py:", "b.txt:C", ":C", "b.py:C(1)", "b.py:C(x=y)", "b.py:C(**x)", "b.py:C(x=1, x=2)", "b.py:C(x=1",
        "b.py:a.C", "b.py:C(x={[]: 1})", "b.py:C@abc", "b.py:C()()",
    ],
)  # fmt: skip
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match=re.escape("FILE.py:CLASS(name=value, ...)")):
        OwnClass.parse(text)


def test_a_pinned_text_holds_the_sha256_and_its_file_may_not_change(door):
    text = pinned(f"{door}:Door( width = 4 )")
    assert re.fullmatch(re.escape(f"{door}:Door(width=4)@") + "[0-9a-f]{64}", text)
    assert pinned(text) == text
    door.write_text(DOOR + "\n")
    with pytest.raises(ValueError, match=rf"{door} with sha256 {text[-64:-52]}, it has [0-9a-f]{{12}}$"):
        pinned(text)
    with pytest.raises(InputError, match="it has"):
        build(text, "entrance", Opener)


def test_names_that_are_known_need_no_file():
    assert pinned("revolving", known=("revolving",)) == "revolving"
    with pytest.raises(ValueError, match=re.escape("revolving, FILE.py:CLASS or FILE.py:CLASS(name=value, ...)")):
        pinned("sliding", known=("revolving",))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"a file that can be read \({tmp_path}/none.py: No such file or directory"):
        pinned(f"{tmp_path}/none.py:Door")


def test_a_relative_file_is_looked_for_beside_the_file_that_names_it():
    folder = Path("conf")
    assert anchored("door.py:Door(width=4)", folder) == "conf/door.py:Door(width=4)"
    assert anchored("/a/door.py:Door", folder) == "/a/door.py:Door"
    assert anchored("revolving", folder) == "revolving"
    assert anchored(f"../door.py:Door@{'0' * 64}", folder) == f"conf/../door.py:Door@{'0' * 64}"


def test_an_object_is_built_with_its_parameters_and_a_class_is_there_once_for_each_content(door):
    first, second = (build(pinned(f"{door}:{call}"), "entrance", Opener) for call in ("Door", "Door(width=4)"))
    assert (first.open(), second.open()) == (2, 4)
    assert type(first) is type(second) and first is not second
    door.write_text(DOOR.replace("= 2", "= 5"))
    third = build(pinned(f"{door}:Door"), "entrance", Opener)
    assert (third.open(), build(pinned(f"{door}:Door"), "entrance", Opener).open()) == (5, 5)
    assert type(third) is not type(first) and first.open() == 2
    assert [path.name for path in door.parent.iterdir()] == ["door.py"], "nothing is written beside it"


@pytest.mark.parametrize(
    ("content", "call", "where", "words"),
    [
        (DOOR, "Gate", "", "expected a class of this file: Door, Wall"),
        (DOOR, "HEIGHT", "", "expected a class of this file: Door, Wall"),
        (DOOR, "Wall", "", "expected a class with open, width"),
        (DOOR, "Door(height=3)", "", "expected a class that can be built (TypeError: Door.__init__() got an unexp"),
        ("class Door:\n    def __init__(self):\n        1 / 0", "Door", "", "be built (ZeroDivisionError: division"),
        ("class Door\n    pass", "Door", ":1", "expected Python (expected ':')"),
        ("class Door:\n    pass\n\0", "Door", "", "expected Python (source code"),
        ("import no_such_module", "Door", "", "expected a file that can be imported (ModuleNotFoundError: No module"),
        ("raise ValueError('one\\ntwo')", "Door", "", "expected a file that can be imported (ValueError: one two)"),
    ],
)
def test_what_cannot_be_built_is_one_line_with_file_setting_and_reason(tmp_path, content, call, where, words):
    path = tmp_path / "door.py"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        build(pinned(f"{path}:{call}"), "entrance", Opener)
    said = str(error.value)
    assert said.startswith(f"{path}{where}: entrance is '{call}', ") and words in said, said
    assert "\n" not in said
