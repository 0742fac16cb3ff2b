"""A file or a folder is there whole under its name, or not at all; what a dead process left is taken over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twinserve.settings import files
from twinserve.settings.errors import InputError
from twinserve.settings.files import (
    WholeFolder,
    in_place_of,
    lock_file,
    pair_in_place_of,
    refuse_existing,
    whole_file,
    write_pair,
    write_whole,
)

LEAVES_HALF = """
import os, sys
from pathlib import Path
from twinserve.settings.files import WholeFolder, whole_file
out = Path(sys.argv[1])
if sys.argv[2] == "file":
    with whole_file(out) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), 9)
folder = WholeFolder(out)
(folder.partial / "a").write_bytes(b"half")
os.kill(os.getpid(), 9)
"""

DIES_RENAMING = """
import os, sys
from pathlib import Path
from twinserve.settings.files import WholeFolder, in_place_of, write_pair, write_whole
out, kind, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def renamed(how):
    def rename(*paths):
        global left
        if not left:
            os.kill(os.getpid(), 9)
        left -= 1
        return how(*paths)
    return rename

Path.rename, Path.replace, os.link = map(renamed, (Path.rename, Path.replace, os.link))
if kind == "pair":
    write_pair(out, "whole", Path(sys.argv[4]), "beside", False)
with in_place_of(out, True, ["a"]) as place:
    if kind == "file":
        write_whole(place, "whole")
    else:
        with WholeFolder(place) as folder:
            (folder.partial / "a").write_text("whole")
            folder.finish()
