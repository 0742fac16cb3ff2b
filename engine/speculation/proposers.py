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
        rows: where they begin as far as the host knows.
        moved: [rows], int64: by how many tokens each begins later; None is by none.
        tables: by row, the ids of its sequence's blocks, which hold as many tokens as the policies look ahead.
        token_ids: [tokens], int64, of the flat batch.
        begins: by row, the place of its first token there.
        accepted: [sampled rows], int64: how many of each one's drafts are.
        runs: [sampled rows, at least 1 + drafts], int64: what each one samples, its accepted drafts and the model's own
            token behind them, then whatever.
    """

    rows: Seq[Row]
    moved: torch.Tensor | None
    tables: Seq[np.ndarray]
    token_ids: torch.Tensor
    begins: Seq[int]
    accepted: torch.Tensor
    runs: torch.Tensor


class LateDrafts(Seq[list[int]]):
    """Drafts that the device may be at still; whoever reads one of them waits for all.

    Args:
        tokens: [rows, most drafts], on the device.

    Attributes:
        counts: of each row, how many of its tokens are drafts, the first ones; to be said before they are read.
        tokens: as given.
    """

    counts: Seq[int]

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self._host = tokens, to_host(tokens)
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

    Attributes:
        is_free: see `Forward.is_free`.
    """

    def __init__(self, model: Decoder, forward: Forward, max_model_len: int) -> None:
        self._model, self._forward, self._max_model_len = model, forward, max_model_len
        self.is_free = forward.is_free

    def propose_behind(self, verified: Verified, asked: int) -> LateDrafts:
        """`asked` drafts behind each row that sampled, as far as the context goes."""
        rows, width = verified.rows, verified.runs.shape[1]
        known = [row.num_tokens - row.num_drafts for row in rows]
        spans = [(row.start, own + (1 + row.num_drafts) * row.samples) for row, own in zip(rows, known, strict=True)]
        layout = Layout.of(spans, verified.tables, self._forward.most_single)
        sampled = [number for number, row in enumerate(rows) if row.samples]
        runs = {number: len(verified.token_ids) + width * place for place, number in enumerate(sampled)}
        sources = list[int]()
        for number in layout.order:
            sources += range(verified.begins[number], verified.begins[number] + known[number])
            if rows[number].samples:
                sources += range(runs[number], runs[number] + 1 + rows[number].num_drafts)
        place_of = {number: place for place, number in enumerate(layout.order)}
        told = all_to_device(
            [
                sources,
                layout.order,
                sampled,
                [layout.last[number] - rows[number].num_drafts for number in sampled],  # the first token of its run
                [place_of[number] for number in sampled],
                [rows[number].start + known[number] + 1 for number in sampled],
            ],
            verified.runs.device,
        )
        source, order, own, first, place, length = told
        length = length + verified.accepted
        moved = None if verified.moved is None else verified.moved[order]
        token_ids = torch.cat((verified.token_ids, verified.runs.flatten().clamp(min=0)))[source]  # of none it goes on
        hidden = self._forward.computed(self._forward.lay(layout, moved), token_ids)
        if not asked or not sampled:
            return LateDrafts(first.new_empty(len(sampled), 0))
        if verified.moved is not None:
            length = length + verified.moved[own]
        tables = [verified.tables[number] for number in sampled]
        drafted = Drafted(place, length, tables, asked, self._max_model_len)
        most_probable = self._model.logits(hidden[first + verified.accepted]).argmax(dim=-1)
        return LateDrafts(torch.stack(self._forward.followed(drafted, most_probable), dim=1))
