"""Proposers: which tokens may come next, guessed at less cost than the model's own step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from twinserve.engine.device_queue import all_to_device, to_host
from twinserve.engine.forward import Drafted, Forward
from twinserve.engine.layout import Layout
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.sampler import uniform
from twinserve.policies import Row, Sequence


@dataclass(frozen=True)
class Verified:
    """A step whose drafts are verified, as it lies on the device before the host knows what came of it.

    Attributes:
        rows: where they really begin.
        known: by row, its tokens before its first draft.
        tables: by row, the ids of its sequence's blocks, which hold as many tokens as the policies look ahead.
        accepted: [sampled rows], int64: how many of each one's drafts are.
        runs: [sampled rows, at least 1 + drafts], int64: what each one samples, its accepted drafts and the model's own
            token behind them, then whatever.
    """

    rows: Seq[Row]
    known: Seq[list[int]]
    tables: Seq[np.ndarray]
    accepted: torch.Tensor
    runs: torch.Tensor


class LateDrafts(Seq[list[int]]):
    """Drafts that the device may be at still; whoever reads one of them waits for all.

    Args:
        tokens: [rows, most drafts], on the device.

    Attributes:
        counts: of each row, how many of its tokens are drafts, the first ones; to be said before they are read.
        tokens: one row behind another, `width` of each.
    """

    counts: Seq[int]

    def __init__(self, tokens: torch.Tensor) -> None:
        self._host = to_host(tokens)
        self.tokens, self.width = tokens.flatten(), tokens.shape[1]
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
    """Proposes drafts behind each step from the texts, in the thread that computes."""

    def propose(self, texts: Mapping[Sequence, Seq[int]], asked: int) -> list[list[int]]:
        """At most `asked` drafts behind all tokens of each sequence that sampled."""


class NgramProposer:
    """Prompt lookup: what came behind an earlier place of the text that ends with the same tokens.

    As vLLM's: of all runs of `least` to `most` last tokens that occur earlier in the text the longest counts, and of
    its places the first.
    """

    def __init__(self, least: int, most: int, max_model_len: int):
        self._least, self._most, self._max_model_len = least, most, max_model_len

    def propose(self, texts: Mapping[Sequence, Seq[int]], asked: int) -> list[list[int]]:
        return [self.of(text, min(asked, self._max_model_len - len(text))) for text in texts.values()]

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

    def propose(self, texts: Mapping[Sequence, Seq[int]], asked: int) -> list[list[int]]:
        drafts = []
        for seq, text in texts.items():
            coming = self._text_of(seq)[len(text) : len(text) + asked]
            drafts.append([self._said(seq, len(text) + number, token) for number, token in enumerate(coming)])
        return drafts

    def _said(self, seq: Sequence, place: int, token: int) -> int:
        is_right = uniform(self._seed + seq.seq_id * 0x9E3779B9, place) < self._probability
        return token if is_right else (token + 1) % self._vocab_size


class DraftModel:
    """A smaller model with the same tokens, and KV of its own in blocks of the same numbers.

    It computes what the model has just computed and the token that came last, which gives the first draft, and then a
    token at a time. Its drafts are the most probable tokens. It begins before the host knows what was accepted, so it
    computes as many tokens of each row as could be; what lies behind the accepted ones is computed again when it has
    come, before anything attends to it.

    Args:
        model: on the device of the model it drafts for.
        forward: its forward pass.
    """

    def __init__(self, model: Decoder, forward: Forward, max_model_len: int) -> None:
        self._model, self._forward, self._max_model_len = model, forward, max_model_len

    def propose_behind(self, verified: Verified, asked: int) -> LateDrafts:
        """`asked` drafts behind each row that sampled, as far as the context goes."""
        rows, known, width = verified.rows, verified.known, verified.runs.shape[1]
        spans = [
            (row.start, len(own) + (1 + row.num_drafts) * row.samples) for row, own in zip(rows, known, strict=True)
        ]
        layout = Layout.of(spans, verified.tables, self._forward.most_single)
        place_of = {number: place for place, number in enumerate(layout.order)}
        token_ids = [token for i in layout.order for token in known[i] + [0] * (spans[i][1] - len(known[i]))]
        sampled = [number for number, row in enumerate(rows) if row.samples]
        behind = [layout.last[number] - rows[number].num_drafts for number in sampled]  # each one's own token, if none
        places = [first + n for number, first in zip(sampled, behind, strict=True) for n in _run(rows[number])]
        sources = [place * width + n for place, number in enumerate(sampled) for n in _run(rows[number])]
        lengths = [spans[number][0] + spans[number][1] - rows[number].num_drafts for number in sampled]
        told = [token_ids, places, sources, behind, [place_of[number] for number in sampled], lengths]
        ids, late, source, first, place, length = all_to_device(told, verified.runs.device)
        ids = ids.index_copy(0, late, verified.runs.flatten()[source].clamp(min=0))  # of none sampled it goes on
        hidden = self._forward.computed(self._forward.lay(layout), ids)
        if not asked or not sampled:
            return LateDrafts(first.new_empty(len(sampled), 0))
        tables = [verified.tables[number] for number in sampled]
        drafted = Drafted(place, length + verified.accepted, tables, asked, self._max_model_len)
        most_probable = self._model.logits(hidden[first + verified.accepted]).argmax(dim=-1)
        return LateDrafts(torch.stack(self._forward.followed(drafted, most_probable), dim=1))


def _run(row: Row) -> range:
    """The places of what a row samples at most."""
    return range(1 + row.num_drafts)
