"""Log-probabilities of sampled tokens and of prompts: taken behind the model, read with the tokens of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from twinserve.engine.device_queue import to_device, to_host
from twinserve.engine.online import TokenHandle
from twinserve.engine.token_logprobs import TokenLogprobs
from twinserve.policies import Row, Sequence

Heard = dict[Sequence, dict[int, TokenLogprobs]]
"""The log-probabilities of sequences' tokens, by their places in the sequence from 0."""


class AskedLogprobs:
    """The log-probabilities that rows of one step ask for; false if none does.

    Args:
        rows: those that sample, in the order of their logits.
    """

    def __init__(self, rows: Seq[Row]) -> None:
        self._asked = [(place, row) for place, row in enumerate(rows) if row.seq.sampling_params.logprobs is not None]
        self._taken: tuple[Tensor, Tensor] | None = None

    def __bool__(self) -> bool:
        return bool(self._asked)

    def take(self, logits: Tensor, tokens: Tensor) -> None:
        """Take what was asked for from the model's `logits` [rows, vocab] and the sampled `tokens` [rows].

        The copy to the host takes its place in the device's queue: it is there when the step has ended.
        """
        most = max(row.seq.sampling_params.logprobs or 0 for _, row in self._asked)
        places = to_device(torch.tensor([place for place, _ in self._asked]), logits.device)
        logprobs = logits[places].float().log_softmax(dim=-1)
        chosen = logprobs.gather(1, tokens[places].long().clamp(min=0)[:, None])  # one that was not sampled has none
        top, token_ids = logprobs.topk(min(most, logits.shape[-1]))
        self._taken = to_host(torch.cat((chosen, top), dim=1)), to_host(token_ids)

    def read(self, heard: Heard) -> None:
        """Write what was taken into `heard`, but for sequences that have ended: their step ran ahead of their stop."""
        assert self._taken is not None
        values, token_ids = (taken.tolist() for taken in self._taken)
        for (_, row), (chosen, *top), ids in zip(self._asked, values, token_ids, strict=True):
            if row.seq.is_finished:
                continue
            count = row.seq.sampling_params.logprobs
            of_seq = heard.setdefault(row.seq, {})
            of_seq[row.start + row.num_tokens] = TokenLogprobs(chosen, tuple(zip(ids, top, strict=True))[:count])


class PromptLogprobs:
    """The log-probabilities of prompts' tokens that rows of one step can give; false if none is asked for.

    Args:
        rows: all of the step, in the order of its flat batch.
        asks: how many most probable tokens are asked for at each place, by sequence.
        heard: what is known already, as of a prompt that is computed again.
    """

    AT_ONCE = 256
    """Rows of the vocabulary's size that are there together."""

    def __init__(self, rows: Seq[Row], asks: Mapping[Sequence, int], heard: Heard) -> None:
        self._asked: list[tuple[Sequence, int, int]] = []
        self._flat: list[int] = []
        self._taken: list[tuple[Tensor, Tensor]] = []
        begin = 0
        for row in rows if asks else ():
            if (count := asks.get(row.seq)) is not None:
                known = heard.get(row.seq, {})
                end = min(row.start + row.num_tokens, row.seq.num_prompt_tokens - 1)
                places = [place for place in range(row.start + 1, end + 1) if place not in known]
                self._asked += [(row.seq, place, count) for place in places]
                self._flat += [begin + place - 1 - row.start for place in places]
            begin += row.num_tokens

    def __bool__(self) -> bool:
        return bool(self._asked)

    @property
    def places(self) -> list[int]:
        """Places in the flat batch of the tokens behind which they lie."""
        return self._flat

    def take(self, hidden: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
        """Take what was asked for from the model's output `hidden` [tokens, hidden_size] of the flat batch."""
        flat = to_device(torch.tensor(self._flat), hidden.device)
        tokens = to_device(torch.tensor([seq.token_ids[place] for seq, place, _ in self._asked]), hidden.device)
        most = max(count for _, _, count in self._asked)
        for places, own in zip(flat.split(self.AT_ONCE), tokens.split(self.AT_ONCE), strict=True):
            logprobs = logits_of(hidden[places]).float().log_softmax(dim=-1)
            chosen = logprobs.gather(1, own[:, None])
            ranks = (logprobs >= chosen).sum(dim=-1, keepdim=True)
            top, token_ids = logprobs.topk(min(most, logprobs.shape[-1]))
            values, numbers = torch.cat((chosen, top), dim=1), torch.cat((ranks, token_ids), dim=1)
            self._taken.append((to_host(values), to_host(numbers)))

    def read(self, heard: Heard) -> None:
        """Write what was taken into `heard`, but for sequences that have ended."""
        values = [row for taken, _ in self._taken for row in taken.tolist()]
        numbers = [row for _, taken in self._taken for row in taken.tolist()]
        for (seq, place, count), (chosen, *top), (rank, *ids) in zip(self._asked, values, numbers, strict=True):
            if not seq.is_finished:
                most_probable = tuple(zip(ids, top, strict=True))[:count]
                heard.setdefault(seq, {})[place] = TokenLogprobs(chosen, most_probable, rank)


class LogprobStep:
    """A launched step of which log-probabilities are asked; a `twinserve.engine.online.StepHandle`.

    Args:
        heard: where they go with `result`.
    """

    def __init__(self, step: TokenHandle, asked: Seq[AskedLogprobs | PromptLogprobs], heard: Heard) -> None:
        self._step, self._asked, self._heard = step, asked, heard
        self.start_ns = self.end_ns = 0

    def result(self) -> list[int]:
        tokens = self._step.result()
        self.start_ns, self.end_ns = self._step.start_ns, self._step.end_ns
        for asked in self._asked:
            asked.read(self._heard)
        return tokens
