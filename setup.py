"""Compiles what decides, simulates and records with mypyc, where a C compiler is found; the rest is in pyproject.toml.

TWINSERVE_PURE=1 leaves them as they are. The source is the same either way, and so is what is decided.
"""

import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

COMPILED = (
    "policies/[!_]*.py",
    "orders/[!_]*.py",
    "sim/clients.py",
    "sim/clock.py",
    "sim/disaggregation.py",
    "sim/fleet.py",
    "sim/horizon.py",
    "sim/latency.py",
    "sim/leap.py",
    "sim/replica.py",
    "sim/roofline.py",
    "sim/tiers.py",
    "traces/arrivals.py",
    "traces/request.py",
    "traces/runs/digest.py",
    "traces/runs/metrics.py",
    "traces/runs/record.py",
    "traces/runs/spans.py",
)


def extensions() -> list:
    """The modules that are compiled; none where that is not wanted or not possible, with the reason in words."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if os.environ.get("TWINSERVE_PURE") == "1":
        print("twinserve: pure Python, as TWINSERVE_PURE is 1")
        return []
    if shutil.which(compiler) is None:
        print(f"twinserve: pure Python, as there is no C compiler {compiler!r}")
        return []
    try:
        from mypyc.build import mypycify
    except ImportError:
        print("twinserve: pure Python, as mypyc is not installed")
        return []
    paths = [str(path) for pattern in COMPILED for path in sorted(Path("twinserve").glob(pattern))]
    print(f"twinserve: {len(paths)} modules compiled by mypyc")
    lenient = ["--ignore-missing-imports", "--no-warn-unused-ignores"]
    modules = mypycify([*lenient, *paths], group_name="twinserve._compiled")
    for module in modules:
        module.optional = True  # a compiler that fails leaves them pure
    return modules


class AllOrNone(build_ext):
    """Builds extensions of which each needs the one that they share: where one fails, none is kept."""

    def build_extensions(self) -> None:
        super().build_extensions()
        built = [Path(self.get_ext_fullpath(module.name)) for module in self.extensions]
        if not all(path.exists() for path in built):
            print("twinserve: pure Python, as the C compiler failed")
            for path in built:
                path.unlink(missing_ok=True)


setup(ext_modules=extensions(), cmdclass={"build_ext": AllOrNone})
