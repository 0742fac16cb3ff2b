"""RecordingScheduler: vLLM's scheduler, 0.24's or 0.33's, that writes what it was told, decided and knew to a journal.

The journal holds no text and no token: of a prompt its length, and with which earlier request it begins alike, by the
hashes of whole blocks. It is a file of lines, handed to the system once a second, so a kill costs the last second.
`twinserve replay` reads its folder.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus
from vllm.version import __version__ as vllm_version

from twinserve.settings.errors import InputError
from twinserve.traces.runs.vllm_journal import FORMAT, JOURNAL, NEWER_SCHEDULING, SCHEDULING
from twinserve.vllm.mount import options_of

_MOST_STEPS = 1_000_000
_MOST_BLOCKS = 1_000_000
_FLUSH_NS = 1_000_000_000


class Journal:
    """Lines of a run, in the order in which things happened; times in whole microseconds since it was opened.

    Args:
        folder: must not exist.
        most_steps: so many are written, then nothing more.

    Raises:
        InputError: the folder exists, or cannot be made.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], most_steps: int = _MOST_STEPS):
        try:
            folder.mkdir(parents=True)
            self._file = (folder / JOURNAL).open("w", encoding="utf-8", buffering=1 << 20)
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", path=folder) from error
        self._begin = self._flushed = perf_counter_ns()
        self._left = most_steps
        self._write("format", FORMAT, settings, time.time())
        self._file.flush()

    def _at(self, when_ns: int) -> int:
        """Microseconds from when the journal was opened to a reading of `perf_counter_ns`."""
        return (when_ns - self._begin) // 1000

    @property
    def is_full(self) -> bool:
        """Is nothing written any more?"""
        return self._left <= 0

    def _write(self, *values: Any) -> None:
        if not self.is_full:
            self._file.write(json.dumps(values, separators=(",", ":")) + "\n")

    def queued(self, number: int, prompt: int, max_tokens: int, priority: int, like: tuple[int, int] | None) -> None:
        """A request came in; `like`: it begins as an earlier one does, for so many tokens."""
        self._write("q", number, self._at(perf_counter_ns()), prompt, max_tokens, priority, like)

    def decided(self, step: int, begun_ns: int, ended_ns: int, changes: str, counts: str) -> None:
        """A decision: when, and as JSON the changes to the one before, and what there was after it."""
        self._file.write(f'["s",{step},{self._at(begun_ns)},{self._at(ended_ns)},{changes},{counts}]\n')
        self._left -= 1
        if ended_ns - self._flushed > _FLUSH_NS:
            self._file.flush()
            self._flushed = perf_counter_ns()

    def known(self, step: int, launched_ns: int, begun_ns: int, num_outputs: int, ended: list[list[Any]]) -> None:
        """When a step had been launched, and its output was known and taken; the requests that ended with it, and
        why."""
        if self._left > 0:
            at, told = self._at, json.dumps(ended) if ended else "[]"
            times = f"{at(launched_ns)},{at(begun_ns)},{at(perf_counter_ns())}"
            self._file.write(f'["u",{step},{times},{num_outputs},{told}]\n')

    def aborted(self, numbers: list[int]) -> None:
        """Requests were taken out."""
        self._write("a", self._at(perf_counter_ns()), numbers)


class RecordingScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler, which decides what it would, and writes a journal into the folder `record` of
    `--additional-config`'s "twinserve", of `most_steps` steps at most."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **options: Any):
        super().__init__(vllm_config, kv_cache_config, *args, **options)
        chosen = options_of(vllm_config)
        if "record" not in chosen:
            raise InputError("is missing, expected a new folder", field="additional_config.twinserve.record")
        most_steps = int(chosen.get("most_steps", _MOST_STEPS))
        self._journal = Journal(Path(chosen["record"]), settings_of(vllm_config, self.block_size), most_steps)
        self._hashed_tokens = int(getattr(self, "hash_block_size", None) or self.block_size)  # 0.24 hashes whole blocks
        self._numbers: dict[str, int] = {}
        self._num_requests = self._num_steps = 0
        self._before: dict[str, int] = {}
        self._preempted: list[int] = []
        self._undone: dict[int, tuple[int, int]] = {}  # outputs in flight: their step, and when it was launched
        self._ended: list[list[Any]] = []  # with the output that is being taken
        self._owners: OrderedDict[Any, int] = OrderedDict()  # of the hashes of blocks, who had one first

    def add_request(self, request: Request, *args: Any, **options: Any) -> None:
        number = self._numbers[request.request_id] = self._num_requests
        self._num_requests += 1
        like = self._alike(request)
        self._own(request, number)
        priority = request.priority
        super().add_request(request, *args, **options)
        self._journal.queued(number, request.num_prompt_tokens, request.max_tokens, priority, like)

    def schedule(self, *args: Any, **options: Any) -> Any:
        begun = perf_counter_ns()
        output = super().schedule(*args, **options)
        ended = perf_counter_ns()
        journal = self._journal
        if not journal.is_full:
            self._undone[id(output)] = self._num_steps, ended
            pool, num_tokens = self.kv_cache_manager.block_pool.get_num_free_blocks(), output.total_num_scheduled_tokens
            counts = f"{self._preempted},{len(self.waiting)},{len(self.running)},{pool},{num_tokens}"
            journal.decided(self._num_steps, begun, ended, self._changes(output), counts)
            self._num_steps += 1
        if self._preempted:
            self._preempted = []
        return output

    def get_grammar_bitmask(self, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        """vLLM asks for it once it has launched the model of a step."""
        key = id(scheduler_output)
        if key in self._undone:
            self._undone[key] = self._undone[key][0], perf_counter_ns()
        return super().get_grammar_bitmask(scheduler_output, *args, **options)

    def update_from_output(self, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        begun = perf_counter_ns()
        found = super().update_from_output(scheduler_output, *args, **options)
        undone = self._undone.pop(id(scheduler_output), None)
        if undone is not None:
            num_outputs = sum([len(one.outputs) for one in found.values()])
            self._journal.known(*undone, begun, num_outputs, self._ended)
        if self._ended:
            self._ended = []
        return found

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> Any:
        names = [request_ids] if isinstance(request_ids, str) else list(request_ids or self.requests)
        live = [self._numbers[name] for name in names if name in self.requests]
        by_output = len(self._ended)
        found = super().finish_requests(names, finished_status)
        del self._ended[by_output:]  # those were aborted
        if live:
            self._journal.aborted(live)
        return found

    def _preempt_request(self, request: Request, *args: Any, **options: Any) -> None:
        self._preempted.append(self._numbers[request.request_id])
        super()._preempt_request(request, *args, **options)

    def _free_request(self, request: Request, *args: Any, **options: Any) -> Any:
        number = self._numbers[request.request_id]
        self._own(request, number)
        self._ended.append([number, str(request.get_finished_reason())])
        return super()._free_request(request, *args, **options)

    def _changes(self, output: Any) -> str:
        """Who of the step before is gone, who is appended with how many tokens from where, and who goes on otherwise
        than with one token; three lists, as JSON."""
        now, before, numbers = output.num_scheduled_tokens, self._before, self._numbers
        if now == before and output.total_num_scheduled_tokens == len(now):
            return "[],[],[]"
        self._before = now
        kept = [name for name in before if name in now]
        gone = [numbers[name] for name in before if name not in now]
        order = list(now)
        place = len(kept)
        if order[:place] != kept:
            place = next(at for at, name in enumerate(kept) if order[at] != name)
            gone += [numbers[name] for name in kept[place:]]
        requests = self.requests
        new = [[numbers[name], now[name], requests[name].num_computed_tokens - now[name]] for name in order[place:]]
        chunks = []
        if output.total_num_scheduled_tokens > len(now):
            chunks = [[numbers[name], now[name]] for name in order[:place] if now[name] != 1]
        return f"{gone},{new},{chunks}"

    def _alike(self, request: Request) -> tuple[int, int] | None:
        """The earlier request with which this one begins alike, and for how many tokens."""
        found = None
        for number, block_hash in enumerate(request.block_hashes, 1):
            owner = self._owners.get(block_hash)
            if owner is None:
                break
            found = owner, number * self._hashed_tokens
        return found

    def _own(self, request: Request, number: int) -> None:
        """Remember whose the blocks of a request are, unless they had an owner."""
        owners = self._owners
        for block_hash in request.block_hashes:
            if block_hash not in owners:
                owners[block_hash] = number
        while len(owners) > _MOST_BLOCKS:
            owners.popitem(last=False)


def settings_of(vllm_config: Any, block_size: int) -> dict[str, Any]:
    """What a step log says of the settings of a vLLM."""
    scheduling, cache = vllm_config.scheduler_config, vllm_config.cache_config
    names = (*SCHEDULING, "policy", *NEWER_SCHEDULING)
    found = {name: getattr(scheduling, name) for name in names if hasattr(scheduling, name)}
    return found | {
        "vllm": vllm_version,
        "max_model_len": vllm_config.model_config.max_model_len,
        "block_size": block_size,
        "enable_prefix_caching": bool(cache.enable_prefix_caching),
        "num_gpu_blocks": cache.num_gpu_blocks,
        "cudagraph_capture_sizes": list(vllm_config.compilation_config.cudagraph_capture_sizes or ()),
    }
