"""The metrics page: vLLM's names and meanings, and the same under our own prefix."""

from __future__ import annotations

import copy
import time
from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twinserve.policies import Batch, Core, CoreListener, Sequence
from twinserve.policies.block_manager import ENDLESS
from twinserve.settings.build_core import Settings
from twinserve.traces.runs.metrics import SERVED

PREFIX, OWN_PREFIX = "vllm:", "twinserve:"

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_GAPS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_PREEMPTIONS = (0, 1, 2, 5, 10, 20, 50, 100)
_HTTP = (0.1, 0.5, 1)
_PROBES = ("/metrics", "/health", "/ping", "/version")
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class _UnderBothNames(Collector):
    """Each metric of a registry under vLLM's name and under ours."""

    def __init__(self, registry: CollectorRegistry):
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            yield metric
            own = copy.copy(metric)
            own.name = metric.name.replace(PREFIX, OWN_PREFIX)
            own.samples = [sample._replace(name=sample.name.replace(PREFIX, OWN_PREFIX)) for sample in metric.samples]
            yield own


class _Gaps(Collector):
    """A histogram, under several names, of values that come many at a time; prometheus_client's own takes one."""

    def __init__(self, names: dict[str, str], labels: dict[str, str], buckets: tuple[float, ...]):
        self._names, self._labels, self._bounds = names, labels, buckets
        self._counts, self._sum = [0] * (len(buckets) + 1), 0.0

    def add(self, value: float, count: int) -> None:
        """Take in a value that came so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        for name, text in self._names.items():
            family = HistogramMetricFamily(PREFIX + name, text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), buckets, self._sum)
            yield family


class _DraftCounters:
    """What came of drafts. As in vLLM, those of a request that had ended before their step did count for nothing, and
    padding counts as drafts that were wrong.

    Args:
        counter: makes one of a name, a text and its own labels.
        most: drafts of a row.
    """

    def __init__(self, counter: Callable[..., Counter], most: int):
        self._rows = counter("spec_decode_num_drafts", "Rows with draft tokens.")
        self._tokens = counter("spec_decode_num_draft_tokens", "Draft tokens that were computed.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Those of them that were right.")
        name, text = "spec_decode_num_accepted_tokens_per_pos", "Those that were right, by position in their row."
        self._by_position = [counter(name, text, position=str(position)) for position in range(most)]

    def add(self, batch: Batch) -> None:
        """Take in a step that has ended."""
        for seq, made, kept in batch.runs:
            if kept:
                self._rows.inc()
                self._tokens.inc(batch.drafts[seq])
                self._accepted.inc(made - 1)
                for counter in self._by_position[: made - 1]:
                    counter.inc()


class HttpMetrics:
    """What comes over HTTP and goes: the names and labels that prometheus-fastapi-instrumentator gives it in vLLM.

    Probes are left out, as there.

    Attributes:
        lag_s: how long after the Core had told of it somebody's answer was read the latest time, in seconds.
    """

    def __init__(self) -> None:
        self.lag_s = 0.0
        self._registry = CollectorRegistry()
        self._requests = Counter("http_requests", "Requests.", ["method", "status", "handler"], registry=self._registry)
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "From a request to the end of its response.",
            ["method", "handler"],
            registry=self._registry,
            buckets=_HTTP,
        )
        name, text = f"{OWN_PREFIX}stream_lag_seconds", "How late streams hear of what is there for them."
        Gauge(name, text, registry=self._registry).set_function(lambda: self.lag_s)

    def page(self) -> bytes:
        """The metrics, in Prometheus' text format."""
        return generate_latest(self._registry)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """`app`, whose requests are counted; the status of one without a response is that of a failure."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in _PROBES:
                await app(scope, receive, send)
                return
            status, begun_s = 500, time.perf_counter()

            async def sent(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, sent)
            finally:
                route = scope.get("route")
                method, handler = scope["method"], "none" if route is None else route.path
                self._requests.labels(method, f"{status // 100}xx", handler).inc()
                self._seconds.labels(method, handler).observe(time.perf_counter() - begun_s)

        return counted


class ServerMetrics(CoreListener):
    """Counts what Core says, in its thread, so that the page says what the record says.

    Times are those of the sequences, in seconds; a token's is the end of the step that sampled it. Latencies are of
    requests that ended by "stop" or "length".

    Args:
        model: the label `model_name`.
        engine: the label `engine`.
    """

    def __init__(self, model: str, engine: str = "0"):
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": engine}
        self._page = CollectorRegistry()
        self._page.register(_UnderBothNames(self._registry))
        ProcessCollector(registry=self._page)
        self._counters: dict[str, Counter] = {}
        self._latest: dict[Sequence, int] = {}
        self._first_hits: dict[Sequence, int] = {}
        """Tokens found when a sequence was admitted for the first time."""
        histogram, counter = self._histogram, self._counter
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts whose first token is there.")
        self._cached_tokens = counter("prompt_tokens_cached", "Those of them that were found in the prefix cache.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._preemptions = counter("num_preemptions", "Preemptions.")
        self._queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        sources = ("local_compute", "local_cache_hit", "external_kv_transfer")
        computed, found, _ = (
            counter("prompt_tokens_by_source", "Prompt tokens by source.", source=source) for source in sources
        )
        self._by_source = computed, found
        self._from_device = counter("prompt_tokens_cached_by_source", "Tokens found, by where.", source="device")
        self._ended = Counter(
            f"{PREFIX}request_success",
            "Requests that have ended, by reason.",
            [*self._labels, "finished_reason"],
            registry=self._registry,
        )
        self._drafts: _DraftCounters | None = None
        self._step_tokens = histogram("iteration_tokens_total", "Tokens of a step.", _STEP_TOKENS)
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        names = ("inter_token_latency_seconds", "time_per_output_token_seconds")
        self._gaps = _Gaps(dict.fromkeys(names, "Between two tokens of an answer."), self._labels, _GAPS)
        self._registry.register(self._gaps)
        self._tpot = histogram("request_time_per_output_token_seconds", "An answer's mean time of a token.", _GAPS)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST)
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first decision.", _REQUEST)
        self._prefill = histogram("request_prefill_time_seconds", "From there to the first token.", _REQUEST)
        self._decode = histogram("request_decode_time_seconds", "From there to the last token.", _REQUEST)
        self._inference = histogram("request_inference_time_seconds", "From decision to the last token.", _REQUEST)
        self._prompts = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._computed = histogram("request_prefill_kv_computed_tokens", "Those that were computed.", _TOKENS)
        self._answers = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._longest = histogram("request_max_num_generation_tokens", "Tokens of the longest answer.", _TOKENS)
        self._preempted = histogram("request_num_preemptions", "Preemptions of a request.", _PREEMPTIONS)
        self._limits = histogram("request_params_max_tokens", "Tokens that a request allows.", _TOKENS)

    def watch(self, cores: Seq[Core], settings: Settings) -> None:
        """Say on the page how full the queues and the pools of `cores` are, those of a fleet together; and what comes
        of drafts, where there are any."""
        if settings.most_drafts:
            self._drafts = _DraftCounters(self._counter, settings.most_drafts)
        schedulers = [core.scheduler for core in cores]

        def usage() -> float:
            pools = [scheduler.block_manager for scheduler in schedulers]
            return sum(pool.num_used_blocks for pool in pools) / sum(pool.num_blocks or ENDLESS for pool in pools)

        for name, text, read in (
            ("num_requests_running", "Requests that run.", lambda: sum(len(one.running) for one in schedulers)),
            ("num_requests_waiting", "Requests that wait.", lambda: sum(len(one.waiting) for one in schedulers)),
            ("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.", usage),
        ):
            gauge = Gauge(PREFIX + name, text, list(self._labels), registry=self._registry)
            gauge.labels(**self._labels).set_function(read)
        by_reason = Gauge(
            f"{PREFIX}num_requests_waiting_by_reason",
            "Requests that wait, by reason: for room, or for something else, which there is not.",
            [*self._labels, "reason"],
            registry=self._registry,
        )
        waiting = by_reason.labels(**self._labels, reason="capacity")
        waiting.set_function(lambda: sum(len(one.waiting) for one in schedulers))
        by_reason.labels(**self._labels, reason="deferred").set(0)
        names = ("block_size", "num_gpu_blocks", "enable_prefix_caching")
        config = {name: str(getattr(settings, name)) for name in names}
        info = Gauge(f"{PREFIX}cache_config_info", "The pool.", [*self._labels, *config], registry=self._registry)
        info.labels(**self._labels, **config).set(1)

    def own_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Say on the page, under our name alone, what `read` gives."""
        gauge = Gauge(OWN_PREFIX + name, text, list(self._labels), registry=self._page)
        gauge.labels(**self._labels).set_function(read)

    def page(self) -> bytes:
        """The page, in Prometheus' text format."""
        return generate_latest(self._page)

    # --- what a CoreListener hears ---

    def ingested(self, seq: Sequence, number: int) -> None:
        self._limits.observe(int(seq.max_tokens))

    def decided(self, batch: Batch) -> None:
        self._preemptions.inc(len(batch.preempted))
        for row in batch.admitted:
            if row.seq not in self._first_hits:
                self._first_hits[row.seq] = row.start
                self._queries.inc(int(row.seq.num_tokens))
                self._hits.inc(row.start)
                self._from_device.inc(row.start)

    def committed(self, batch: Batch) -> None:
        if batch.num_tokens:
            self._step_tokens.observe(batch.num_tokens)
        if self._drafts is not None:
            self._drafts.add(batch)
        kept = {seq: number for seq, _, number in batch.runs}
        latest, now_ns = self._latest, batch.end_ns or 0
        gaps: Counts[int] = Counts()
        for seq in batch.sampled:
            if seq.finish_ns is not None:
                continue
            before_ns, latest[seq] = latest.get(seq), now_ns
            number = kept.get(seq, 1)
            if number > 1:
                gaps[0] += number - 1
            if before_ns is not None:
                gaps[now_ns - before_ns] += 1
            else:
                self._generation_tokens.inc()
                found = self._first_hits[seq]
                self._prompt_tokens.inc(int(seq.num_prompt_tokens))
                self._cached_tokens.inc(found)
                self._by_source[0].inc(int(seq.num_prompt_tokens) - found)
                self._by_source[1].inc(found)
                self._ttft.observe(((seq.first_token_ns or now_ns) - seq.arrival_ns) / 1e9)
        for gap_ns, count in gaps.items():
            self._gaps.add(gap_ns / 1e9, count)
            self._generation_tokens.inc(count)

    def finished(self, seq: Sequence) -> None:
        self._latest.pop(seq, None)
        cached = self._first_hits.pop(seq, 0)
        self._ended.labels(**self._labels, finished_reason=str(seq.finish_reason)).inc()
        if seq.finish_reason not in SERVED:
            return
        times = seq.arrival_ns, seq.first_scheduled_ns or 0, seq.first_token_ns or 0, seq.finish_ns or 0
        arrival, scheduled, first, last = (ns / 1e9 for ns in times)
        self._e2e.observe(last - arrival)
        self._queue.observe(scheduled - arrival)
        self._prefill.observe(first - scheduled)
        self._decode.observe(last - first)
        self._inference.observe(last - scheduled)
        self._prompts.observe(int(seq.num_prompt_tokens))
        self._computed.observe(int(seq.num_prompt_tokens) - cached)
        self._answers.observe(seq.num_completion_tokens)
        self._longest.observe(seq.num_completion_tokens)
        self._preempted.observe(int(seq.num_preemptions))
        if seq.num_completion_tokens > 1:
            self._tpot.observe((last - first) / (seq.num_completion_tokens - 1))

    def _counter(self, name: str, text: str, **more: str) -> Counter:
        """A counter with the page's labels, and more; of one name, those of other values of `more` are the same."""
        labels = self._labels | more
        if name not in self._counters:
            self._counters[name] = Counter(PREFIX + name, text, list(labels), registry=self._registry)
        return self._counters[name].labels(**labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, list(self._labels), registry=self._registry, buckets=buckets).labels(
            **self._labels
        )
