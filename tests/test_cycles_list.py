"""The list in docs/cycles.md against the learning guide: whatever the guide names is there and is what the guide says.

TWINSERVE_GUIDE in the environment is the path of the guide; without it these tests are skipped.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from guide_models import subject

from twinserve.engine import block_manager, continuous_batching, scheduler, sequence
from twinserve.engine.model_runner import ModelRunner

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cycles.md"
NO_DEFAULT = inspect.Parameter.empty
_ROW = re.compile(r"^\| (?P<cycle>\d) \| `(?P<name>[\w.]+)` \|.* \| \[`(?P<ours>[^`]+)`\]\((?P<link>[^)]+)\) \|$")


@dataclass(frozen=True)
class Block:
    """A Python code block of the guide, and what stands above it."""

    cycle: int
    heading: str
    code: str


@dataclass(frozen=True)
class Named:
    """Something that the guide names.

    Attributes:
        name: "function", "Class" or "Class.method".
        node: its definition; None for a method that a class's docstring lists and its body leaves out.
    """

    cycle: int
    name: str
    node: ast.FunctionDef | ast.ClassDef | None


@dataclass(frozen=True)
class Row:
    """A line of the table: `ours` is a dotted path, or "file.py::function"."""

    cycle: int
    name: str
    ours: str
    link: str


@pytest.fixture(scope="module")
def blocks() -> list[Block]:
    path = os.environ.get("TWINSERVE_GUIDE")
    if not path:
        pytest.skip("TWINSERVE_GUIDE, the path of the learning guide, is not set")
    return code_blocks(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def guide(blocks) -> dict[str, Named]:
    named = [item for block in blocks for item in names_in(block)]
    assert len({item.name for item in named}) == len(named) > 60
    return {item.name: item for item in named}


@pytest.fixture(scope="module")
def table() -> dict[str, Row]:
    rows = [
        Row(int(found["cycle"]), found["name"], found["ours"], found["link"])
        for found in map(_ROW.match, PAGE.read_text(encoding="utf-8").splitlines())
        if found
    ]
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def code_blocks(text: str) -> list[Block]:
    """The Python code blocks of the guide."""
    blocks, cycle, heading, code = [], 0, "", None
    for line in text.splitlines():
        if code is not None and line.startswith("```"):
            blocks.append(Block(cycle, heading, "\n".join(code)))
            code = None
        elif code is not None:
            code.append(line)
        elif line.startswith("```python"):
            code = []
        elif line.startswith("#"):
            heading = line.lstrip("# ")
            found = re.match(r"## Cycle (\d)", line)
            cycle = int(found[1]) if found else cycle
    return blocks


def names_in(block: Block) -> list[Named]:
    """The classes, methods and functions of a block; a lone method is of the class in the heading above it."""
    found = []
    for node in ast.parse(block.code).body:
        if isinstance(node, ast.ClassDef):
            found += names_of_class(block.cycle, node)
        elif isinstance(node, ast.FunctionDef):
            owner = f"{block.heading.split()[0]}." if [arg.arg for arg in node.args.args[:1]] == ["self"] else ""
            found.append(Named(block.cycle, owner + node.name, node))
    return found


def names_of_class(cycle: int, node: ast.ClassDef) -> list[Named]:
    """A class and its methods: those that are written out, and those that its docstring lists as "- name(...)"."""
    methods: dict[str, ast.FunctionDef | None] = {
        name: None for name in re.findall(r"^\s*- (\w+)\(", ast.get_docstring(node) or "", re.MULTILINE)
    }
    methods |= {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    methods.pop("__init__", None)
    return [
        Named(cycle, node.name, node),
        *(Named(cycle, f"{node.name}.{name}", item) for name, item in methods.items()),
    ]


def resolve(dotted: str) -> tuple[Any, Any]:
    """What a dotted path names, as its owner holds it (a property, a static method), and its owner."""
    parts = dotted.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        owner = reduce(getattr, parts[end:-1], module)
        return inspect.getattr_static(owner, parts[-1]), owner
    raise ModuleNotFoundError(dotted)


def functions_of(path: Path) -> list[ast.FunctionDef]:
    """The functions at the top level of a file."""
    return [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]


def parameters(node: ast.FunctionDef) -> list[tuple[str, Any]]:
    """The positional parameters of a definition, each with its default or NO_DEFAULT."""
    names = [arg.arg for arg in node.args.args]
    defaults = [ast.literal_eval(default) for default in node.args.defaults]
    return list(zip(names, [NO_DEFAULT] * (len(names) - len(defaults)) + defaults, strict=True))


def check_signature(node: ast.FunctionDef, ours: Any) -> None:
    """Our function can be called as the guide's: its parameters come first, and what is beside them may be left out."""
    expected = parameters(node)
    actual = list(inspect.signature(ours).parameters.values())
    assert [parameter.name for parameter in actual[: len(expected)]] == [name for name, _ in expected]
    for parameter, (name, default) in zip(actual, expected, strict=False):
        assert default in (NO_DEFAULT, parameter.default), f"{name} is {parameter.default}, not {default}, by default"
    for parameter in actual[len(expected) :]:
        assert parameter.default is not NO_DEFAULT, f"{parameter.name} must have a default"


