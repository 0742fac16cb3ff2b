"""The answers of one HTTP request, piece by piece, on the server's event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from twinserve.policies import Sequence
from twinserve.serving.backends import Ask, Backend
from twinserve.serving.protocol import ApiError, Generation
from twinserve.serving.text import AnswerText

if TYPE_CHECKING:
    from twinserve.engine.logprobs import TokenLogprobs


_MOST_APART = 16
"""So many tokens that have come together are still said one by one; of a stream that is further behind, all at once."""

_BEHIND_S = 0.002
"""Streams that go out so much later than their tokens were known say all that they have at once, and so catch up."""


@dataclass
class Piece:
    """What one answer has got since its last piece.

    Attributes:
        index: which answer of the request.
        text: what has become sure of its text.
        token_ids, logprobs: its tokens; log-probabilities only where they were asked for.
        finish_reason: "stop", "length" or "abort" with the last piece.
        stop_reason: the stop string or the token of `stop_token_ids` that ended it.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class _Answer:
    """One sequence that is being served, and its text."""

    def __init__(self, backend: Backend, index: int, ask: Ask, seq: Sequence, text: AnswerText | None):
        self.index, self.ask, self.seq = index, ask, seq
        self.num_tokens = 0
        self.is_done = False
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._backend, self._text = backend, text

    def take(self, is_behind: bool) -> Piece | None:
        """What is new; None if nothing is.

        Args:
            is_behind: streams are late, so that all of it is one piece.

        Raises:
            ApiError: the request was refused, or cannot be finished.
        """
        seq, reason = self.seq, self.seq.finish_reason
        if reason == "refused":
            raise ApiError(f"this request can never be served: {seq.refusal}")
        if seq.refusal is not None:
            raise ApiError(f"this request has failed: {seq.refusal}", HTTPStatus.INTERNAL_SERVER_ERROR)
        token_ids = self._backend.tokens(seq, self.num_tokens)
        if reason is None and not token_ids:
            return None
        if 1 < len(token_ids) <= _MOST_APART and not is_behind:
            token_ids, reason = token_ids[:1], None
        if self.num_tokens == 0 and token_ids and self.ask.prompt_logprobs is not None:
            of_prompt = self._backend.logprobs(seq)
            self.prompt_logprobs = [None, *(of_prompt[place] for place in range(1, seq.num_prompt_tokens))]
        piece = Piece(self.index, token_ids=token_ids, finish_reason=reason)
        if reason == "length" and seq.max_tokens < self.ask.max_tokens:
            piece.finish_reason = "stop"
        if seq.sampling_params.logprobs is not None:
            place = seq.num_prompt_tokens + self.num_tokens
            heard = self._backend.logprobs(seq)
            piece.logprobs = [heard[place + number] for number in range(len(token_ids))]
        ends_by_token = reason == "stop" and bool(token_ids)
        if ends_by_token and token_ids[-1] != self._backend.eos_token_id:
            piece.stop_reason = token_ids[-1]
        before = self.num_tokens
        self.num_tokens += len(token_ids)
        if self._text is not None:
            piece.text = self._text.push(token_ids[:-1] if ends_by_token else token_ids)
            if reason is not None:
                piece.text += self._text.end()
            if self._text.stop is not None:
                piece.finish_reason, piece.stop_reason = "stop", self._text.stop
                self.num_tokens = self._text.num_tokens
                piece.token_ids = token_ids[: self.num_tokens - before]
                piece.logprobs = piece.logprobs[: len(piece.token_ids)]
        self.is_done = piece.finish_reason is not None
        return piece


class Wakes:
    """Follows all sequences of an event loop, which it wakes once for all that have got something.

    Args:
        loop: may be busy; what comes meanwhile is taken together.

    Attributes:
        events: set when a sequence has got something.
        lag_s: how long the latest wake came after what it told of: so much later do streams go out.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.events: dict[Sequence, asyncio.Event] = {}
        self._loop = loop
        self.lag_s = 0.0
        self._told: deque[list[Sequence]] = deque()
        self._is_due, self._due_s = False, 0.0

    def __call__(self, seqs: list[Sequence]) -> None:
        """Hear of sequences; in the thread of Core."""
        self._told.append(seqs)
        if not self._is_due:
            self._is_due, self._due_s = True, time.perf_counter()
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self.lag_s = time.perf_counter() - self._due_s
        self._is_due = False
        while self._told:
            for seq in self._told.popleft():
                if (event := self.events.get(seq)) is not None:
                    event.set()


class Answers:
    """The answers that one HTTP request asks for; to be made on the server's event loop.

    Args:
        asks: one an answer.
        wakes: of the event loop.

    Raises:
        RunError: nothing is served any more.
    """

    def __init__(self, backend: Backend, asks: Seq[Ask], body: Generation, wakes: Wakes):
        self._backend = backend
        self._event = asyncio.Event()
        tokenizer = backend.tokenizer
        how: dict[str, Any] = {"include_stop": body.include_stop_str_in_output}
        how |= {"skip_special_tokens": body.skip_special_tokens, "min_tokens": body.min_tokens}
        self._answers = [
            _Answer(
                backend,
                index,
                ask,
                seq,
                None if tokenizer is None else AnswerText(tokenizer, ask.prompt, stops=body.stops, **how),
            )
            for index, (ask, seq) in enumerate(zip(asks, backend.submit(asks, wakes), strict=True))
        ]
        wakes.events |= {answer.seq: self._event for answer in self._answers}
        self._wakes = wakes
        self._event.set()

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(
            len(prompt) for prompt in {id(answer.ask.prompt): answer.ask.prompt for answer in self._answers}.values()
        )

    @property
    def num_cached_tokens(self) -> int:
        """Those found in the prefix cache when the first answer of each prompt was admitted."""
        first = {id(answer.ask.prompt): answer for answer in reversed(self._answers)}
        return sum(answer.seq.num_cached_tokens for answer in first.values())

    @property
    def num_completion_tokens(self) -> int:
        """Of all answers, so far."""
        return sum(answer.num_tokens for answer in self._answers)

    def prompt_of(self, index: int) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The tokens of an answer's prompt, and their log-probabilities where they were asked for; the first has none.

        They are known once the answer has begun.
        """
        answer = self._answers[index]
        return answer.ask.prompt, answer.prompt_logprobs or []

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """What comes, as much as is there at a time, until every answer has ended.

        Whatever ends this before aborts what is left.

        Raises:
            ApiError: a request was refused, or the engine has failed.
        """
        try:
            left = self._answers
            while left:
                await self._event.wait()
                self._event.clear()
                found: list[Piece] = []
                for answer in left:
                    while not answer.is_done and (piece := answer.take(self._wakes.lag_s > _BEHIND_S)) is not None:
                        found.append(piece)
                left = [answer for answer in left if not answer.is_done]
                if found:
                    yield found
                if left and (error := self._backend.live.error) is not None:
                    raise ApiError(f"the engine has failed: {error}", HTTPStatus.INTERNAL_SERVER_ERROR)
        finally:
            self._backend.live.abort([answer.seq for answer in self._answers])
            for answer in self._answers:
                del self._wakes.events[answer.seq]
                self._backend.ended(answer.seq, answer.ask)
