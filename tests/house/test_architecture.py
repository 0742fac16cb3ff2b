"""The architecture as the imports show it: who may import whom, and who may call what."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (
    ("policies",),
    ("orders",),
    ("settings",),
    ("traces",),
    ("traces/runs",),
    ("sim", "engine", "reports"),
    ("twinserve/worlds",),
    ("twinserve/planning", "twinserve/vllm", "serving"),
    ("twinserve/commands",),
    ("twinserve",),
)
"""The rooms, each a folder without the rooms inside it; one may import what lies on the floors below its own."""
ROOMS = [room for floor in FLOORS for room in floor]
FOLDERS = tuple(room for room in ROOMS if "/" not in room and room != "twinserve")


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder}/ holds no module"
    return found


def room_of(path: str) -> str:
    """The innermost room that holds a path, which is relative to the root."""
    return max((room for room in ROOMS if path == room or path.startswith(f"{room}/")), key=len)


def own_modules() -> list[str]:
    """The paths of all modules; none is reached by two of them."""
    found = [str(path.relative_to(ROOT)) for folder in (*FOLDERS, "twinserve") for path in modules(folder)]
    return [path for path in found if not path.startswith(tuple(f"twinserve/{folder}/" for folder in FOLDERS))]


@cache
def nodes(path: Path) -> list[ast.AST]:
    """What a module is made of."""
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imported_names(path: Path) -> set[str]:
    """Every dotted name that a module imports, wherever in it."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def rooms_imported(path: Path) -> set[str]:
    """The rooms of what a module imports; `import twinserve` itself, which is empty, counts as none."""
    names = [name.split(".")[1:] for name in imported_names(path) if name.startswith("twinserve.")]
    return {room_of("/".join(parts if parts[0] in FOLDERS else ["twinserve", *parts])) for parts in names}


def import_picture() -> str:
    """A line a room, from the lowest: the room, and the rooms that it imports."""
    seen: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in own_modules():
        seen[room_of(path)] |= rooms_imported(ROOT / path) - {room_of(path)}
    return "\n".join(f"{room + '/':<21}{', '.join(r for r in ROOMS if r in seen[room])}".rstrip() for room in ROOMS)


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_point_one_way(floor):
    below = {room for rooms in FLOORS[:floor] for room in rooms}
    for room in FLOORS[floor]:
        paths = [path for path in own_modules() if room_of(path) == room]
        assert paths, f"{room}/ holds no module"
        for path in paths:
            upwards = rooms_imported(ROOT / path) - below - {room}
            assert not upwards, f"{path} imports {sorted(upwards)}"


def test_the_page_shows_who_imports_whom():
    picture = "".join(f"    {line}\n" for line in import_picture().splitlines())
    assert picture in (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), f"docs/design.md, expected:\n{picture}"


def test_core_is_built_in_one_module_and_in_the_guides_own_loop():
    built = set()
    for path in own_modules():
        for node in nodes(ROOT / path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Core":
                built.add(path)
    assert built == {"settings/build_core.py", "engine/continuous_batching.py"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_imports_itself_by_way_of_others(folder):
    """Whatever is imported late, or for types alone, counts too; and so does a package that a name leads through."""
    paths = {".".join(("twinserve", *path.relative_to(ROOT).with_suffix("").parts)): path for path in modules(folder)}
    known = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    needs = {}
    for module, path in known.items():
        parts = [name.split(".") for name in imported_names(path)]
        through = {".".join(part[:depth]) for part in parts for depth in range(3, len(part) + 1)}
        needs[module] = {name for name in through & known.keys() if not f"{module}.".startswith(f"{name}.")}
    tuple(TopologicalSorter(needs).static_order())


def test_nothing_is_imported_under_a_bare_folder_name():
    for folder in (*FOLDERS, "twinserve", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            bare = {name.split(".")[0] for name in imported_names(path)} & set(FOLDERS)
            assert not bare, f"{path} imports {sorted(bare)}, expected twinserve.{sorted(bare)[0]}"


def test_policies_and_orders_need_the_standard_library_and_xxhash_alone():
    for path in modules("policies") + modules("orders"):
        roots = {name.split(".")[0] for name in imported_names(path)} - {"twinserve", ""}
        foreign = roots - sys.stdlib_module_names - {"xxhash", "mypy_extensions"}
        assert not foreign, f"{path} imports {sorted(foreign)}"
        assert not roots & {"time", "datetime", "random"}, f"{path} reads a clock or draws random numbers"


def test_core_alone_calls_schedule_and_postprocess():
    for folder in (*FOLDERS[1:], "twinserve"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            for node in nodes(path):
                if isinstance(node, ast.Attribute) and node.attr in ("schedule", "postprocess"):
                    owner = ast.unparse(node.value)
                    is_vllms = room_of(str(path.relative_to(ROOT))) == "twinserve/vllm" and owner == "super()"
                    assert is_vllms or owner in ("env", "self._env"), f"{path}:{node.lineno} calls {owner}.{node.attr}"


def in_fresh_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("package", ["policies", "orders", "settings", "traces", "sim", "reports", "serving"])
def test_packages_other_than_the_engine_import_without_torch(package):
    code = (
        "import sys, pkgutil, importlib\n"
        "sys.modules['torch'] = None\n"
        f"import twinserve.{package} as package\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "print('imported')"
    )
    assert in_fresh_python(code) == "imported\n"


def test_nothing_heavy_is_imported_before_it_is_used():
    code = (
        "import sys\n"
        "import twinserve.commands.app, twinserve.sim.replica, twinserve.sim.fit, twinserve.traces.runs.record\n"
        "heavy = {'scipy', 'plotly', 'pandas', 'torch', 'transformers', 'ray', 'joblib', 'fastapi', 'uvicorn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert in_fresh_python(code) == "[]\n"
