"""Digest: a run's decisions as one number, for records and replays."""

from __future__ import annotations

from struct import Struct, pack
from typing import Final

from mypy_extensions import i64
from xxhash import xxh64_intdigest

from twinserve.policies import Batch, Sequence

_HALF: Final = (1 << 32) - 1
_PACKED = Struct("=2I4Q").pack


Exceptions = list[tuple[Sequence, int, bool]]


def places_of(batch: Batch, seqs: list[Sequence]) -> list[int]:
    """Where the rows of some sequences are, which are in running order; they are looked for from the last row on, as
    prompts are mostly there."""
    places: list[int] = []
    place = len(batch.seqs)
    for seq in reversed(seqs):
        place -= 1
        while batch.seqs[place] is not seq:
            place -= 1
        places.append(place)
    places.reverse()
    return places


def exceptions_of(batch: Batch) -> Exceptions:
    """(sequence, tokens, does it sample?) of those that ran before and do not get the usual, in running order."""
    usual, num_before = batch.usual_tokens, len(batch.seqs) - len(batch.admitted)
    if usual and batch.num_tokens == batch.num_sampled == num_before and not batch.skipped:
        return []
    if usual and batch.num_decode_tokens == len(batch.seqs) - len(batch.prompts):  # a token each
        places = [place for place in places_of(batch, batch.prompts) if place < num_before]
    else:
        places = list(range(num_before))
    chunks = set(batch.chunks)
    exceptions: Exceptions = []
    for place in places:
        seq, num_tokens = batch.seqs[place], batch.lengths[place]
        samples = seq not in chunks
        if num_tokens != usual or not samples:
            exceptions.append((seq, num_tokens, samples))
    if batch.skipped:
        exceptions += [(seq, 0, False) for seq in batch.skipped]
        exceptions.sort(key=lambda entry: entry[0].admission_index)
    return exceptions


class Digest:
    """A 64-bit chain over decisions, equal exactly when all decisions so far were (but for collisions).

    A decision that repeats the one before it adds its number and the blocks that grew, as a sum, so that it does not
    matter whether repeated decisions are digested one by one or together.

    Attributes:
        exceptions: those of the latest decision (see `exceptions_of`).
    """

    def __init__(self) -> None:
        self.exceptions: Exceptions = []
        self._chain = 0
        self._grown_lower: i64 = 0
        self._grown_upper: i64 = 0
        self._usual = self._asked = -1

    def of(self, batch: Batch) -> int:
        """The digest up to `batch`, which follows the batch of the call before."""
        before, exceptions = self.exceptions, exceptions_of(batch)
        usual, asked = batch.usual_tokens, batch.num_drafts_asked
        is_as_before = usual == self._usual and asked == self._asked and exceptions == before
        self.exceptions, self._usual, self._asked = exceptions, usual, asked
        if not is_as_before or batch.admitted or batch.left or batch.preempted:
            values = [batch.decision, usual, len(batch.admitted)]
            for row in batch.admitted:
                block_table = row.seq.block_table
                values += (row.seq.seq_id, row.start, row.num_tokens, row.samples, len(block_table))
                values += block_table
            for seqs in (batch.preempted, batch.left):
                values.append(len(seqs))
                values += [seq.seq_id for seq in seqs]
            for seq, num_tokens, samples in exceptions:
                values += (seq.seq_id, num_tokens, samples)
            if asked:
                values.append(asked)
            self._chain = xxh64_intdigest(pack(f"={len(values)}q", *values), self._chain)
        return self.grow(batch, batch.grown)

    def grow(self, batch: Batch, grown: list[tuple[Sequence, list[int]]]) -> int:
        """The digest up to `batch`, which repeats the one of the call before, with these blocks more."""
        # A sum over (sequence's number * 0x9E3779B97F4A7C15) ^ (block's number * 0xBF58476D1CE4E5B9), modulo 2**64; in
        # halves of 32 bits, which compiled code works out in the machine's own integers.
        lower, upper = self._grown_lower, self._grown_upper
        for seq, block_ids in grown:
            number: i64 = seq.arrival_index + 1
            product: i64 = number * 0x7F4A7C15
            own_lower: i64 = product & _HALF
            own_upper: i64 = number * 0x9E3779B9 + (product >> 32) & _HALF
            for block_id in block_ids:
                block: i64 = block_id + 1
                product = block * 0x1CE4E5B9
                lower += own_lower ^ (product & _HALF)
                upper += own_upper ^ (block * 0xBF58476D + (product >> 32) & _HALF)
        self._grown_lower, self._grown_upper = lower & _HALF, (upper + (lower >> 32)) & _HALF
        packed = _PACKED(
            self._grown_lower,
            self._grown_upper,
            batch.decision,
            batch.num_used_blocks,
            batch.num_waiting,
            batch.num_running,
        )
        return xxh64_intdigest(packed, self._chain)
