"""The program that a model brings to make a prompt of a chat."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

MAX_TEMPLATE_S = 10.0
"""Of a processor."""


def template_tokens(tokenizer: Any, messages: Seq[Mapping[str, Any]], **how: Any) -> list[int]:
    """The token ids that a tokenizer's chat template makes of messages.

    Args:
        tokenizer: of transformers, with a template.
        how: what apply_chat_template takes beside, variables of the template among it.

    Raises:
        Exception: whatever the template raises; TimeoutError where it has not ended after MAX_TEMPLATE_S, which
            the main thread alone can tell.
    """
    with _at_most(MAX_TEMPLATE_S):
        # A plain list is what it gives by default in transformers 4 alone.
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **how))


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"it has not ended after {seconds:g} s of a processor")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
