"""What passes between those who serve HTTP and the Core: asks one way, what has come of them the other.

Either side tells the other by a `Call`. In one process that is a call; between two, each is sent as a message.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from twinserve.engine.token_logprobs import TokenLogprobs
from twinserve.policies import SamplingParams
from twinserve.traces.request import Part

Call = Callable[..., None]
"""Called with the name of a method of the other side and its arguments, from any thread; it does not wait.

A `Front` is told `ready`, `hear`, `paged`, `ended` and `exit`; a `Hosting` is told `say`, `serving`, `submit`, `abort`,
`page` and `close`.
"""


@dataclass(frozen=True)
class Ask:
    """One answer that is asked for.

    Attributes:
        prompt: its tokens.
        params: how the answer is chosen.
        max_tokens: the most tokens of it.
        session: the conversation it belongs to.
        priority: smaller is more urgent.
        salt: requests of different salts never share blocks.
        prompt_logprobs: how many log-probabilities are asked for of each token of the prompt; None is none.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    session: int | None = None
    priority: int = 0
    salt: str = ""
    prompt_logprobs: int | None = None


class Submission(NamedTuple):
    """An ask as it is handed in.

    Attributes:
        number: of the request.
        ask: its salt is not the client's own.
        length: the tokens after which the answer ends in any case.
        parts: of the prompt, as a trace has them.
    """

    number: int
    ask: Ask
    length: int
    parts: tuple[Part, ...]


class News(NamedTuple):
    """What has come of requests, each by its number.

    Attributes:
        at_s: when, by time.perf_counter, which processes of a machine share.
        admitted: (number, tokens found in the prefix cache) of those that were scheduled for the first time.
        numbers, token_ids: the tokens that have come, in their order, and whose each of them is.
        ended: (number, finish reason, refusal) of those that have ended, or of which it is known that they will.
        logprobs: log-probabilities that were asked for, by the places of the tokens in the sequence.
    """

    at_s: float
    admitted: list[tuple[int, int]] = []
    numbers: list[int] = []
    token_ids: list[int] = []
    ended: list[tuple[int, str | None, str | None]] = []
    logprobs: list[tuple[int, dict[int, TokenLogprobs]]] = []


def _params(values: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**values)


def _reduced(params: SamplingParams) -> tuple[Any, ...]:
    return _params, ({field.name: getattr(params, field.name) for field in fields(SamplingParams)},)


copyreg.pickle(SamplingParams, _reduced)  # compiled, it is a frozen native class, which cannot be unpickled