"""


def dies_renaming(out: Path, kind: str, after: int, *more: Path) -> None:
    """A process writes, and is killed when it has given so many names."""
    words = [sys.executable, "-c", DIES_RENAMING, str(out), kind, str(after), *map(str, more)]
    assert subprocess.run(words, check=False).returncode == -9


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(out: Path, kind: str) -> None:
    if kind == "file":
        write_whole(out, "whole")
    else:
        with WholeFolder(out) as folder:
            (folder.partial / "a").write_text("whole")
            folder.finish()


def content(out: Path) -> str:
    return (out / "a" if out.is_dir() else out).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_it_is_not_there_until_it_is_whole(tmp_path, kind):
    out = tmp_path / "deep" / "out"
    if kind == "file":
        with whole_file(out) as file:
            file.write(b"whole")
            assert names(out.parent) == ["out.partial"]
    else:
        with WholeFolder(out) as folder:
            (folder.partial / "a").write_text("whole")
            assert names(out.parent) == ["out.partial"]
            folder.finish()
    assert names(out.parent) == ["out"] and content(out) == "whole"


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_exception_leaves_nothing(tmp_path, kind, error):
    with pytest.raises((KeyError, KeyboardInterrupt, OSError, InputError)):  # noqa: SIM117
        if kind == "file":
            with whole_file(tmp_path / "out") as file:
                file.write(b"half")
                raise error
        else:
            with WholeFolder(tmp_path / "out") as folder:
                (folder.partial / "a").write_text("half")
                raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_dead_process_left_is_replaced(tmp_path, kind):
    command = [sys.executable, "-c", LEAVES_HALF, str(tmp_path / "out"), kind]
    assert subprocess.run(command, check=False).returncode == -9
    assert names(tmp_path) == ["out.partial"]
    write(tmp_path / "out", kind)
    assert names(tmp_path) == ["out"] and content(tmp_path / "out") == "whole"


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("writer", ["file", "folder"])
def test_what_a_living_process_writes_is_respected(tmp_path, kind, writer):
    out = tmp_path / "out"
    with whole_file(out) if writer == "file" else WholeFolder(out):
        with pytest.raises(InputError, match="out.partial: exists already: another run is writing it"):
            write(out, kind)
        assert names(tmp_path) == ["out.partial"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_symbolic_link_in_its_place_is_not_followed(tmp_path, kind):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("kept")
    folder.mkdir()
    (folder / "a").write_text("kept")
    for target in (victim, folder, tmp_path / "nothing"):
        (tmp_path / "out.partial").symlink_to(target)
        with pytest.raises(InputError, match="out.partial: expected nothing there"):
            write(tmp_path / "out", kind)
        (tmp_path / "out.partial").unlink()
    assert victim.read_text() == content(folder) == "kept"
    assert names(tmp_path) == ["folder", "victim"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_hard_link_left_in_its_place_keeps_its_content(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    os.link(victim, tmp_path / "out.partial")
    write(tmp_path / "out", kind)
    assert victim.read_text() == "kept"
    assert content(tmp_path / "out") == "whole"


def test_a_pipe_in_its_place_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "out.partial")
    with pytest.raises(InputError, match="out.partial: expected nothing there"):
        write_whole(tmp_path / "out", "whole")


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("taken", ["file", "folder", "link to nothing"])
def test_what_has_the_name_already_is_kept(tmp_path, kind, taken):
    out = tmp_path / "out"
    if taken == "file":
        out.write_text("kept")
    elif taken == "folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="out: exists already, expected a new name"):
        write(out, kind)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_got_the_name_meanwhile_is_kept(tmp_path, kind):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="out: exists already, expected a new name"):  # noqa: SIM117
        if kind == "file":
            with whole_file(out):
                out.write_text("kept")
        else:
            with WholeFolder(out) as folder:
                out.mkdir()
                folder.finish()
    assert names(tmp_path) == ["out"]


def test_a_file_is_replaced_where_that_is_wanted(tmp_path):
    out = tmp_path / "out"
    write_whole(out, "first")
    write_whole(out, "second", replaces=True)
    assert (out.read_text(), names(tmp_path)) == ("second", ["out"])
    with pytest.raises(KeyError), whole_file(out, replaces=True) as file:
        file.write(b"half")
        raise KeyError
    assert (out.read_text(), names(tmp_path)) == ("second", ["out"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, kind):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / ("x" * 250)):
        with pytest.raises(InputError, match="cannot be written: (Not a directory|File name too long)"):
            write(out, kind)


def test_a_text_that_no_utf8_says_is_written_all_the_same(tmp_path):
    write_whole(tmp_path / "out", "a\ud83db")
    assert (tmp_path / "out").read_bytes() == b"a?b"


def test_a_lock_neither_empties_a_file_nor_follows_a_link(tmp_path):
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.write_text("kept")
    link.symlink_to(kept)
    with lock_file(kept):
        assert kept.read_text() == "kept"
        with pytest.raises(BlockingIOError):
            lock_file(kept)
    lock_file(kept).close()
    with pytest.raises(OSError):
        lock_file(link)


def test_nothing_is_refused_where_nothing_is_written(tmp_path):
    refuse_existing(None)
    refuse_existing(tmp_path / "out")


def put(out: Path, kind: str, text: str) -> None:
    if kind == "folder":
        out.mkdir()
    (out / "a" if kind == "folder" else out).write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_has_the_name_is_whole_until_what_replaces_it_is(tmp_path, kind):
    out = tmp_path / "out.jsonl"
    put(out, kind, "before")
    with in_place_of(out, True, ["a"]) as place:
        assert place.suffix == ".jsonl", "what decides how it is written"
        write(place, kind)
        assert content(out) == "before"
    assert content(out) == "whole" and names(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_has_the_name_stays_where_nothing_replaces_it(tmp_path, kind):
    out = tmp_path / "out"
    put(out, kind, "before")
    with pytest.raises(InputError, match="out: exists already, expected a new name"), in_place_of(out, False):
        raise AssertionError("nothing is begun")
    with pytest.raises(KeyError), in_place_of(out, True, ["a"]) as place:
        write(place, kind)
        raise KeyError("too late")
    with in_place_of(out, True, ["a"]):
        pass
    assert content(out) == "before" and names(tmp_path) == ["out"]


def test_only_what_is_made_here_is_replaced(tmp_path):
    folder, link = tmp_path / "folder", tmp_path / "link"
    put(folder, "folder", "somebody's")
    link.symlink_to(folder)
    for out, marks in ((folder, ["run.json"]), (folder, []), (link, ["a"])):
        with pytest.raises(InputError, match="is not replaced: expected a f"), in_place_of(out, True, marks):
            raise AssertionError("nothing is begun")
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(InputError, match="pipe: is not replaced: expected a file"),
        in_place_of(tmp_path / "pipe", True),
    ):
        raise AssertionError("nothing is begun")
    assert content(folder) == "somebody's"


def test_where_nothing_has_the_name_it_is_written_there(tmp_path):
    for out in (tmp_path / "new", None):
        with in_place_of(out, True) as place:
            assert place is out


@pytest.mark.parametrize("is_forced", [True, False])
@pytest.mark.parametrize(("kind", "after"), [("file", 0), ("file", 1), ("folder", 0), ("folder", 1), ("folder", 2)])
def test_what_a_process_was_replacing_when_it_died_is_as_it_was(tmp_path, kind, after, is_forced):
    out = tmp_path / "out"
    put(out, kind, "before")
    dies_renaming(out, kind, after)
    assert out.exists() == ((kind, after) != ("folder", 2)), "it had the one name no more, and not yet the other"
    if is_forced:
        with in_place_of(out, True, ["a"]) as place:
            assert content(out) == "before"
            write(place, kind)
    else:
        with pytest.raises(InputError, match="out: exists already"), in_place_of(out, False):
            raise AssertionError("nothing is begun")
    assert content(out) == ("whole" if is_forced else "before") and names(tmp_path) == ["out"]


def test_a_folder_that_was_replaced_when_a_process_died_is_gone(tmp_path, monkeypatch):
    out = tmp_path / "out"
    put(out, "folder", "before")
    with monkeypatch.context() as patch, in_place_of(out, True, ["a"]) as place:
        write(place, "folder")
        patch.setattr(WholeFolder, "discard", lambda self: self._let_go())
    assert names(tmp_path) == [".new-out.partial", "out"] and content(out) == "whole"
    with pytest.raises(InputError, match="out: exists already"), in_place_of(out, False):
        raise AssertionError("nothing is begun")
    assert names(tmp_path) == ["out"] and content(out) == "whole"


def test_who_is_stopped_between_two_names_of_a_folder_gives_it_the_first_back(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    put(out, "folder", "before")

    def stopped(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if target.name == files.REPLACED:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt) as ended, in_place_of(out, True, ["a"]) as place:
        write(place, "folder")
    assert ended.value.__notes__ == [f"{out} is as it was"]
    assert content(out) == "before" and names(tmp_path) == ["out"]


def test_what_another_process_is_replacing_is_left_to_it(tmp_path):
    out = tmp_path / "out"
    put(out, "folder", "before")
    with in_place_of(out, True, ["a"]) as place:
        for is_forced in (True, False):
            with pytest.raises(InputError, match="another run is writing it"), in_place_of(out, is_forced, ["a"]):
                raise AssertionError("nothing is begun")
        write(place, "folder")
    assert content(out) == "whole" and names(tmp_path) == ["out"]


def pair(out: Path, beside: Path, is_forced: bool = False) -> None:
    with pair_in_place_of(out, beside, is_forced):
        write_pair(out, "whole", beside, "beside", is_forced)


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """The names of a pair, in two folders."""
    return tmp_path / "one" / "out", tmp_path / "other" / "beside"


def assert_whole(out: Path, beside: Path) -> None:
    assert (out.read_text(), beside.read_text()) == ("whole", "beside")
    assert names(out.parent) == ["out"] and names(beside.parent) == ["beside"]


@pytest.mark.parametrize(("after", "has_beside"), [(0, False), (1, True)])
def test_one_of_a_pair_that_a_dead_process_left_alone_is_replaced(two, after, has_beside):
    out, beside = two
    dies_renaming(out, "pair", after, beside)
    assert not out.exists() and beside.exists() == has_beside
    pair(out, beside)
    assert_whole(out, beside)


def test_a_pair_that_is_there_is_replaced_where_that_is_wanted(two):
    for path in two:
        write_whole(path, "before")
    pair(*two, is_forced=True)
    assert_whole(*two)


@pytest.mark.parametrize("number", [0, 1])
def test_a_pair_of_which_one_name_is_taken_is_refused(two, number):
    write_whole(two[number], "somebody's")
    for write_both in (pair, lambda out, beside: write_pair(out, "whole", beside, "beside", False)):
        with pytest.raises(InputError, match=f"{two[number].name}: exists already, expected a new name"):
            write_both(*two)
    assert two[number].read_text() == "somebody's" and names(two[number].parent) == [two[number].name]
    assert not two[1 - number].exists()


@pytest.mark.parametrize("left", ["out", "beside", "both"])
def test_what_lies_beside_and_is_of_no_dead_process_is_kept(two, left):
    out, beside = two
    write_whole(beside, "somebody's")
    out.parent.mkdir()
    for path in two:
        if left in (path.name, "both"):
            path.with_name(f"{path.name}.partial").write_text("half")
    with pytest.raises(InputError, match="beside: exists already"):
        pair(out, beside)
    assert beside.read_text() == "somebody's"


def test_one_of_a_pair_whose_other_a_living_process_has_yet_to_name_is_respected(two, monkeypatch):
    out, beside = two
    name_too = files._name_too

    def meanwhile(partial: Path, path: Path) -> None:
        name_too(partial, path)
        with pytest.raises(InputError, match="beside.partial: exists already: another run is writing it"):
            pair(out, beside)

    monkeypatch.setattr(files, "_name_too", meanwhile)
    write_pair(out, "whole", beside, "beside", False)
    assert_whole(out, beside)


@pytest.mark.parametrize("moment", ["_settle", "_name_too"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_of_a_pair_that_cannot_be_written_nothing_is_there(two, monkeypatch, moment, error):
    out, beside = two
    done = getattr(files, moment)

    def stopped(*given: object) -> None:
        done(*given)
        if moment == "_name_too" or names(out.parent):
            raise error(28, "No space left on device")

    out.parent.mkdir()
    monkeypatch.setattr(files, moment, stopped)
    with pytest.raises(InputError if error is OSError else error) as ended:
        pair(out, beside)
    if error is OSError:
        refused = out if moment == "_settle" else beside
        assert str(ended.value) == f"{refused}: cannot be written: No space left on device"
    else:
        assert ended.value.__notes__ == [f"{out} was not written"]
    assert names(out.parent) == names(beside.parent) == []


def test_a_pair_is_written_where_a_file_has_but_one_name(two, monkeypatch):
    def link(*paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    pair(*two)
    assert_whole(*two)


def test_a_pair_of_one_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected another name"):
        pair(tmp_path / "out", tmp_path / "other" / ".." / "out")
    assert names(tmp_path) == []
