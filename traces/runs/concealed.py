"""Tokens of which only that is kept which decides: which prefixes are equal, and what ended an answer."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Seq
from struct import Struct

import xxhash

_PACKED = Struct("<QQI").pack
_BEYOND = 1 << 31


class ConcealedTokens:
    """Puts a number in place of each token, by a secret key, the tokens before it, and the token itself.

    Sequences have equal numbers as far as they have equal tokens, but for a collision of 64-bit hashes; one token has
    another number in another place. So a replay finds the hits that the run found, and no text. All numbers are beyond
    any vocabulary.

    Args:
        key: 64 bits; None draws them, and keeps them nowhere.
    """

    def __init__(self, key: int | None = None):
        self._key = secrets.randbits(64) if key is None else key

    def __call__(self, token_ids: Seq[int], *, ends_by_token: bool) -> list[int]:
        """The numbers of a prompt and its answer; with `ends_by_token`, the last token, which ended it, stays."""
        hashed, numbers = self._key, []
        for token_id in token_ids:
            hashed = xxhash.xxh3_64_intdigest(_PACKED(self._key, hashed, token_id))
            numbers.append(_BEYOND | hashed & (_BEYOND - 1))
        if ends_by_token:
            numbers[-1] = token_ids[-1]
        return numbers


def as_they_are(token_ids: Seq[int], *, ends_by_token: bool) -> list[int]:
    """The tokens themselves, in place of `ConcealedTokens`."""
    return list(token_ids)
