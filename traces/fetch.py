"""Fetch: known public traces, downloaded once into the user's cache and checked."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from twinserve.settings.errors import InputError
from twinserve.settings.files import write_whole
from twinserve.traces.user_cache import cache_folder

_TIMEOUT_S = 30


@dataclass(frozen=True)
class PublicTrace:
    """A trace that its makers publish.

    Attributes:
        folder: URL of the folder that it lies in, at a fixed commit.
        file: its name there.
        sha256: of its content.
        credit: licence and attribution.
    """

    folder: str
    file: str
    sha256: str
    credit: str


PUBLIC_TRACES = {
    "mooncake-conversation": PublicTrace(
        "https://raw.githubusercontent.com/kvcache-ai/Mooncake/3b5a594133958449a1feaf1c9e0fc1b553e34a28/FAST25-release/traces",
        "conversation_trace.jsonl",
        "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
        "the Mooncake authors, Apache-2.0; Qin et al., FAST '25",
    ),
    "azure-2023-conv": PublicTrace(
        "https://raw.githubusercontent.com/Azure/AzurePublicDataset/b469a113cedca53ddc3bdea71a143dc4b7d8700c/data",
        "AzureLLMInferenceTrace_conv.csv",
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        "Microsoft, CC-BY 4.0; Patel et al., Splitwise, ISCA 2024",
    ),
}


def fetch(name: str, mirror: str | None = None) -> Path:
    """The file of a public trace; downloaded unless it lies in the cache with the right content.

    Args:
        name: one of PUBLIC_TRACES.
        mirror: URL of a folder that has the file under its own name, in place of where it was published.

    Returns:
        Its path in `twinserve/traces` in $XDG_CACHE_HOME or ~/.cache. It appears there whole and checked or not at all.

    Raises:
        InputError: the name is unknown, the file cannot be had or has another content, or it cannot be written.
    """
    if name not in PUBLIC_TRACES:
        raise InputError(f"expected one of {', '.join(PUBLIC_TRACES)}", field="name", value=name)
    trace = PUBLIC_TRACES[name]
    if mirror is not None and not mirror.startswith(("http://", "https://")):
        raise InputError("expected a URL that begins with http:// or https://", field="mirror", value=mirror)
    path = cache_folder("traces") / trace.file
    try:
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == trace.sha256:
            return path
        content = _download(f"{(mirror or trace.folder).rstrip('/')}/{trace.file}", trace.sha256)
        write_whole(path, content, replaces=True)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}; XDG_CACHE_HOME names another", path=path) from error
    return path


def _download(url: str, sha256: str) -> bytes:
    """What lies at a URL, if it has this sha256."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        raise InputError(f"the server answers {error.code} {error.reason}", field="url", value=url) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"cannot be reached, is there a network? ({reason})", path=url) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(f"expected sha256 {sha256}, the {len(content)} bytes have {found}", path=url)
    return content
