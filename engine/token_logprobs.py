"""What is said of a token whose log-probability was asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities that the model gave a token: before penalty, temperature and all else.

    Attributes:
        logprob: of the token that was generated, or that the prompt has.
        top: (token id, log-probability) of the most probable tokens, the most probable first.
        rank: of a prompt's token, how many are at least as probable; None for generated ones.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int | None = None