def check_class(node: ast.ClassDef, ours: type) -> None:
    """Our class is made as the guide's, and has its class variables, fields, members and attributes."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            check_signature(item, ours.__init__)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            assert getattr(ours, item.target.id) == ast.literal_eval(item.value), item.target.id
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            assert hasattr(ours, item.targets[0].id), item.targets[0].id
    source = inspect.getsource(ours)
    told = re.search(r"Attributes:\n(.*?)(\n\s*\n|\Z)", ast.get_docstring(node) or "", re.DOTALL)
    attributes = set(re.findall(r"^\s*(\w+):", told[1], re.MULTILINE)) if told else set()
    attributes |= set(re.findall(r"self\.(\w+)(?:: [^=]+)? = ", ast.unparse(node)))
    for attribute in attributes:
        is_property = inspect.isdatadescriptor(getattr(ours, attribute, None))
        assert is_property or re.search(rf"self\.{attribute}\b[^=\n]*=", source), f"{node.name} has no {attribute}"


def check(named: Named, row: Row) -> None:
    """What a line of the table points to exists, and is what the guide says."""
    if "::" in row.ours:
        path, name = row.ours.split("::")
        (function,) = [function for function in functions_of(ROOT / path) if function.name == name]
        args = function.args
        optional = len(args.args) == len(args.defaults) and None not in args.kw_defaults
        assert optional or name.startswith("test_"), f"{name} is called without arguments in the guide"
        return
    ours, _ = resolve(row.ours)
    if isinstance(named.node, ast.ClassDef):
        check_class(named.node, ours)
        return
    decorators = [ast.unparse(item) for item in named.node.decorator_list] if named.node else []
    assert inspect.isdatadescriptor(ours) == ("property" in decorators)
    assert isinstance(ours, staticmethod) == ("staticmethod" in decorators)
    if named.node is not None and not inspect.isdatadescriptor(ours):
        check_signature(named.node, ours)


def test_the_table_names_what_the_guide_names(guide, table):
    assert sorted(table) == sorted(guide)
    assert {name: row.cycle for name, row in table.items()} == {name: named.cycle for name, named in guide.items()}


def test_what_the_table_points_to_is_what_the_guide_says(guide, table):
    wrong = {}
    for name in guide.keys() & table.keys():
        try:
            check(guide[name], table[name])
        except (AssertionError, AttributeError, ImportError, OSError, ValueError) as error:
            wrong[name] = f"{table[name].ours}: {type(error).__name__}: {error}"
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in sorted(wrong.items()))


def test_each_link_leads_to_the_file_of_what_it_names(table):
    for row in table.values():
        path = (PAGE.parent / row.link).resolve()
        assert path.is_file(), f"{row.name}: {row.link}"
        if "::" in row.ours:
            assert path == ROOT / row.ours.split("::")[0]
        else:
            ours, owner = resolve(row.ours)
            home = owner if inspect.isclass(owner) else inspect.unwrap(ours)
            assert path == Path(inspect.getsourcefile(home) or "").resolve(), f"{row.name} is not in {row.link}"


def test_each_test_of_the_guide_is_there_once(guide):
    count = Counter(function.name for path in (ROOT / "tests").rglob("test_*.py") for function in functions_of(path))
    tests = [name for name in guide if name.startswith("test_")]
    assert len(tests) == 13
    assert {name: count[name] for name in tests} == dict.fromkeys(tests, 1)


def run_as_written(blocks: list[Block], name: str) -> dict[str, Any]:
    """The names of the guide's block that defines `name`, its imports standing for ours."""
    (code,) = [block.code for block in blocks if f"def {name}(" in block.code]
    names: dict[str, Any] = {}
    for module in (block_manager, scheduler, sequence):
        names |= {each: getattr(module, each) for each in module.__all__}
    exec(compile(code, f"the guide's {name}", "exec"), names)
    return names


@pytest.mark.parametrize("name", ["test_sequence_basic", "test_block_manager_allocate"])
def test_the_tests_that_the_guide_gives_pass_as_written(blocks, name):
    run_as_written(blocks, name)[name]()


def test_the_guides_main_loop_runs_as_written(blocks):
    of = subject("tiny")
    texts = []
    for loop in (
        run_as_written(blocks, "run_continuous_batching")["run_continuous_batching"],
        continuous_batching.run_continuous_batching,
    ):
        runner = ModelRunner(of.model, of.tokenizer, "cpu", num_blocks=64, block_size=16, seed=3)
        policies = scheduler.Scheduler(block_manager.BlockManager(64, 16))
        texts.append(list(loop(policies, runner, of.prompts, of.tokenizer).values()))
        runner.close()
    assert texts[0] == texts[1] and len(texts[0]) == len(of.prompts)
