"""Prompts of live traffic as parts, as a trace has them: what they share is seen, what they say is not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

from twinserve.policies import PrefixCache
from twinserve.traces.request import Part, answer_text, merged


class PartMaker:
    """Says token ids as parts, so that prompts share as many whole blocks as parts as they do as tokens.

    An answer that comes back in a later prompt, as in a conversation, is known again as that answer. A prompt's tokens
    that are not known are a text of the request's own.

    Args:
        block_size: tokens in a block.
        most_blocks: so many are remembered; the one that came first is forgotten first.
    """

    def __init__(self, block_size: int, most_blocks: int = 1 << 20):
        self._block_size, self._most_blocks = block_size, most_blocks
        self._known: OrderedDict[int, tuple[Part, ...]] = OrderedDict()

    def parts(self, request_id: int, token_ids: Seq[int]) -> tuple[Part, ...]:
        """The parts of a prompt, whose own text has the number `request_id`."""
        known = self._learn(token_ids, [Part(request_id, 0, len(token_ids))])
        return tuple(merged([*known, *_cut([Part(request_id, 0, len(token_ids))], self._rest(token_ids))]))

    def answered(self, request_id: int, prompt: Seq[int], parts: Seq[Part], answer: Seq[int]) -> None:
        """Remember the blocks of a prompt, whose parts are these, and its answer."""
        self._learn([*prompt, *answer], [*parts, Part(answer_text(request_id), 0, len(answer))])

    def _rest(self, token_ids: Seq[int]) -> range:
        """The tokens behind the last whole block."""
        return range(len(token_ids) - len(token_ids) % self._block_size, len(token_ids))

    def _learn(self, token_ids: Seq[int], own: Seq[Part]) -> list[Part]:
        """The parts of the whole blocks of some tokens; those of `own` for a block that was not known, and is now."""
        size = self._block_size
        found: list[Part] = []
        digest = -1
        for start in range(0, len(token_ids) - size + 1, size):
            digest = PrefixCache.compute_hash(list(token_ids[start : start + size]), digest)
            if digest not in self._known:
                self._known[digest] = tuple(_cut(own, range(start, start + size)))
            found += self._known[digest]
        while len(self._known) > self._most_blocks:
            self._known.popitem(last=False)
        return found


def _cut(parts: Seq[Part], tokens: range) -> list[Part]:
    """The pieces of `parts` that hold these of their tokens."""
    pieces, begin = [], 0
    for part in parts:
        first, end = max(tokens.start, begin), min(tokens.stop, begin + part.length)
        if first < end:
            pieces.append(Part(part.text, part.start + first - begin, end - first))
        begin += part.length
    return pieces
