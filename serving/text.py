"""The text of an answer as its tokens come: whole characters, up to a stop string, equal to what decoding all gives."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

_CONTEXT = 6
"""Tokens of the prompt that are decoded with the answer, so that its first piece has the space that belongs to it."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""

    def decode(self, token_ids: Seq[int], skip_special_tokens: bool = True) -> str:
        """The text of some tokens."""


class Detokenizer:
    """Decodes the tokens that follow a prompt, piece by piece.

    Together the pieces are what decoding prompt and answer gives beyond the prompt. A piece is held back while it may
    end within a character. Two windows are decoded: from an earlier border to what was given out, and to all that is
    known; their difference is new. So a decode costs no more the longer the answer is (as in vLLM's and TGI's
    incremental detokenisation).
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Seq[int], *, skip_special_tokens: bool = True):
        self._tokenizer, self._skips_special = tokenizer, skip_special_tokens
        self._token_ids = list(prompt[-_CONTEXT:])
        self._begin, self._given = 0, len(self._token_ids)

    def push(self, token_ids: Seq[int]) -> str:
        """The text that has become sure with these tokens."""
        self._token_ids += token_ids
        text, whole = self._windows()
        if len(whole) <= len(text) or whole.endswith("\ufffd"):
            return ""
        self._begin, self._given = self._given, len(self._token_ids)
        return whole[len(text) :]

    def end(self) -> str:
        """What was held back and is no whole character."""
        text, whole = self._windows()
        return whole[len(text) :]

    def _windows(self) -> tuple[str, str]:
        """What was given out, and all that is known, from the same border on."""
        return self._decode(self._token_ids[self._begin : self._given]), self._decode(self._token_ids[self._begin :])

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skips_special)


class AnswerText:
    """The text of an answer, which ends before a stop string.

    Args:
        stops: texts that end it, wherever tokens begin and end; the first one to be complete does.
        min_tokens: stop strings count from so many tokens on.
        include_stop: keep the stop string.

    Attributes:
        num_tokens: tokens taken; with a stop string, those up to its end.
        stop: the stop string that has ended it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Seq[int],
        *,
        stops: Seq[str] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ):
        self.num_tokens = 0
        self.stop: str | None = None
        self._detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
        self._stops, self._min_tokens, self._include = stops, min_tokens, include_stop
        self._longest = max(map(len, stops), default=1)
        self._tail = ""
        """What was not given out, as it may be the beginning of a stop string."""

    def push(self, token_ids: Seq[int]) -> str:
        """The text that has become sure; nothing more once it has stopped."""
        if not self._stops:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids)
        given = ""
        for token_id in token_ids:
            if self.stop is not None:
                break
            self.num_tokens += 1
            given += self._grow(self._detokenizer.push([token_id]))
        return given

    def end(self) -> str:
        """What is left once the last token was taken."""
        if self.stop is not None:
            return ""
        given = self._grow(self._detokenizer.end()) if self._stops else self._detokenizer.end()
        rest, self._tail = self._tail, ""
        return given + rest

    def _grow(self, text: str) -> str:
        """Take more text; what of it and the tail can be given out."""
        self._tail += text
        if text and self.num_tokens > self._min_tokens:
            found = [(self._tail.find(stop), stop) for stop in self._stops if stop in self._tail]
            if found:
                at, self.stop = min(found)
                given, self._tail = self._tail[: at + len(self.stop) * self._include], ""
                return given
        sure = max(0, len(self._tail) - self._longest + 1)
        given, self._tail = self._tail[:sure], self._tail[sure:]
        return given
