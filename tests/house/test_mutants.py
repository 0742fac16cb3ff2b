"""The runner of the mutants: what it applies, what it calls caught, and what it tells."""

from __future__ import annotations

import builtins
import importlib.util
import json
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "mutants"
TESTS = ["tests/policies/test_block_manager.py"]
RIGHT = "        return -(-num_tokens // self.block_size)\n"


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("mutants_run", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write(tmp_path):
    """Writes a patch that replaces the line of `blocks_for` by another."""
    lines = (ROOT / "policies" / "block_manager.py").read_text().splitlines(keepends=True)
    number = lines.index(RIGHT) + 1
    before, after = lines[number - 2], lines[number]

    def patch(name: str, line: str, *, prefixes=("a/", "b/"), found: str = RIGHT) -> Path:
        old, new = (f"{prefix}policies/block_manager.py" for prefix in prefixes)
        text = f"# {name} in words\n\n--- {old}\n+++ {new}\n"
        text += f"@@ -{number - 1},3 +{number - 1},3 @@\n {before}-{found}+{line} {after}"
        path = tmp_path / f"{name}.patch"
        path.write_text(text)
        return path

    return patch


def unknown_names(source: str) -> set[str]:
    """The names that a module reads and nobody defines: a bug with one would be caught for that alone."""

    def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
        yield table
        for inner in table.get_children():
            yield from tables(inner)

    top = symtable.symtable(source, "", "exec")
    own = {one.get_name() for one in top.get_symbols() if one.is_assigned() or one.is_imported() or one.is_namespace()}
    read = {one.get_name() for table in tables(top) for one in table.get_symbols() if one.is_global() or table is top}
    return read - own - set(dir(builtins)) - {"__file__", "__doc__", "__name__"}


def test_names_that_nobody_defines_are_found():
    known = (
        "import a\nfrom b import c\nclass D:\n    e: int = c\n    def f(self, g):\n        return a, len(g), self.h\n"
    )
    assert unknown_names(known) == set()
    assert unknown_names(known.replace("len(g)", "len(i)")) == {"i"}
    assert unknown_names(known + "j = [k for k in m]\n") == {"m"}


def test_there_are_many_and_each_says_in_its_first_line_what_is_wrong(runner):
    patches = sorted(FOLDER.glob("*.patch"))
    bugs = {runner.bug_of(patch) for patch in patches}
    assert len(bugs) == len(patches) >= 30
    assert not [bug for bug in bugs if bug.startswith(("---", "+++", "diff"))]


def test_each_applies_and_changes_alone_what_decides(runner):
    with runner.a_copy() as copy:
        right = {path: path.read_bytes() for path in copy.rglob("*.py")}
        for patch in sorted(FOLDER.glob("*.patch")):
            assert runner.apply(patch, copy) == "", patch.name
            changed = [path for path, content in right.items() if path.read_bytes() != content]
            horizon = copy / "sim" / "horizon.py"
            rooms = {copy / "policies", copy / "orders"}
            assert changed and {path.parent for path in changed if path != horizon} <= rooms, patch.name
            for path in changed:
                assert not unknown_names(path.read_text()), patch.name
                path.write_bytes(right[path])


def test_those_of_the_worlds_apply_one_by_one_and_change_alone_a_file_whose_tests_are_known(runner):
    patches = sorted((FOLDER / "worlds").glob("*.patch"))
    assert len({runner.bug_of(patch) for patch in patches}) == len(patches) >= 40
    assert all((ROOT / "tests" / test).is_file() for tests in runner.TESTS_OF.values() for test in tests)
    with runner.a_copy() as copy:
        right = {name: (copy / name).read_bytes() for name in runner.TESTS_OF}
        for patch in patches:
            assert runner.apply(patch, copy) == "", patch.name
            (changed,) = [name for name, content in right.items() if (copy / name).read_bytes() != content]
            assert runner.tests_of(patch) == [f"tests/{test}" for test in runner.TESTS_OF[changed]]
            assert not unknown_names((copy / changed).read_text()), patch.name
            (copy / changed).write_bytes(right[changed])


@pytest.mark.parametrize("prefixes", [("a/", "b/"), ("", "")])
def test_a_bug_is_caught_and_the_test_is_named(runner, write, prefixes):
    tests = [*TESTS, "tests/policies/test_machines.py"]  # which takes long, and would notice too
    row = runner.examine(write("wrong", "        return num_tokens // self.block_size\n", prefixes=prefixes), tests)
    assert row.bug == "wrong in words"
    assert row.caught_by.startswith(f"{TESTS[0]}::test_") and row.why_not == ""


def test_what_changes_nothing_survives(runner, write):
    row = runner.examine(write("right", "        return -(-num_tokens // self.block_size)  # again\n"), TESTS)
    assert (row.caught_by, row.why_not) == ("", "survived")


def test_what_does_not_apply_is_not_caught(runner, write):
    row = runner.examine(write("elsewhere", "        pass\n", found="        return 7\n"), TESTS)
    assert row.caught_by == "" and row.why_not.startswith("does not apply: ")


def test_the_exit_status_is_1_if_one_survives(runner, write, tmp_path, monkeypatch, capsys):
    write("wrong", "        return num_tokens // self.block_size\n")
    monkeypatch.setattr(runner, "tests_of", lambda patch: TESTS)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path), "--json"])
    assert runner.main() == 0
    told = json.loads(capsys.readouterr().out)
    assert told["caught"] == len(told["rows"]) == 1
    write("right", "        return -(-num_tokens // self.block_size)  # again\n")
    assert runner.main() == 1
    assert {row["why_not"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"", "survived"}


def test_every_file_of_policy_tests_is_run_and_the_slow_ones_last(runner):
    tests = runner.policy_tests()
    assert sorted(tests) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "policies").glob("test_*.py")
    )
    slow = [Path(test).name for test in tests if Path(test).name in runner.SLOW]
    assert tuple(slow) == runner.SLOW and [Path(test).name for test in tests[-len(slow) :]] == slow
