"""The answers of one HTTP request, piece by piece, on the server's event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from twinserve.engine.token_logprobs import TokenLogprobs
from twinserve.serving.backends import Backend
from twinserve.serving.dispatch import Dispatcher, Stream
from twinserve.serving.messages import Ask
from twinserve.serving.metrics import HttpMetrics
from twinserve.serving.protocol import ApiError, Generation
from twinserve.serving.text import AnswerText


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
    """One stream that is being read, and its text."""

    def __init__(self, backend: Backend, index: int, stream: Stream, text: AnswerText | None):
        self.index, self.stream = index, stream
        self.ask: Ask = stream.submission.ask
        self.num_tokens = 0
        self.is_done = False
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._backend, self._text = backend, text

    def take(self) -> Piece | None:
        """What is new; None if nothing is.

        Raises:
            ApiError: the request was refused, or cannot be finished.
        """
        stream, reason = self.stream, self.stream.finish_reason
        if reason == "refused":
            raise ApiError(f"this request can never be served: {stream.refusal}")
        if stream.refusal is not None:
            raise ApiError(f"this request has failed: {stream.refusal}", HTTPStatus.INTERNAL_SERVER_ERROR)
        token_ids = stream.token_ids[self.num_tokens :]
        if reason is None and not token_ids:
            return None
        begin = len(self.ask.prompt)
        if self.num_tokens == 0 and token_ids and self.ask.prompt_logprobs is not None:
            self.prompt_logprobs = [None, *(stream.logprobs[place] for place in range(1, begin))]
        piece = Piece(self.index, token_ids=token_ids, finish_reason=reason)
        if reason == "length" and stream.submission.length < self.ask.max_tokens:
            piece.finish_reason = "stop"
        if self.ask.params.logprobs is not None:
            place = begin + self.num_tokens
            piece.logprobs = [stream.logprobs[place + number] for number in range(len(token_ids))]
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


class Answers:
    """The answers that one HTTP request asks for; to be made on the server's event loop.

    Args:
        asks: one an answer.
        metrics: told how late they are read.

    Raises:
        RunError: nothing is served any more.
    """

    def __init__(self, dispatcher: Dispatcher, asks: Seq[Ask], body: Generation, metrics: HttpMetrics):
        self._dispatcher, self._metrics = dispatcher, metrics
        self._event = asyncio.Event()
        tokenizer = dispatcher.backend.tokenizer
        how: dict[str, Any] = {"include_stop": body.include_stop_str_in_output}
        how |= {"skip_special_tokens": body.skip_special_tokens, "min_tokens": body.min_tokens}
        self._streams = dispatcher.submit(asks, self._event)
        self._answers = [
            _Answer(
                dispatcher.backend,
                index,
                stream,
                None if tokenizer is None else AnswerText(tokenizer, ask.prompt, stops=body.stops, **how),
            )
            for index, (ask, stream) in enumerate(zip(asks, self._streams, strict=True))
        ]

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
        return sum(answer.stream.num_cached_tokens for answer in first.values())

    @property
    def num_completion_tokens(self) -> int:
        """Of all answers, so far."""
        return sum(answer.num_tokens for answer in self._answers)

    def prompt_of(self, index: int) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The tokens of an answer's prompt, and their log-probabilities where they were asked for; the first has none.

        They are known once the answer has begun; if it ended before, there are none.
        """
        answer = self._answers[index]
        prompt = answer.ask.prompt
        return prompt, answer.prompt_logprobs or [None] * len(prompt)

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
                now_s, found = time.perf_counter(), []
                for answer in left:
                    if answer.stream.since_s is not None:
                        self._metrics.lag_s, answer.stream.since_s = now_s - answer.stream.since_s, None
                    if (piece := answer.take()) is not None:
                        found.append(piece)
                left = [answer for answer in left if not answer.is_done]
                if found:
                    yield found
                if left and (error := self._dispatcher.error) is not None:
                    raise ApiError(f"the engine has failed: {error}", HTTPStatus.INTERNAL_SERVER_ERROR)
        finally:
            self._dispatcher.leave(self._streams)
