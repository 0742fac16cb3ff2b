"""The architecture as the imports show it: who may import whom, and who may call what."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("policies", "traces", "sim", "engine", "reports")
MAY_IMPORT = {
    "policies": set(),
    "traces": {"policies"},
    "sim": {"policies", "traces"},
    "engine": {"policies", "traces"},
    "reports": {"policies", "traces"},
}


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder}/ holds no module"
    return found


def imported_names(path: Path) -> set[str]:
    """Every dotted name that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    allowed = MAY_IMPORT[folder] | {folder}
    for path in modules(folder):
        ours = {name.split(".")[1] for name in imported_names(path) if name.startswith("twinserve.")}
        assert ours <= allowed, f"{path} imports {sorted(ours - allowed)}"


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


def test_policies_need_the_standard_library_and_xxhash_alone():
    for path in modules("policies"):
        roots = {name.split(".")[0] for name in imported_names(path)} - {"twinserve", ""}
        foreign = roots - sys.stdlib_module_names - {"xxhash", "mypy_extensions"}
        assert not foreign, f"{path} imports {sorted(foreign)}"
        assert not roots & {"time", "datetime", "random"}, f"{path} reads a clock or draws random numbers"


def test_core_alone_calls_schedule_and_postprocess():
    for folder in ("traces", "sim", "engine", "reports", "twinserve"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in ("schedule", "postprocess"):
                    owner = ast.unparse(node.value)
                    assert owner in ("env", "self._env"), f"{path}:{node.lineno} calls {owner}.{node.attr}"


def in_fresh_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("package", ["policies", "traces", "sim", "reports"])
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
        "import twinserve.cli, twinserve.sim.replica, twinserve.sim.fit, twinserve.traces.record\n"
        "heavy = {'scipy', 'plotly', 'pandas', 'torch', 'transformers', 'ray', 'joblib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert in_fresh_python(code) == "[]\n"
