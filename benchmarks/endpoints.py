"""An OpenAI-compatible server, and the requests of a workload streamed from it in real time."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

from http_load import Streamed, scraped, stream
from served import Row, row

from twinserve.settings.errors import InputError, RunError
from twinserve.settings.garbage import rare_collections
from twinserve.traces.request import Request, TokenMaker
from twinserve.traces.requests import as_requests
from twinserve.worlds.workload import Workload

QUEUE = "vllm:request_queue_time_seconds"
WAIT_S = 30.0
"""How long a server may take to say what it serves."""

EVENTS_OF_A_WHOLE = 3
"""The answer, its usage, and the end."""


class Endpoint:
    """A server at a URL.

    Args:
        url: with or without the "/v1" at its end.
        key: for a server that asks for one.

    Attributes:
        model: the name of the first model that it serves.
        name: who it is, as far as it says so, with its version.

    Raises:
        InputError: it cannot be reached, or does not say which model it serves.
    """

    def __init__(self, url: str, key: str | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        try:
            served = self._get("/v1/models")["data"][0]
            self.model = str(served["id"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            problem = f"expected a server that names its model at {self.url}/v1/models: {error!r}"
            raise InputError(problem, field="url", value=url) from error
        try:
            version = f" {self._get('/version')['version']}"
        except (OSError, ValueError, LookupError, TypeError):  # which is vLLM's path, and not OpenAI's
            version = ""
        self.name = str(served.get("owned_by") or "endpoint") + version

    @property
    def shape(self) -> str:
        """The last part of the model's name, as that of a folder or of a hub id."""
        return Path(self.model).name

    def _get(self, path: str) -> Any:
        asked = urllib.request.Request(self.url + path, headers=self._headers)
        with urllib.request.urlopen(asked, timeout=WAIT_S) as response:
            return json.load(response)

    def body(self, request: Request, tokens: TokenMaker, salt: str) -> dict[str, Any]:
        """What is sent for a request: its prompt's tokens, and as many tokens asked for as it has, whatever they are.

        Token ids are asked for, as a token whose text is not sure yet is no event otherwise.

        Args:
            salt: another one, and no block of KV is shared with what was sent before, where the server knows salts.
        """
        return {
            "model": self.model,
            "prompt": tokens.token_ids(request, {}),
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_salt": salt + request.salt,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }

    def check(self, workload: Workload, tokens: TokenMaker, salt: str) -> None:
        """Have it serve the first request of a workload, by which it becomes warm.

        Raises:
            InputError: requests wait for answers, whose tokens are not known here.
            RunError: it does not serve it, or does not say how many tokens it has generated.
        """
        if any(request.after is not None for request in as_requests(workload.requests).others.values()):
            raise InputError("expected a trace without turns: a server's answers are read as text", field="trace")
        request = workload.requests[0]
        streamed = asyncio.run(self._stream(self.body(request, tokens, salt)))
        if not streamed.is_whole:
            problem = f"{self.url} does not serve a prompt of {request.prompt_tokens} tokens"
            raise RunError(f"{problem}: {streamed.refusal}")
        if streamed.output_tokens is None:
            raise RunError(f"{self.url} does not say how many tokens it generates: expected usage in its stream")

    async def _stream(self, body: dict[str, Any]) -> Streamed:
        try:
            return await stream(self.url, body, headers=self._headers)
        except OSError as error:
            return Streamed(time.perf_counter(), head=str(error).encode())

    def serve(self, workload: Workload, tokens: TokenMaker, salt: str) -> tuple[list[Row], dict[str, Any]]:
        """Stream the requests of a workload, each when it is due.

        Returns:
            A row for each, and what is known beside: how late the latest was sent, the events for a token, the mean
            time in the server's queue where it counts that, and what was said in place of the first answer that failed.

        Raises:
            RunError: answers come as wholes, so that nobody sees when their first tokens do.
        """
        bodies = [self.body(request, tokens, salt) for request in workload.requests]
        before, late_s, events = self._queued(), list[float](), list[int]()

        async def one(request: Request, body: dict[str, Any], begun_s: float) -> Row:
            due_s = begun_s + request.arrival_ns / 1e9
            await asyncio.sleep(due_s - time.perf_counter())
            sent_s = time.perf_counter()
            late_s.append(sent_s - due_s)
            streamed = await self._stream(body)
            events.append(streamed.events)
            return _row(request, begun_s, sent_s, streamed)

        async def all_of_them() -> list[Row]:
            begun_s = time.perf_counter()
            return await asyncio.gather(*(one(*pair, begun_s) for pair in zip(workload.requests, bodies, strict=True)))

        with rare_collections:
            rows = asyncio.run(all_of_them())
        generated = [row["output_tokens"] for row in rows]
        if max(generated) > 1 and max(events) <= EVENTS_OF_A_WHOLE:
            raise RunError(f"{self.url} sends answers as wholes: expected an event for a token")
        beside: dict[str, Any] = {"sent_late_s": max(late_s), "events_per_token": sum(events) / max(sum(generated), 1)}
        beside["queue_s"] = {"mean": mean_of(before, self._queued())}
        failures = [row["refusal"] for row in rows if row["refusal"] is not None]
        return rows, beside | ({"first_failure": failures[0]} if failures else {})

    def _queued(self) -> tuple[float, float] | None:
        """Seconds in its queue and the requests that they are of, so far; None where it does not count them."""
        try:
            values = scraped(self.url)
            return values[f"{QUEUE}_sum"], values[f"{QUEUE}_count"]
        except (OSError, ValueError, KeyError):
            return None


def mean_of(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """The mean of what came between two readings of a sum and its count; None where nothing did, or nobody counts."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _row(request: Request, begun_s: float, sent_s: float, streamed: Streamed) -> Row:
    def ns(at_s: float | None) -> int:
        return round(((at_s or 0.0) - begun_s) * 1e9)

    is_served = streamed.is_whole and bool(streamed.output_tokens)
    return row(
        request.id,
        request.prompt_tokens,
        streamed.output_tokens or 0,
        ns(sent_s),
        (ns(streamed.first_s), ns(streamed.last_s)) if is_served else None,
        max_tokens=request.max_tokens,
        refusal=None if is_served else streamed.refusal,
    )
