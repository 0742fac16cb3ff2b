"""Log-probabilities of sampled tokens: taken behind the sampling, read with the tokens of the step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from twinserve.engine.device_queue import to_device, to_host
from twinserve.engine.online import StepHandle
from twinserve.policies import Row, Sequence


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities that the model gave a token: before penalty, temperature and all else.

    Attributes:
        logprob: of the token that was generated.
        top: (token id, log-probability) of the most probable tokens, the most probable first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


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
        chosen = logprobs.gather(1, tokens[places].long()[:, None])
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


class LogprobStep:
    """A launched step of which log-probabilities are asked; a `twinserve.engine.online.StepHandle`.

    Args:
        heard: where they go with `result`.
    """

    def __init__(self, step: StepHandle, asked: AskedLogprobs, heard: Heard) -> None:
        self._step, self._asked, self._heard = step, asked, heard
        self.start_ns = self.end_ns = 0

    def result(self) -> list[int]:
        tokens = self._step.result()
        self.start_ns, self.end_ns = self._step.start_ns, self._step.end_ns
        self._asked.read(self._heard)
        return tokens
