"""What the script of kills and full disks calls a fault."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from faults import DISK, is_alike, wrong
from outcome import Outcome

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
        ("sweep", TERM, 143, "twinserve: terminated\n", {"out/a": b"1"}, ""),
        ("sweep", TERM, 143, "twinserve: terminated\n", {"out/a": b"half"}, "left ['out/a'], which is not whole"),
    ],
)
def test_a_fault_is_told_from_an_orderly_end(name, kind, status, err, left, fault):
    assert wrong(name, kind, Outcome(status, err, 0, False), left, WHOLE) == fault


def test_what_measures_is_held_by_the_names_of_its_files():
    assert is_alike("run", {"out/a": b"9", "out/b": b"9"}, WHOLE)
    assert not is_alike("run", {"out/a": b"1"}, WHOLE) and not is_alike("sim", {"out/a": b"9", "out/b": b"2"}, WHOLE)
