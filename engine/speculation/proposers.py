"""Proposers: which tokens may come next, guessed at less cost than the model's own step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from twinserve.engine.device_queue import to_device, to_host
from twinserve.engine.forward import Drafted, Forward
from twinserve.engine.layout import Layout
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.sampler import uniform
from twinserve.policies import Sequence


@dataclass(frozen=True)
class VerifiedRow:
    """A row of a step that has run, with what came of it.

    Attributes:
        start: the position of its first token.
        tokens: those that are known from there on: what the row computed, without rejected drafts, and the last token
            that it sampled, if it did.
        text: all tokens known, of a row that sampled; else empty.
        table: the ids of its sequence's blocks, which hold as many tokens as the policies look ahead.
    """

    seq: Sequence
    start: int
    tokens: list[int]
    text: list[int]
    table: np.ndarray


class LateDrafts(Seq[list[int]]):
    """Drafts whose numbers are known while the device is still at them; whoever reads one of them waits for all.

    Args:
        counts: of each row, how many of its tokens are drafts: the first.
        tokens: [rows, at least the largest count], on the device.
    """

    def __init__(self, counts: Seq[int], tokens: torch.Tensor) -> None:
        self.counts, self._host = counts, to_host(tokens)
        self._ready: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            self._ready = torch.cuda.Event()
            self._ready.record()

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, place: Any) -> Any:
        if self._ready is not None:
            self._ready.synchronize()
        return self._host[place, : self.counts[place]].tolist()


class Proposer(Protocol):
    """Proposes drafts behind each step, in the thread and on the device that compute it."""

    def propose(self, rows: Seq[VerifiedRow], asked: int) -> Seq[list[int]]:
        """Drafts behind the text of each row that sampled, in their order: at most `asked` of each.

        All rows of the step are there, so that a proposer with KV of its own keeps up.
        """


class NgramProposer:
    """Prompt lookup: what came behind an earlier place of the text that ends with the same tokens.

    As vLLM's: of all runs of `least` to `most` last tokens that occur earlier in the text the longest counts, and of
    its places the first.
    """

    def __init__(self, least: int, most: int, max_model_len: int):
        self._least, self._most, self._max_model_len = least, most, max_model_len

    def propose(self, rows: Seq[VerifiedRow], asked: int) -> list[list[int]]:
        return [self.of(row.text, min(asked, self._max_model_len - len(row.text))) for row in rows if row.text]

    def of(self, text: Seq[int], asked: int) -> list[int]:
        """At most `asked` drafts behind a text."""
        tokens = np.asarray(text)
        for length in range(min(self._most, len(tokens) - 1), self._least - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(tokens, length)[:-1]
            found = (windows == tokens[-length:]).all(axis=1)
            if found.any():
                begin = int(found.argmax()) + length
                return list(map(int, tokens[begin : begin + max(0, asked)]))
        return []


class ForcedProposer:
    """Knows what is right and says it with a given probability, else another token: for tests.

    Args:
        text_of: all tokens that a sequence will have, its prompt's among them.
        probability: that a draft is right; drawn by a hash of the seed, the sequence and the place.
    """

    def __init__(
        self, text_of: Callable[[Sequence], Seq[int]], probability: float, vocab_size: int, *, seed: int = 0
    ) -> None:
        self._text_of, self._probability, self._vocab_size, self._seed = text_of, probability, vocab_size, seed

    def propose(self, rows: Seq[VerifiedRow], asked: int) -> list[list[int]]:
        drafts = []
        for row in rows:
            if row.text:
                place = len(row.text)
                coming = self._text_of(row.seq)[place : place + asked]
                drafts.append([self._said(row.seq, place + k, token) for k, token in enumerate(coming)])
        return drafts

    def _said(self, seq: Sequence, place: int, token: int) -> int:
        is_right = uniform(self._seed + seq.seq_id * 0x9E3779B9, place) < self._probability
        return token if is_right else (token + 1) % self._vocab_size


class DraftModel:
    """A smaller model with the same tokens, and KV of its own in blocks of the same numbers.

    It computes what the model has just computed and the token that came last, which gives the first draft, and then a
    token at a time. Its drafts are the most probable tokens.

    Args:
        model: on the device of the model it drafts for.
        forward: its forward pass.
    """

    def __init__(self, model: Decoder, forward: Forward, max_model_len: int) -> None:
        self._model, self._forward, self._max_model_len = model, forward, max_model_len

    def propose(self, rows: Seq[VerifiedRow], asked: int) -> Seq[list[int]]:
        device = torch.device(self._model.device)
        spans, tables = [(row.start, len(row.tokens)) for row in rows], [row.table for row in rows]
        layout = Layout.of(spans, tables, self._forward.most_single)
        place_of = {number: place for place, number in enumerate(layout.order)}
        drafted, last = list[Drafted](), list[int]()
        for number, row in enumerate(rows):
            if row.text:
                count = max(0, min(asked, self._max_model_len - len(row.text)))
                drafted.append(Drafted(place_of[number], len(row.text), count, row.table))
                last.append(layout.last[number])
        token_ids = [token for number in layout.order for token in rows[number].tokens]
        told = to_device(np.array(token_ids + last), device)
        hidden = self._forward.computed(self._forward.lay(layout), told[: len(token_ids)])
        if not any(row.count for row in drafted):
            return [[] for _ in drafted]
        first = self._model.logits(hidden[told[len(token_ids) :]]).argmax(dim=-1)
        return LateDrafts([row.count for row in drafted], torch.stack(self._forward.followed(drafted, first), dim=1))
