"""Proposers: which tokens may come next, guessed at less cost than the model's own step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from twinserve.engine.device_queue import to_device
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


class Proposer(Protocol):
    """Proposes drafts behind each step, in the thread and on the device that compute it."""

    def propose(self, rows: Seq[VerifiedRow], asked: int) -> list[list[int]]:
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


class Forward(Protocol):
    """A model's forward pass, over keys and values of its own."""

    def __call__(self, layout: Layout, token_ids: Tensor) -> Tensor:
        """What the last layer gives for each token of a flat batch, [tokens, hidden_size], normalised."""


class DraftModel:
    """A smaller model with the same tokens, and KV of its own in blocks of the same numbers.

    It computes what the model has just computed and the token that came last, which gives the first draft, and then a
    token at a time. Its drafts are the most probable tokens.

    Args:
        model: on the device of the model it drafts for.
        forward: its forward pass.
    """

    def __init__(self, model: Decoder, forward: Forward, max_model_len: int) -> None:
        self._model, self._forward_pass, self._max_model_len = model, forward, max_model_len

    def propose(self, rows: Seq[VerifiedRow], asked: int) -> list[list[int]]:
        drafts: list[list[int]] = [[] for row in rows if row.text]
        left = [min(asked, self._max_model_len - len(row.text)) for row in rows if row.text]
        spans = [(row.tokens, row.start, row.table) for row in rows]
        first = self._forward(spans, [place for place, row in enumerate(rows) if row.text])
        sampled = [row for row in rows if row.text]
        for place, token in enumerate(first):
            if left[place] > 0:
                drafts[place].append(token)
        for number in range(1, asked):
            going = [place for place in range(len(sampled)) if left[place] > number]
            if not going:
                break
            spans = [
                ([drafts[place][-1]], len(sampled[place].text) + number - 1, sampled[place].table) for place in going
            ]
            for place, token in zip(going, self._forward(spans, list(range(len(going)))), strict=True):
                drafts[place].append(token)
        return drafts

    def _forward(self, spans: Seq[tuple[Seq[int], int, np.ndarray]], wanted: Seq[int]) -> list[int]:
        """Compute tokens from positions on in block tables; the most probable token behind each span of `wanted`."""
        layout = Layout.of([(start, len(tokens)) for tokens, start, _ in spans], [table for *_, table in spans])
        hidden = self._forward_pass(layout, self._on_device([token for at in layout.order for token in spans[at][0]]))
        if not wanted:
            return []
        last = self._on_device([layout.last[index] for index in wanted])
        tokens: list[int] = self._model.logits(hidden[last]).argmax(dim=-1).tolist()
        return tokens

    def _on_device(self, values: Seq[int] | np.ndarray) -> Tensor:
        return to_device(np.asarray(values, dtype=np.int64), torch.device(self._model.device))
