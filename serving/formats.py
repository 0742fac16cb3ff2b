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
            choices.append(self._with_ids(joined, self.choice(joined, answers)))
        return {**self._head, "object": self.object, "choices": choices, "usage": usage(answers)}

    def begin(self, answers: Answers) -> list[dict[str, Any]]:
        """The chunks before any text."""
        return []

    def chunks(self, piece: Piece, answers: Answers) -> list[dict[str, Any]]:
        """The chunks that say a piece."""
        if not (piece.text or piece.logprobs or piece.finish_reason or self._body.return_token_ids):
            return []
        return [self._chunk([self._with_ids(piece, self.delta(piece))], usage(answers))]

    def end(self, answers: Answers) -> list[dict[str, Any]]:
        """The chunks behind all text."""
        if not self._options.include_usage:
            return []
        return [{**self._head, "object": self.chunk_object, "choices": [], "usage": usage(answers)}]

    def _chunk(self, choices: list[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
        """A chunk of a stream.

        Args:
            used: the tokens so far, said where it is asked for.
        """
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        if self._options.include_usage:
            chunk["usage"] = used if self._options.continuous_usage_stats else None
        return chunk

    def _with_ids(self, piece: Piece, choice: dict[str, Any]) -> dict[str, Any]:
        return choice | ({"token_ids": piece.token_ids} if self._body.return_token_ids else {})

    @abstractmethod
    def choice(self, piece: Piece, answers: Answers) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def delta(self, piece: Piece) -> dict[str, Any]:
        """What a chunk says of an answer."""

    def _ends(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.index, "finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}

    def _of_prompt(self, index: int, answers: Answers) -> list[dict[str, Any] | None]:
        """The log-probabilities of a prompt's tokens, as vLLM says them: by token id, that of the prompt first."""

        def said(token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
            return {"logprob": logprob, "rank": rank, "decoded_token": self._token(token_id)}

        rows: list[dict[str, Any] | None] = []
        for token_id, of_token in zip(*answers.prompt_of(index), strict=True):
            if of_token is None:
                rows.append(None)
                continue
            row = {str(other): said(other, value, rank) for rank, (other, value) in enumerate(of_token.top, 1)}
            rows.append({str(token_id): said(token_id, of_token.logprob, of_token.rank)} | row)
        return rows

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
        self._echoed, self._echoes_alone = echoed, body.echoes_alone
        self._offsets: dict[int, int] = {}
        self._begun: set[int] = set()

    def choice(self, piece: Piece, answers: Answers) -> dict[str, Any]:
        prompt, own = self._echo(piece.index, answers), self._own(piece)
        text, logprobs = prompt.text + own.text, self._logprobs(prompt, own)
        said = {"text": text, "logprobs": logprobs, **self._ends(piece)}
        if self._body.prompt_logprobs is not None:
            said["prompt_logprobs"] = self._of_prompt(piece.index, answers)
        return said

    def chunks(self, piece: Piece, answers: Answers) -> list[dict[str, Any]]:
        chunks = []
        if self._echoed is not None and piece.index not in self._begun:
            self._begun.add(piece.index)
            prompt = self._echo(piece.index, answers)
            said = {"text": prompt.text, "logprobs": self._logprobs(prompt), **self._ends(Piece(piece.index))}
            chunks.append(self._chunk([said], usage(answers)))
        return chunks + super().chunks(piece, answers)

    def delta(self, piece: Piece) -> dict[str, Any]:
        own = self._own(piece)
        return {"text": own.text, "logprobs": self._logprobs(own), **self._ends(piece)}

    def _own(self, piece: Piece) -> Piece:
        """What is said of an answer: nothing where the prompt alone is asked for."""
        return Piece(piece.index) if self._echoes_alone else piece

    def _echo(self, index: int, answers: Answers) -> Piece:
        """The prompt of an answer; nothing without echo."""
        if self._echoed is None:
            return Piece(index)
        token_ids, logprobs = answers.prompt_of(index)
        return Piece(index, self._echoed[index // self._body.n], token_ids, list(logprobs))

    def _logprobs(self, *pieces: Piece) -> dict[str, Any] | None:
        """As this path has them: columns, the top as texts."""
        if self._body.num_logprobs is None:
            return None
        columns: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for piece in pieces:
            offset = self._offsets.get(piece.index, 0)
            for token_id, of_token in zip(piece.token_ids, piece.logprobs, strict=True):
                token, top = self._token(token_id), None
                if of_token is not None:
                    top = {token: of_token.logprob} | {self._token(other): value for other, value in of_token.top}
                columns["text_offset"].append(offset)
                columns["token_logprobs"].append(None if of_token is None else of_token.logprob)
                columns["tokens"].append(token)
                columns["top_logprobs"].append(top)
                offset += len(token)
            self._offsets[piece.index] = offset
        return columns


class ChatFormat(Format):
    """/v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, answers_pieces: list[list[Piece]], answers: Answers) -> dict[str, Any]:
        said = super().whole(answers_pieces, answers)
        return said | ({} if self._body.prompt_logprobs is None else {"prompt_logprobs": self._of_prompt(0, answers)})

    def choice(self, piece: Piece, answers: Answers) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text}
        return {"message": message, "logprobs": self._logprobs(piece), **self._ends(piece)}

    def begin(self, answers: Answers) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        choices = [{"delta": delta, "logprobs": None, **self._ends(Piece(index))} for index in range(self._body.n)]
        nothing_yet = usage(answers) | {"completion_tokens": 0, "total_tokens": answers.num_prompt_tokens}
        return [self._chunk([choice], nothing_yet) for choice in choices]

    def delta(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text}, "logprobs": self._logprobs(piece), **self._ends(piece)}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """As this path has them: an object a token."""
        if self._body.num_logprobs is None:
            return None
        content = []
        for token_id, of_token in zip(piece.token_ids, piece.logprobs, strict=True):
            assert of_token is not None, "an answer's tokens have log-probabilities where one asks"
            top = [self._one(top_id, value) for top_id, value in of_token.top]
            content.append(self._one(token_id, of_token.logprob) | {"top_logprobs": top})
        return {"content": content}

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._token(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
