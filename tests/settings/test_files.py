"""A file or a folder is there whole under its name, or not at all; what a dead process left is taken over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twinserve.settings.errors import InputError
from twinserve.settings.files import WholeFolder, in_place_of, lock_file, refuse_existing, whole_file, write_whole

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
