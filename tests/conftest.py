"""What holds for all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from garbage import leave_imports_alone
from hypothesis import Phase, settings

# HYPOTHESIS_PROFILE=deep, or --hypothesis-profile deep, searches far and differently each time; `mutants` tells only
# whether something is found.
settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None)
settings.register_profile("deep", max_examples=10_000, deadline=None)
settings.register_profile("mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: threads of each would wait for those of the others
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Looking for garbage among what is imported takes seconds: there is none before tests run.
gc.disable()

# Whether a file is on the disk when it gets its name is nothing that a test could see, and would be waited for.
os.fsync = lambda descriptor: None

# Processes of pytest-xdist have one of their own, and what is printed would be as wide.
os.environ.pop("COLUMNS", None)


LONGEST = (
    *("policies/test_machines", "policies/test_drafting_machines", "engine/test_tensor_parallel"),
    *("engine/test_speculation", "serving/test_processes", "engine/test_verify", "test_benchmarks"),
    *("engine/test_equality", "sim/test_leaps", "fuzz/test_malformed", "reports/test_browser"),
    *("commands/test_demo", "serving/test_fuzz", "engine/test_smollm2", "serving/test_clients", "test_readme"),
    *("commands/test_engine_options", "serving/test_engine_server", "planning/test_sweep", "test_http_benchmarks"),
    *("commands/test_faults", "equivalence/test_vllm_records", "commands/test_texts", "planning/test_answers"),
)
"""Files of tests that take long: they begin first, so that workers, of which each has a file, end together."""
_PLACES = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(LONGEST)}
assert all(path.is_file() for path in _PLACES), "one of LONGEST has another name now"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of LONGEST come first; those marked gpu are skipped where torch finds no CUDA device."""
    items.sort(key=lambda item: _PLACES.get(item.path, len(_PLACES)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported by now is not looked through for garbage again and again."""
    leave_imports_alone()
    gc.enable()


@pytest.fixture
def public_traces() -> Path:
    """The folder of the public traces, which do not ship with the project."""
    folder = os.environ.get("TWINSERVE_TRACES")
    if folder is None:
        pytest.skip("TWINSERVE_TRACES is unset: it names the folder of the public traces")
    return Path(folder)
