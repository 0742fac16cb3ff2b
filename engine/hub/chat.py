"""Text as the model was trained to be spoken to."""

from __future__ import annotations

from typing import Any

from twinserve.engine.chat_template import template_tokens
from twinserve.engine.prompts import well_formed
from twinserve.settings.errors import InputError


def chat_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids that ask a model to answer `text`, said by a user.

    Args:
        tokenizer: of transformers; without a chat template, `text` is encoded as it is, to be continued.

    Raises:
        InputError: the model has no tokenizer, or its chat template cannot be used.
    """
    if tokenizer is None:
        raise InputError("expected token ids, as the model has no tokenizer", field="prompt", value=text)
    text = well_formed(text)
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    try:
        return template_tokens(tokenizer, messages, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        where = getattr(tokenizer, "name_or_path", None) or None
        reason = " ".join(str(error).split())
        raise InputError(
            f"expected a template that takes a message of a user: {reason}", path=where, field="chat_template"
        ) from error
