"""What `pip install .` brings: one name, its data, and no torch."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: what would be packed is not known")
    for name in listed.stdout.decode().split("\0")[:-1]:
        source, target = ROOT / name, tree / name
        if source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source.readlink())
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, tree]
    # Nothing is compiled: `make test-compiled` builds it so.
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"TWINSERVE_PURE": "1"})
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_site_packages_gets_one_name(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"twinserve"}


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "policies/core.py",
        "settings/build_core.py",
        "traces/runs/record.schema.json",
        "sim/data/smollm2-135m-cpu-2-threads.json",
        "reports/page.css",
        "reports/page.js",
        "data/demo.jsonl",
        "data/demo.toml",
        "engine/data/verify.txt",
    ],
)
def test_code_and_data_are_inside(wheel, name):
    assert f"twinserve/{name}" in wheel.namelist()


def test_no_torch_is_required(wheel):
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    required = Parser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist") or []
    plain = {line.split(">")[0].strip() for line in required if "extra ==" not in line}
    assert "simpy" in plain and "xxhash" in plain
    assert not plain & {"torch", "transformers", "safetensors", "triton", "flash-attn"}
