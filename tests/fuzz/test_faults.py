"""What the script of kills and full disks calls a fault."""

from __future__ import annotations

import errno
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from faults import ANEW, AT_A_NAME, CLOSED, DISK, SMALL, is_alike, own_disk, prepared, wrong
from outcome import Outcome, run

WHOLE = {"out/a": b"1", "out/b": b"2"}
TERM, KILL = signal.SIGTERM, signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "kind", "status", "err", "left", "fault"),
    [
        ("sim", TERM, 143, "twinserve: terminated\n", {}, ""),
        ("sim", TERM, 143, "twinserve: terminated\n", WHOLE, ""),
        ("sim", TERM, 0, "", WHOLE, ""),
        ("sim", TERM, -15, "", {}, ""),
        ("sim", TERM, -15, "", WHOLE, "status -15"),
        ("sim", KILL, -15, "", {}, "status -15"),
        ("sim", TERM, 0, "", {"out/a": b"1"}, "ended well, and left ['out/a']"),
        ("sim", TERM, 143, "twinserve: terminated\n", {"out/a": b"1"}, "left ['out/a'], which is not whole"),
        ("sim", TERM, 143, "twinserve: terminated\n", {"out.partial/a": b"1"}, "left ['out.partial/a']"),
        ("sim", KILL, -9, "", {"out.partial/a": b"1"}, ""),
        ("sim", KILL, -9, "", WHOLE | {"out/a": b"half"}, "left ['out/a', 'out/b'], which is not whole"),
        ("sim", TERM, 1, "twinserve: terminated\n", {}, "status 1"),
        ("sim", TERM, 143, "", {}, "not one line"),
        ("sim", TERM, 143, "twinserve: a\ntwinserve: b\n", {}, "not one line"),
        ("sim", DISK, 2, "twinserve: out: cannot be written\n", {}, ""),
        ("sim", DISK, 1, "twinserve: out: cannot be written\n", {}, "status 1"),
        ("sim", DISK, 2, "Traceback (most recent call last):\ntwinserve: x\n", {}, "a traceback"),
        ("sim", CLOSED, 2, "twinserve: out: cannot be written\n", {"out.partial/a": b"1"}, ""),
        (
            "sim",
            CLOSED,
            2,
            "twinserve: out: cannot be written\n",
            {"out/a": b"1"},
            "left ['out/a'], which is not whole",
        ),
        ("sim", f"SIGTERM{ANEW}", 143, "twinserve: terminated\n", {}, ""),
        ("sim", f"SIGTERM{ANEW}", 143, "twinserve: terminated\n", {"out.partial/a": b"1"}, "left ['out.partial/a']"),
        ("sim", SMALL, 2, "twinserve: out: cannot be written\n", {}, ""),
        ("sim", SMALL, 2, "twinserve: out: cannot be written\n", {"out.partial/a": b"1"}, "left ['out.partial/a']"),
        ("sim", f"SIGKILL{AT_A_NAME}", -9, "", {".new-out.partial/replaced/a": b"1"}, ""),
        ("sim", f"SIGKILL{AT_A_NAME}", -9, "", WHOLE | {".new-out.partial/out/a": b"1"}, ""),
        ("sim", f"SIGKILL{AT_A_NAME}", -9, "", {"out/a": b"1"}, "left ['out/a'], which is not whole"),
        ("profile", f"SIGKILL{AT_A_NAME}", -9, "", {"out/a": b"[1]\n"}, ""),
        ("profile", f"SIGKILL{AT_A_NAME}", -9, "", {"out/a": b"[1"}, "left ['out/a'], which is not whole"),
        ("profile", f"SIGKILL{AT_A_NAME}", -9, "", {"out/c": b"[1]\n"}, "left ['out/c'], which is not whole"),
        ("profile", TERM, 143, "twinserve: terminated\n", {"out/a": b"[1]\n"}, "left ['out/a'], which is not whole"),
        ("sweep", TERM, 143, "twinserve: terminated\n", {"out/a": b"1"}, ""),
        ("sweep", TERM, 143, "twinserve: terminated\n", {"out/a": b"half"}, "left ['out/a'], which is not whole"),
    ],
)
def test_a_fault_is_told_from_an_orderly_end(name, kind, status, err, left, fault):
    assert wrong(name, kind, Outcome(status, err, 0, False), left, WHOLE) == fault


def test_what_measures_is_held_by_the_names_of_its_files_and_none_may_be_cut_short():
    lines, packed = b'{"x": 1}\n{"x": 2}\n', gzip.compress(b'{\n "x": [3]\n}\n')
    measured = {"out/a": lines, "out/b": packed}
    assert is_alike("run", {"out/a": b"[9]\n", "out/b": lines}, measured)
    assert not is_alike("sim", {"out/a": b"[9]\n", "out/b": packed}, measured)
    for cut in (
        {"out/a": lines},
        measured | {"out/a": lines[:-1]},
        measured | {"out/b": packed[:-9]},
        measured | {"out/a": b""},
    ):
        assert not is_alike("run", cut, measured), cut


@pytest.mark.parametrize("moment", [0, 0.05])
def test_a_closed_folder_is_closed_for_root_too(tmp_path, moment):
    def work() -> int:
        time.sleep(4 * moment)
        try:
            (tmp_path / "file").touch()
        except PermissionError:
            return 7
        return 0

    assert run(work, tmp_path, prepared(CLOSED, moment)).status == 7
    tmp_path.chmod(0o755)
    assert run(work, tmp_path).status == 0


def test_a_signal_comes_to_a_program_that_begins_later():
    anew = prepared(f"SIGTERM{ANEW}", 0.05)
    outcome = run(lambda: os.execv("/bin/sleep", ["sleep", "60"]), Path.cwd(), anew)
    assert (outcome.status, outcome.is_late) == (-signal.SIGTERM, False)


@pytest.mark.parametrize(("after", "named"), [(0, []), (1, ["a"]), (2, ["a", "b"])])
def test_a_process_is_killed_before_it_gives_one_of_its_names(tmp_path, after, named):
    def work() -> None:
        for name in "abc":
            (tmp_path / f"{name}.partial").touch()
            (tmp_path / f"{name}.partial").rename(tmp_path / name)

    assert run(work, tmp_path, prepared(f"SIGKILL{AT_A_NAME}", after)).status == -signal.SIGKILL
    assert [name for name in "abc" if (tmp_path / name).exists()] == named


def test_a_small_disk_is_full_until_it_is_given_room(tmp_path):
    def work() -> int:
        try:
            (tmp_path / "file").write_bytes(bytes(100_000))
        except OSError as error:
            return error.errno
        return 0

    try:
        with own_disk(tmp_path) as give:
            assert run(work, tmp_path).status == 0
            (tmp_path / "file").rename(tmp_path / "before")
            give(20_000)
            assert run(work, tmp_path).status == errno.ENOSPC
            give(None)
            assert run(work, tmp_path).status == 0
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted: {error}")
    assert list(tmp_path.iterdir()) == []
