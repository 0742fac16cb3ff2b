"""The HTTP interface: OpenAI's paths, and vLLM's beside them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from twinserve.engine.chat_template import template_tokens
from twinserve.serving.answers import Answers, Piece
from twinserve.serving.backends import Backend
from twinserve.serving.dispatch import Dispatcher
from twinserve.serving.formats import ChatFormat, CompletionFormat, Format
from twinserve.serving.limits import BodyLimits
from twinserve.serving.messages import Ask
from twinserve.serving.metrics import HttpMetrics
from twinserve.serving.options import ServeOptions
from twinserve.serving.protocol import (
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    Message,
    TokenizeRequest,
    error_body,
)
from twinserve.settings.errors import RunError
from twinserve.traces.runs.record import versions

SESSION_HEADER = "x-session-id"
Made = TypeVar("Made")


class Server:
    """What the paths share: what serves, once it is there, and what it is told.

    Attributes:
        dispatcher: hands asks in; None while what serves is being made, and until then every path says 503.
        http: counts what comes over HTTP from the beginning.
    """

    def __init__(self, options: ServeOptions):
        self.options = options
        self.dispatcher: Dispatcher | None = None
        self.http = HttpMetrics()
        self._sessions: dict[str, int] = defaultdict(lambda: len(self._sessions))

    @property
    def serving(self) -> Dispatcher:
        """What hands asks in.

        Raises:
            ApiError: it is not there yet.
        """
        if self.dispatcher is None:
            raise ApiError("the model is being loaded", HTTPStatus.SERVICE_UNAVAILABLE)
        return self.dispatcher

    @property
    def ready(self) -> Backend:
        """What serves.

        Raises:
            ApiError: it is not there yet.
        """
        return self.serving.backend

    def names(self) -> list[str]:
        """The names of the model."""
        return self.options.served_model_name or [self.ready.name]

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here."""
        if name is not None and name not in self.names():
            raise ApiError(f"The model `{name}` does not exist.", HTTPStatus.NOT_FOUND, "model")

    def encoded(self, prompt: str | list[int], special: bool) -> list[int]:
        """The tokens of a prompt."""
        if not isinstance(prompt, str):
            self.ready.check_prompt(prompt)
            return prompt
        tokenizer = self._tokenizer("prompt")
        try:
            return list(tokenizer.encode(prompt, add_special_tokens=special))
        except Exception as error:  # a tokenizer raises what it likes
            raise ApiError(f"the tokenizer refuses the prompt: {error}", param="prompt") from error

    def decoded(self, token_ids: list[int], param: str) -> str:
        """The text of tokens that a client has sent."""
        tokenizer = self._tokenizer(param)
        self.ready.check_prompt(token_ids)
        try:
            return tokenizer.decode(token_ids, skip_special_tokens=False)
        except Exception as error:
            raise ApiError(f"the tokenizer refuses the tokens: {error}", param=param) from error

    def _tokenizer(self, param: str) -> Any:
        if self.ready.tokenizer is None:
            raise ApiError("expected token ids and no texts, as the model has no tokenizer", param=param)
        return self.ready.tokenizer

    def chat(self, messages: list[Message], **how: Any) -> list[int]:
        """The tokens of a chat, by the model's own template."""
        tokenizer = self.ready.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ApiError("the model has no chat template, expected a call of /v1/completions", param="messages")
        try:
            said = [message.as_template_takes_it() for message in messages]
            token_ids = template_tokens(tokenizer, said, **how)
        except Exception as error:  # a template raises what it likes about the messages
            raise ApiError(f"the chat template refuses the messages: {error}", param="messages") from error
        if not all(type(token_id) is int for token_id in token_ids):
            raise ApiError("expected none that has the template give something else", param="chat_template_kwargs")
        return token_ids

    def asks(self, body: Generation, prompts: list[list[int]], session: str | None) -> list[Ask]:
        """The answers that a body asks for, once it is known that they can be served.

        Raises:
            ApiError: they cannot.
        """
        backend, longest = self.ready, self.ready.max_model_len
        if body.priority and backend.settings.scheduling_policy == "fcfs":
            raise ApiError("priority is served with --scheduling-policy priority alone", param="priority")
        for name, asked in (("logprobs", body.num_logprobs), ("prompt_logprobs", body.num_prompt_logprobs)):
            if (asked or 0) > self.options.max_logprobs:
                raise ApiError(f"{name} is {asked}, expected at most {self.options.max_logprobs}", param=name)
        if body.stops and backend.tokenizer is None:
            raise ApiError("stop strings need a tokenizer, and the model has none", param="stop")
        number = None if session is None else self._sessions[session]
        asks = []
        for prompt in prompts:
            backend.check_prompt(prompt)
            if longest is not None and len(prompt) + (body.token_limit or 1) > longest:
                raise ApiError(
                    f"This model's maximum context length is {longest} tokens; the prompt has {len(prompt)} and "
                    f"{body.token_limit or 1} are asked for.",
                    param="max_tokens" if len(prompt) < longest else "prompt",
                )
            max_tokens = backend.max_tokens(body.token_limit, len(prompt))
            if body.min_tokens > max_tokens:
                raise ApiError(f"min_tokens is {body.min_tokens}, expected at most {max_tokens}", param="min_tokens")
            for choice in range(body.n):
                params = backend.params(body, max_tokens, choice)
                labels = number, body.priority, body.cache_salt or ""
                asks.append(Ask(prompt, params, max_tokens, *labels, body.num_prompt_logprobs))
        self._check_room(len(asks))
        return asks

    def _check_room(self, count: int) -> None:
        """Refuse so many answers if they and those that have not ended are too many."""
        most = self.options.max_num_queued_reqs
        if most is not None and (before := len(self.serving.running)) + count > most:
            problem = f"the queue is full: {before} answers have not ended, {count} more are asked for"
            raise ApiError(f"{problem}, expected at most {most} at a time", HTTPStatus.TOO_MANY_REQUESTS)


