"""Asks on their way to the Core, and what has come of them, on the server's event loop."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from twinserve.engine.token_logprobs import TokenLogprobs
from twinserve.serving.backends import Backend
from twinserve.serving.messages import Ask, Call, News, Submission
from twinserve.serving.parts import PartMaker
from twinserve.settings.errors import RunError


@dataclass(eq=False)
class Stream:
    """One answer as far as the Core has told of it.

    Attributes:
        submission: what it answers.
        event: set when something has come.
        token_ids: its tokens so far.
        logprobs: those asked for of prompt and answer, by their places in the sequence.
        since_s: when the oldest of what nobody has read was told; None if there is none.
        num_cached_tokens: those found in the prefix cache when it was scheduled for the first time.
        finish_reason: "stop", "length", "abort" or "refused", once it has ended.
        refusal: why it is refused, or cannot be finished.
    """

    submission: Submission
    event: asyncio.Event
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    since_s: float | None = None
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    refusal: str | None = None


class Dispatcher:
    """Hands asks in, and has each stream know what has come of it.

    Args:
        host: tells the Core's side.

    Attributes:
        backend: what serves.
        streams: those that somebody reads, by the number of the request.
        error: what has ended the serving, if something did.
    """

    def __init__(self, backend: Backend, host: Call):
        self.backend = backend
        self.streams: dict[int, Stream] = {}
        self.error: str | None = None
        self._host, self._is_over = host, False
        self._secret = secrets.token_bytes(16)
        self._numbers = itertools.count()
        self._parts = PartMaker(backend.settings.block_size)
        self._pages: deque[asyncio.Future[bytes]] = deque()

    @property
    def running(self) -> list[int]:
        """The numbers of the requests that have come in and have not ended, whether they were scheduled yet or not."""
        return [number for number, stream in self.streams.items() if stream.finish_reason is None]

    def submit(self, asks: Seq[Ask], event: asyncio.Event) -> list[Stream]:
        """Let requests in, all of them before the next decision.

        Args:
            event: set whenever something has come of one of them.

        Raises:
            RunError: nothing is served any more.
        """
        self._check()
        numbered = [(next(self._numbers), ask) for ask in asks]
        submissions = [
            Submission(
                number,
                replace(ask, salt=self._concealed(ask.salt, None if ask.prompt_logprobs is None else number)),
                self.backend.length(ask),
                self._parts.parts(number, ask.prompt),
            )
            for number, ask in numbered
        ]
        self._host("submit", submissions)
        streams = [Stream(submission, event) for submission in submissions]
        self.streams |= {stream.submission.number: stream for stream in streams}
        return streams

    def leave(self, streams: Seq[Stream]) -> None:
        """Hear of some streams no longer; those that have not ended are aborted. Their answers are known again in later
        prompts."""
        if left := [stream.submission.number for stream in streams if stream.finish_reason is None]:
            self._host("abort", left)
        for stream in streams:
            number, ask, _, parts = stream.submission
            del self.streams[number]
            self._parts.answered(number, ask.prompt, parts, stream.token_ids)

    def abort(self) -> int:
        """Have all that has not ended end at the next decision; their streams hear of it.

        Returns:
            How many these are.
        """
        if running := self.running:
            self._host("abort", running)
        return len(running)

    async def page(self) -> bytes:
        """The metrics page of what serves.

        Raises:
            RunError: nothing is served any more.
        """
        self._check()
        self._pages.append(asyncio.get_running_loop().create_future())
        self._host("page")
        return await self._pages[-1]

    # --- what the Core's side tells ---

    def hear(self, news: News) -> None:
        """Take in what has come of requests; of those whose streams were left, nothing."""
        streams, at_s = self.streams, news.at_s
        for number, num_cached_tokens in news.admitted:
            if (stream := streams.get(number)) is not None:
                stream.num_cached_tokens = num_cached_tokens
        for number, of_stream in news.logprobs:
            if (stream := streams.get(number)) is not None:
                stream.logprobs |= of_stream
        for number, token_id in zip(news.numbers, news.token_ids, strict=True):
            if (stream := streams.get(number)) is not None:
                stream.token_ids.append(token_id)
                self._wake(stream, at_s)
        for number, reason, refusal in news.ended:
            if (stream := streams.get(number)) is not None:
                stream.finish_reason, stream.refusal = reason, refusal
                self._wake(stream, at_s)

    def paged(self, page: bytes) -> None:
        """Take in the page that was asked for first."""
        waiting = self._pages.popleft()
        if not waiting.done():  # who asked may have gone
            waiting.set_result(page)

    def ended(self, error: str | None) -> None:
        """Nothing more will come."""
        self._is_over, self.error = True, error
        for stream in self.streams.values():
            stream.event.set()
        for waiting in self._pages:
            if not waiting.done():
                waiting.set_exception(RunError("nothing more is served: the engine is closed"))

    def _check(self) -> None:
        if self._is_over:
            raise RunError("nothing more is served: the engine is closed")

    def _wake(self, stream: Stream, at_s: float) -> None:
        if stream.since_s is None:
            stream.since_s = at_s
        stream.event.set()

    def _concealed(self, salt: str, alone: int | None) -> str:
        """A salt as it is known beyond this object, where it may be a secret.

        Args:
            alone: the number of a request that computes all of its prompt, and so shares no block with any other.
        """
        if not salt and alone is None:
            return ""
        return hashlib.blake2b(f"{alone} {salt}".encode(), key=self._secret, digest_size=8).hexdigest()
