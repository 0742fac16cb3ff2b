"""Responses as OpenAI's clients read them: whole, and chunk by chunk."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any

from twinserve.serving.answers import Answers, Piece
from twinserve.serving.protocol import CompletionRequest, Generation, StreamOptions


class Format(ABC):
    """How the answers of one request are said.

    Args:
        model: as the response calls it.
        body: the request.
        tokenizer: says tokens whose log-probabilities are asked for.
    """

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str, body: Generation, tokenizer: Any):
        self._head = {"id": f"{self.prefix}-{body.request_id or uuid.uuid4().hex}", "created": int(time.time())}
        self._head["model"] = model
        self._body, self._tokenizer = body, tokenizer
        self._options = body.stream_options or StreamOptions()

    def whole(self, answers_pieces: list[list[Piece]], answers: Answers) -> dict[str, Any]:
        """The response to a request that does not stream."""
        choices = []
        for pieces in answers_pieces:
            joined = Piece(
                pieces[0].index,
                "".join(piece.text for piece in pieces),
                [token_id for piece in pieces for token_id in piece.token_ids],
                [logprobs for piece in pieces for logprobs in piece.logprobs],
                pieces[-1].finish_reason,
                pieces[-1].stop_reason,
            )
            choices.append(self._with_ids(joined, self.choice(joined)))
        return {**self._head, "object": self.object, "choices": choices, "usage": usage(answers)}

    def begin(self, answers: Answers) -> list[dict[str, Any]]:
        """The chunks before any text."""
        return []

    def chunks(self, piece: Piece, answers: Answers) -> list[dict[str, Any]]:
        """The chunks that say a piece."""
        if not (piece.text or piece.logprobs or piece.finish_reason or self._body.return_token_ids):
            return []
        return [self._chunk([self._with_ids(piece, self.delta(piece))], answers)]

    def end(self, answers: Answers) -> list[dict[str, Any]]:
        """The chunks behind all text."""
        if not self._options.include_usage:
            return []
        return [{**self._head, "object": self.chunk_object, "choices": [], "usage": usage(answers)}]

    def _chunk(self, choices: list[dict[str, Any]], answers: Answers) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        if self._options.continuous_usage_stats:
            chunk["usage"] = usage(answers)
        elif self._options.include_usage:
            chunk["usage"] = None
        return chunk

    def _with_ids(self, piece: Piece, choice: dict[str, Any]) -> dict[str, Any]:
        return choice | ({"token_ids": piece.token_ids} if self._body.return_token_ids else {})

    @abstractmethod
    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def delta(self, piece: Piece) -> dict[str, Any]:
        """What a chunk says of an answer."""

    def _ends(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.index, "finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}

    def _token(self, token_id: int) -> str:
        """What a token says by itself."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


def usage(answers: Answers) -> dict[str, Any]:
    """The tokens of a request's prompts and answers."""
    prompt, completion = answers.num_prompt_tokens, answers.num_completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answers.num_cached_tokens},
    }


class CompletionFormat(Format):
    """/v1/completions.

    Args:
        echoed: the prompts' texts, which come before their answers; None without echo.
    """

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, body: CompletionRequest, tokenizer: Any, echoed: list[str] | None):
        super().__init__(model, body, tokenizer)
        self._echoed = echoed
        self._offsets: dict[int, int] = {}

    def choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece)
        return {"text": self._echo(piece.index) + piece.text, "logprobs": logprobs, **self._ends(piece)}

    def begin(self, answers: Answers) -> list[dict[str, Any]]:
        if self._echoed is None:
            return []
        indices = range(len(self._echoed) * self._body.n)
        return [self._chunk([self._said(index, self._echo(index))], answers) for index in indices]

    def delta(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text, "logprobs": self._logprobs(piece), **self._ends(piece)}

    def _said(self, index: int, text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": None, **self._ends(Piece(index))}

    def _echo(self, index: int) -> str:
        return self._echoed[index // self._body.n] if self._echoed else ""

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """As this path has them: columns, the top as texts."""
        if self._body.num_logprobs is None:
            return None
        tokens = [self._token(token_id) for token_id in piece.token_ids]
        offset, offsets = self._offsets.get(piece.index, 0), []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[piece.index] = offset
        tops = []
        for token, of_token in zip(tokens, piece.logprobs, strict=True):
            tops.append({token: of_token.logprob} | {self._token(token_id): value for token_id, value in of_token.top})
        values = [of_token.logprob for of_token in piece.logprobs]
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


class ChatFormat(Format):
    """/v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text}
        return {"message": message, "logprobs": self._logprobs(piece), **self._ends(piece)}

    def begin(self, answers: Answers) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        choices = [{"delta": delta, "logprobs": None, **self._ends(Piece(index))} for index in range(self._body.n)]
        return [self._chunk([choice], answers) for choice in choices]

    def delta(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text}, "logprobs": self._logprobs(piece), **self._ends(piece)}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """As this path has them: an object a token."""
        if self._body.num_logprobs is None:
            return None
        content = []
        for token_id, of_token in zip(piece.token_ids, piece.logprobs, strict=True):
            top = [self._one(top_id, value) for top_id, value in of_token.top]
            content.append(self._one(token_id, of_token.logprob) | {"top_logprobs": top})
        return {"content": content}

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._token(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