class _Keyed:
    """Asks those who call /v1 for one of some keys."""

    def __init__(self, app: ASGIApp, keys: list[str]):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1") and scope["method"] != "OPTIONS":
            given = Headers(scope=scope).get("authorization", "").encode()
            if not any(secrets.compare_digest(given, f"Bearer {key}".encode()) for key in self._keys):
                await JSONResponse({"error": "Unauthorized"}, HTTPStatus.UNAUTHORIZED)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def make_app(server: Server) -> FastAPI:
    """The application."""
    options, own_version = server.options, versions().get("twinserve", "unknown")
    app = FastAPI(title="twinserve", version=own_version)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )

    app.add_middleware(BodyLimits, most_bytes=round(options.max_body_mib * (1 << 20)), seconds=options.client_timeout)
    if options.api_key:
        app.add_middleware(_Keyed, keys=options.api_key)

    app.add_middleware(server.http.middleware)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RunError)
    async def closed(_: Request, error: RunError) -> Response:
        return JSONResponse(error_body(str(error), HTTPStatus.SERVICE_UNAVAILABLE), HTTPStatus.SERVICE_UNAVAILABLE)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            problem = f"the body is not JSON at character {first['loc'][-1]}: {first['ctx']['error']}"
            return JSONResponse(error_body(problem, HTTPStatus.BAD_REQUEST), HTTPStatus.BAD_REQUEST)
        field = ".".join(str(part) for part in first["loc"][1:])
        message = ": ".join(part for part in (field, first["msg"].removeprefix("Value error, ")) if part)
        return JSONResponse(error_body(message, HTTPStatus.BAD_REQUEST, field or None), HTTPStatus.BAD_REQUEST)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        return JSONResponse(error_body(str(error.detail), status), status, error.headers)

    @app.get("/health")
    async def health() -> Response:
        """200 once requests are served."""
        if (error := server.serving.error) is not None:
            raise ApiError(f"the engine has failed: {error}", HTTPStatus.SERVICE_UNAVAILABLE)
        return Response()

    @app.get("/ping")
    @app.post("/ping")
    async def ping() -> Response:
        """As /health."""
        return await health()

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of twinserve."""
        return {"version": own_version}

    @app.get("/metrics")
    async def metrics() -> Response:
        """The metrics page, for Prometheus."""
        page = await server.serving.page()
        return Response(page + server.http.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names of the model."""
        backend = server.ready
        rows = [
            {
                "id": name,
                "object": "model",
                "created": int(time.time()),
                "owned_by": "twinserve",
                "root": backend.name,
                "parent": None,
                "max_model_len": backend.max_model_len,
            }
            for name in server.names()
        ]
        return {"object": "list", "data": rows}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts."""
        server.check_model(body.model)
        prompts = [server.encoded(prompt, body.add_special_tokens) for prompt in body.prompts]
        echoed = None
        if body.echo:
            echoed = [prompt if isinstance(prompt, str) else server.decoded(prompt, "echo") for prompt in body.prompts]
        name = body.model or server.names()[0]
        return await _answer(
            server, body, prompts, CompletionFormat(name, body, server.ready.tokenizer, echoed), request
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a chat."""
        server.check_model(body.model)
        how = {
            "add_generation_prompt": body.add_generation_prompt,
            "continue_final_message": body.continue_final_message,
            **(body.chat_template_kwargs or {}),
        }
        prompt = server.chat(body.messages, **how)
        name = body.model or server.names()[0]
        return await _answer(server, body, [prompt], ChatFormat(name, body, server.ready.tokenizer), request)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text or a chat."""
        server.check_model(body.model)
        if body.messages is not None:
            tokens = server.chat(body.messages, add_generation_prompt=body.add_generation_prompt)
        else:
            tokens = server.encoded(body.prompt or "", body.add_special_tokens)
        texts = None
        if body.return_token_strs:
            texts = [server.ready.tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
        return {
            "count": len(tokens),
            "max_model_len": server.ready.max_model_len,
            "tokens": tokens,
            "token_strs": texts,
        }

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of some tokens."""
        server.check_model(body.model)
        return {"prompt": server.decoded(body.tokens, "tokens")}

    return app


