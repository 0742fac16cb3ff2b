"""Request: one line of a trace, and the only converter from it to a Sequence."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain, repeat
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from mypy_extensions import mypyc_attr
from xxhash import xxh64_intdigest

from twinserve.policies import SamplingParams, Sequence

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_PACKED = Struct("=3q").pack
"""Of what tells a part from others: the length of the part before it, its text and its start."""


def answer_text(request_id: int) -> int:
    """The number of the text that request `request_id` generates."""
    return -1 - request_id


class Part(NamedTuple):
    """`length` tokens of the text numbered `text`, from its token `start` on.

    Equal numbers mean equal texts within a trace. A negative number is the answer of a request (`answer_text`).
    """

    text: int
    start: int
    length: int


class Blocks(Seq[Part]):
    """A prompt of whole texts of `size` tokens each, the last one as far as `length` tokens go.

    It equals the tuple of its parts, and makes them when it is read: a long trace has some 100,000 of them, which take
    8 bytes each here, and more than 100 otherwise.
    """

    __slots__ = ("_length", "_size", "_texts")

    def __init__(self, texts: Iterable[int], size: int, length: int):
        self._texts, self._size, self._length = array("q", texts), size, length

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._length

    @property
    def ends(self) -> list[int]:
        """Tokens of the prompt up to the end of each part."""
        return [*range(self._size, self._size * len(self._texts), self._size), self._length]

    def plain(self) -> Iterator[tuple[int, int, int]]:
        """The parts as plain tuples."""
        num_whole = len(self._texts) - 1
        lengths = chain(repeat(self._size, num_whole), (self._length - self._size * num_whole,))
        return zip(self._texts, repeat(0), lengths, strict=False)

    def __iter__(self) -> Iterator[Part]:
        # As Part._make does, in two thirds of the time.
        return map(tuple.__new__, repeat(Part), self.plain())

    def __getitem__(self, place: Any) -> Any:
        return tuple(self)[place]

    def __eq__(self, other: object) -> bool:
        return tuple(self) == (tuple(other) if isinstance(other, Blocks) else other)

    def __hash__(self) -> int:
        return hash(tuple(self.plain()))  # as that of equal parts


class PrefixKeys:
    """Tells prefixes of prompts apart without tokens: `keys(n)` is equal exactly when the first n tokens are.

    Beyond the prompt, the tokens are the answer's. A key mixes a 64-bit hash of everything before the part that
    token n lies in with the offset in that part, so it costs nothing per token; nor does a prompt of which no key is
    ever asked for, as where nothing is cached.
    """

    __slots__ = ("_answer", "_bases", "_begin", "_end", "_ends", "_first_and_step", "_known", "_parts",
                 "_shifted", "_unread")  # fmt: skip

    def __init__(self, parts: Seq[Part], answer: int):
        self._unread: Seq[Part] | None = parts
        self._parts: Seq[tuple[int, int, int]] = ()
        self._answer = answer
        self._ends: list[int] = []
        self._bases: list[int] = []
        # Of the part that was asked about last: it lies behind token _begin, up to _end.
        self._begin = self._end = self._shifted = 0
        # Of the prefixes that were asked about all at once: where the first ends, the tokens between two, and the keys.
        self._first_and_step, self._known = (0, 0), list[int]()

    def _read(self) -> None:
        """Read the parts, if they have not been."""
        if self._unread is not None:
            parts, self._unread = self._unread, None
            if isinstance(parts, Blocks):
                self._parts, self._ends = plain(parts), parts.ends
            else:
                self._parts = merged(parts)
                self._ends = list(accumulate([length for _, _, length in self._parts]))

    def __call__(self, num_tokens: int) -> int:
        if not self._begin < num_tokens <= self._end:
            self._read()
            index = bisect_left(self._ends, num_tokens)
            self._find_bases(index)
            self._begin = self._ends[index - 1] if index else 0
            self._end = self._ends[index] if index < len(self._ends) else 1 << 62
            self._shifted = self._bases[index] - self._begin * _GOLDEN
        return (self._shifted + num_tokens * _GOLDEN) & _MASK

    def each(self, ends: range) -> list[int]:
        """The keys of the prefixes that end there, as single calls give them, but all at once: a list to be read alone.
        The longest one is kept, as who goes on with a request elsewhere asks for the same keys and those behind."""
        if (ends.start, ends.step) != self._first_and_step:
            if len(ends) <= len(self._known):
                return self._keys(ends)
            self._first_and_step, self._known = (ends.start, ends.step), self._keys(ends)
        known = self._known
        if len(known) < len(ends):
            self._known = known = known + self._keys(ends[len(known) :])
        return known if len(known) == len(ends) else known[: len(ends)]

    def _keys(self, ends: range) -> list[int]:
        self._read()
        self._find_bases(len(self._parts))
        golden = np.uint64(_GOLDEN)
        begins = np.array([0, *self._ends], np.uint64)
        lengths = np.arange(ends.start, ends.stop, ends.step, dtype=np.uint64)
        shifted = np.array(self._bases, np.uint64) - begins * golden
        return (shifted[begins[1:].searchsorted(lengths)] + lengths * golden).tolist()

    def _find_bases(self, last: int) -> None:
        """Know the hashes of what lies before each part, up to the `last`, and of the text that begins there."""
        bases, parts, known = self._bases, self._parts, len(self._bases)
        if known > last:
            return
        digest, packed = xxh64_intdigest, _PACKED
        base, length_before = (bases[-1], parts[known - 1][2]) if known else (0, 0)
        for text, start, length in [*parts, (self._answer, 0, 0)][known : last + 1]:
            base = digest(packed(length_before, text, start), base)
            bases.append(base)
            length_before = length


def plain(parts: Seq[Part]) -> list[tuple[int, int, int]]:
    """Parts as plain tuples."""
    return list(parts.plain() if isinstance(parts, Blocks) else map(tuple, parts))  # type: ignore[arg-type]


def merged(parts: Seq[Part]) -> list[Part]:
    """The same tokens in as few parts as can be."""
    if isinstance(parts, Blocks):
        return list(parts)
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if last is not None and last.text == part.text and last.start + last.length == part.start:
            merged[-1] = Part(last.text, last.start, last.length + part.length)
        elif part.length:
            merged.append(part)
    return merged


class Request(NamedTuple):
    """One request of a trace.

    Attributes:
        id: the number of its row in the trace, from 0.
        arrival_ns: when it arrives, in nanoseconds from the start of the trace.
        parts: what its prompt consists of.
        max_tokens: tokens it asks for; a replay generates that many unless told to stop at end-of-sequence.
        session: the conversation it belongs to.
        after: the request whose answer must be complete before this one can arrive.
        think_ns: how long after that answer, in nanoseconds, it arrives at the earliest.
        priority: smaller is more urgent, for orders that look at it.
        salt: requests of different salts never share blocks.
        tenant: whose it is, for orders that look at it.
    """

    id: int
    arrival_ns: int
    parts: Seq[Part]
    max_tokens: int
    session: int | None = None
    after: int | None = None
    think_ns: int = 0
    priority: int = 0
    salt: str = ""
    tenant: str = ""

    @property
    def labels(self) -> dict[str, int | str]:
        """What of priority, salt and tenant is not the default."""
        values: dict[str, int | str] = {"priority": self.priority, "salt": self.salt, "tenant": self.tenant}
        return {name: value for name, value in values.items() if value}

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        parts = self.parts
        return parts.num_tokens if isinstance(parts, Blocks) else sum([part.length for part in parts])

    def resolved(self, answer_lengths: Mapping[int, int]) -> Request:
        """The request with parts of answers cut to what was really generated.

        Args:
            answer_lengths: tokens generated, by request id, for every request whose answer the prompt holds.
        """
        if all(part.text >= 0 for part in self.parts):
            return self
        parts = []
        for part in self.parts:
            if part.text < 0:
                available = answer_lengths[-1 - part.text] - part.start
                part = part._replace(length=max(0, min(part.length, available)))
            parts.append(part)
        return self._replace(parts=tuple(part for part in parts if part.length))

    def to_sequence(self, params: SamplingParams, token_ids: list[int] | None = None) -> Sequence:
        """The Sequence that the policies see.

        Args:
            params: sampling; its `max_tokens` is replaced by the request's.
            token_ids: the prompt's tokens where something real runs; None in a simulation.
        """
        if token_ids is not None and len(token_ids) != self.prompt_tokens:
            raise ValueError(f"request {self.id}: {len(token_ids)} token ids for {self.prompt_tokens} prompt tokens")
        keys = None if token_ids is not None else PrefixKeys(self.parts, answer_text(self.id))
        return Sequence(
            token_ids,
            _with_max_tokens(params, self.max_tokens),
            seq_id=self.id,
            num_prompt_tokens=self.prompt_tokens,
            prefix_key=keys,
            arrival_ns=self.arrival_ns,
            priority=self.priority,
            salt=self.salt,
            tenant=self.tenant,
        )


@lru_cache(maxsize=4096)
def _with_max_tokens(params: SamplingParams, max_tokens: int) -> SamplingParams:
    return replace(params, max_tokens=max_tokens)


@mypyc_attr(native_class=False)  # it is subclassed, and pickled
@dataclass(frozen=True)
class TokenMaker:
    """Makes token ids from a prompt's parts: equal parts give equal tokens, other parts give unrelated ones.

    Args:
        vocab_size: ids are below it.
        first_id: ids are at or above it (tokenizers keep special tokens at the low end).
        seed: another seed, other tokens.
    """

    vocab_size: int
    first_id: int = 0
    seed: int = 0

    def token_ids(self, request: Request, answers: Mapping[int, Seq[int]]) -> list[int]:
        """The prompt of `request`; `answers` holds the generated tokens of the requests that it refers to."""
        tokens: list[int] = []
        for part in request.parts:
            if part.text < 0:
                tokens += answers[-1 - part.text][part.start : part.start + part.length]
            else:
                tokens += self._text(part)
        return tokens

    def _text(self, part: Part) -> list[int]:
        import numpy as np

        key = xxh64_intdigest(part.text.to_bytes(8, "little"), self.seed)
        x = np.arange(part.start + 1, part.start + part.length + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        x += np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        span = np.uint64(self.vocab_size - self.first_id)
        return (x % span + np.uint64(self.first_id)).tolist()
