"""Kernels: how an engine cuts and pads a step, as far as it decides what the step costs."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Kernels:
    """The sizes to which captured steps are padded, and how attention is cut; by default nothing is padded or cut.

    An engine says them in its facts, a latency file keeps them.

    Attributes:
        decodes: rows of captured steps of decodes alone, rising.
        tokens: tokens of captured steps with prompts, decodes included, rising.
        decodes_beside: decodes of captured steps with prompts, rising.
        prompt_tokens: prompt tokens of captured steps with prompts, rising, of an engine that has them behind its
            padded decodes, which it computes as well; it has no `tokens`.
        prompts: prompts that a captured step has room for.
        decode_cuts: (rows, spans, shortest, block), by rising rows: from so many padded rows on, decode attention cuts
            each context in up to `spans` spans, whole blocks of tokens and at least `shortest` long.
        prompt_tile: tokens of a prompt that attend together; each tile reads the whole context before it.
        single: where steps have drafts, tokens of a row that attend as so many decodes: of the longest with drafts.
        waits: the host waits for a step before it goes on, as for one whose drafts it has to know.
    """

    decodes: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    decodes_beside: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    prompts: int = 0
    decode_cuts: tuple[tuple[int, int, int, int], ...] = ()
    prompt_tile: int = 64
    single: int = 0
    waits: bool = False

    @classmethod
    def load(cls, data: dict[str, Any]) -> Kernels:
        """From plain values, as `as_dict` gives them.

        Raises:
            TypeError: a name is not known.
        """
        values = dict(data)
        cuts = tuple(tuple(cut) for cut in values.pop("decode_cuts", ()))
        tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(decode_cuts=cuts, **tuples)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, Any]:
        """The sizes by name, as plain values; what hangs on drafts alone is there where it is something."""
        values = asdict(self)
        return {name: value for name, value in values.items() if value or name not in ("single", "waits")}

    def at(self, max_num_seqs: int, max_num_batched_tokens: int | None, most_drafts: int = 0) -> Kernels:
        """The sizes that the same engine captures under these limits, rows having so many drafts at most.

        Those between its own limits and larger ones are not known: steps there are not padded.
        """
        budget = max_num_batched_tokens or 1 << 62
        single = 1 + most_drafts if self.single else 0
        most_decodes = min(max_num_seqs * single, budget) if single else max_num_seqs
        return replace(
            self,
            single=single,
            decodes=_up_to(self.decodes, most_decodes),
            decodes_beside=_up_to(self.decodes_beside, most_decodes),
            tokens=self.tokens[: bisect_left(self.tokens, budget) + 1],
            prompt_tokens=self.prompt_tokens[: bisect_left(self.prompt_tokens, budget) + 1],
        )

    def padded(self, decodes: int, prompt_tokens: int, num_prompts: int, sampled: int) -> tuple[int, int, int]:
        """(decodes, tokens, rows that are sampled) that a step computes, padding included.

        A step beyond the captured sizes is not padded, but never counted as less than the largest one that is: it does
        not cost less, and what it costs shall not fall where work is added.
        """
        if not prompt_tokens:
            size = _at_least(self.decodes, decodes)
            return size, size, size if self.decodes else sampled
        if not (self.tokens or self.prompt_tokens):
            return decodes, decodes + prompt_tokens, sampled
        beside = _at_least(self.decodes_beside, decodes)
        if self.tokens:
            tokens = _at_least(self.tokens, max(beside, decodes + prompt_tokens))
        elif prompt_tokens <= self.prompt_tokens[-1]:
            tokens = beside + _at_least(self.prompt_tokens, prompt_tokens)
        else:
            tokens = max(beside + self.prompt_tokens[-1], decodes + prompt_tokens)
        return beside, tokens, beside + max(self.prompts, num_prompts)

    def _cut(self, padded: int) -> tuple[int, int, int]:
        """Spans, the shortest of them, and the block of so many padded rows; one span, read by the token, if uncut."""
        place = bisect_right(self.decode_cuts, padded, key=lambda cut: cut[0])
        return self.decode_cuts[place - 1][1:] if place else (1, 0, 1)

    def blocks(self, decodes: int, longest: Any) -> Any:
        """Blocks of the longest span of decode attention, which are read one after another.

        Where nothing is cut, a context is one span, and a token a block.

        Args:
            decodes: rows, padding included.
            longest: the longest context, or an array of several.
        """
        spans, shortest, block = self._cut(decodes)
        span = _parts(_parts(longest, spans), block)
        return most(span, _least(_parts(shortest, block), _parts(longest, block)))

    def cut_tokens(self, decodes: int, padded: int, kv_tokens: Any) -> Any:
        """How much of their contexts decodes read in spans that had to be started, in tokens.

        Longer contexts have more spans, until there are as many as a context is cut in; from then on the spans
        themselves are longer.

        Args:
            decodes: rows.
            padded: rows, padding included.
            kv_tokens: the sum of their contexts, or an array of several.
        """
        spans, shortest, _ = self._cut(padded)
        return _least(kv_tokens, decodes * spans * shortest) if spans > 1 else 0 * kv_tokens

    def tiles(self, prompts: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """Tiles of prompts given as (start, length), and the sum of the contexts up to the end of each."""
        size = self.prompt_tile
        tiles = contexts = 0
        for start, length in prompts:
            count = _parts(length, size)
            tiles += count
            contexts += count * start + size * (count * (count - 1) // 2) + length
        return tiles, contexts


def _up_to(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The sizes below a limit, and the limit itself, as far as sizes go."""
    return (*(size for size in sizes if size < most), most) if sizes and most <= sizes[-1] else sizes


def _parts(size: Any, part: int) -> Any:
    """How many parts of a size it takes, the last one less than full."""
    return -(-size // part)


def _at_least(sizes: tuple[int, ...], size: int) -> int:
    """The smallest of the sizes that has room, or the size itself if there is none."""
    place = bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else size


def most(one: Any, other: Any) -> Any:
    """max, of two numbers or of each pair in two arrays."""
    return max(one, other) if isinstance(one, int) else np.maximum(one, other)


def _least(one: Any, other: Any) -> Any:
    """min, of two numbers, of a number and each of an array, or of each pair in two arrays."""
    return min(one, other) if isinstance(one, int) and isinstance(other, int) else np.minimum(one, other)
