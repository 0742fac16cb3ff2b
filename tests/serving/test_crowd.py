"""Two hundred clients at once, of whom many behave badly: none is lost, none is failed, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from live_servers import Running, TinyModel, simulated
from shell import fitted

from twinserve.sim.recorded_steps import features_of
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.traces.runs.replay import replay

MALFORMED = (b"", b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "a", "n": 0}', b'{"prompt": [99999999999]}', b"\xff\xfe{")


class Client:
    """One of the crowd, over a socket of its own.

    Attributes:
        statuses: of the responses that came, by kind of client.
    """

    def __init__(self, running: Running, seed: int, statuses: Counter[tuple[str, int]]):
        host, port = running.url.removeprefix("http://").split(":")
        self.place, self.draws, self.statuses = (host, int(port)), random.Random(seed), statuses

    async def run(self) -> None:
        kinds = ("whole", "streams", "slow", "leaves", "leaves a stream", "half closes", "malformed", "cut")
        kind = self.draws.choice(kinds)
        await asyncio.sleep(self.draws.random() / 2)
        reader, self.writer = await asyncio.open_connection(*self.place)
        try:
            await self._ask(kind)
            status = await self._read(kind, reader)
        finally:
            self.writer.close()
        if status is not None:
            self.statuses[kind, status] += 1

    async def _ask(self, kind: str) -> None:
        is_long = "leaves" in kind or kind == "half closes"
        body: dict[str, Any] = {
            "prompt": "in the beginning " * self.draws.randrange(1, 6),
            "max_tokens": self.draws.randrange(200, 400) if is_long else self.draws.randrange(1, 40),
            "stream": kind in ("streams", "slow", "leaves a stream"),
            "ignore_eos": True,
            "n": self.draws.choice((1, 1, 2)),
        }
        content = self.draws.choice(MALFORMED) if kind == "malformed" else json.dumps(body).encode()
        head = ["POST /v1/completions HTTP/1.1", "host: x", "connection: close", "content-type: application/json"]
        head.append(f"content-length: {len(content) + 20 * (kind == 'cut')}")
        self.writer.write("\r\n".join([*head, "", ""]).encode() + content)
        if kind == "half closes":
            self.writer.write_eof()
        await self.writer.drain()

    async def _read(self, kind: str, reader: asyncio.StreamReader) -> int | None:
        """The status of the answer, once it is there as a whole; None where this client did not wait for it."""
        if kind == "cut":
            return None
        if kind.startswith("leaves"):
            await asyncio.sleep(self.draws.random() / 10)
            return None
        content = b""
        while piece := await reader.read(300 if kind == "slow" else 65536):
            content += piece
            if kind == "slow":
                await asyncio.sleep(0.01)
        if kind == "half closes":
            return None
        status = int(content.split(b" ", 2)[1])
        if kind in ("streams", "slow"):
            assert content.rstrip(b"\r\n0").endswith(b"data: [DONE]")
            assert content.count(b'"finish_reason":"length"') in (1, 2)
        return status


def crowd(running: Running, size: int) -> Counter[tuple[str, int]]:
    """What came of so many clients at once."""
    statuses: Counter[tuple[str, int]] = Counter()

    async def run() -> None:
        await asyncio.gather(*(Client(running, seed, statuses).run() for seed in range(size)))

    asyncio.run(run())
    running.settle()
    return statuses


def record_of(running: Running, path: Path, statuses: Counter[tuple[str, int]]) -> RunRecord:
    """The record, once it is known that nobody was lost."""
    counts = running.stop()
    print(dict(counts), {f"{kind} {status}": count for (kind, status), count in sorted(statuses.items())})
    assert counts["requests"] == sum(count for reason, count in counts.items() if reason != "requests")
    record = load_record(path)
    assert replay(record).is_exact
    assert {row["finish_reason"] for row in record.requests} == {"length", "abort"}
    assert {status for _, status in statuses} == {200, 400}
    assert all(status == (400 if kind == "malformed" else 200) for kind, status in statuses)
    assert {"whole", "streams", "slow", "malformed"} == {kind for kind, _ in statuses}
    return record


@pytest.mark.parametrize("world", [TinyModel, simulated])
def test_a_crowd_that_behaves_badly_loses_nothing_and_fails_nobody(serving, tmp_path, world):
    """That no block is in use at the end, and every queue and pool holds together, the fixture asserts."""
    settings = {"num_gpu_blocks": 40, "max_num_seqs": 24}
    model = TinyModel(settings) if world is TinyModel else simulated(**settings)
    running = serving(model, tmp_path / "run", segment_bytes=50_000)
    record = record_of(running, tmp_path / "run", crowd(running, 200))
    assert sum(row["preemptions"] for row in record.requests) > 0


def test_what_a_step_costs_is_what_its_batch_explains_whoever_behaves_badly(serving, tmp_path):
    running = serving(simulated(num_gpu_blocks=80, max_num_seqs=24), tmp_path / "run")
    record = record_of(running, tmp_path / "run", crowd(running, 200))
    latency = fitted()
    spans = [step["end_ns"] - step["start_ns"] for step in record.steps]
    costs = [latency.step_cost(features).device_ns for features in features_of(record)]
    # A decision that ends requests and lets none run is no step.
    explained = [cost if step["tokens"] else 0 for cost, step in zip(costs, record.steps, strict=True)]
    assert spans == explained and any(spans)