async def _answer(
    server: Server, body: Generation, prompts: list[list[int]], form: Format, request: Request
) -> Response:
    """The response to a request for answers: as they come, or as a whole."""
    asks = server.asks(body, prompts, request.headers.get(SESSION_HEADER))
    answers = Answers(server.serving, asks, body, server.http)
    pieces = answers.pieces()
    if not body.stream:
        return await _unless_gone(request, _whole(form, answers, pieces)) or Response(status_code=499)

    async def begun() -> list[Piece]:
        return await anext(pieces)

    first = await _unless_gone(request, begun())  # what cannot be served says so before the response has begun
    if first is None:
        return Response(status_code=499)
    return StreamingResponse(_events(form, answers, first, pieces), media_type="text/event-stream")


async def _whole(form: Format, answers: Answers, pieces: AsyncGenerator[list[Piece], None]) -> Response:
    collected: dict[int, list[Piece]] = defaultdict(list)
    async with aclosing(pieces):
        async for found in pieces:
            for piece in found:
                collected[piece.index].append(piece)
    whole = form.whole([collected[index] for index in sorted(collected)], answers)
    return Response(orjson.dumps(whole), media_type="application/json")


async def _events(
    form: Format, answers: Answers, first: list[Piece], pieces: AsyncGenerator[list[Piece], None]
) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""

    def events(chunks: Iterable[dict[str, Any]]) -> bytes:
        return b"".join([b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks])

    def said(found: list[Piece]) -> bytes:
        return events(chunk for piece in found for chunk in form.chunks(piece, answers))

    async with aclosing(pieces):
        yield events(form.begin(answers)) + said(first)
        try:
            async for found in pieces:
                if content := said(found):
                    yield content
            if content := events(form.end(answers)):
                yield content
        except ApiError as error:
            yield events([error.body()])
    yield b"data: [DONE]\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Made]) -> Made | None:
    """What `work` gives; None if the client goes away before, and `work` is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    made, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((made, left), return_when=asyncio.FIRST_COMPLETED)
        return made.result() if made.done() else None
    finally:
        made.cancel()
        left.cancel()
        await asyncio.gather(made, left, return_exceptions=True)
