"""RecordingScheduler: vLLM's scheduler, 0.24's or 0.33's, that writes what it was told, decided and knew to a journal.

The journal holds no text and no token: of a prompt its length, and with which earlier request it begins alike, by the
hashes of whole blocks. A step pays for noting what was decided; `JournalWriter` makes lines of the notes in a thread of
its own, and hands them to the system once a second. `twinserve replay` reads its folder.
"""

from __future__ import annotations

import weakref
from collections import deque
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request
from vllm.version import __version__ as vllm_version

from twinserve.settings.errors import InputError
from twinserve.traces.runs.journal_writer import JournalWriter
from twinserve.traces.runs.vllm_journal import NEWER_SCHEDULING, SCHEDULING
from twinserve.vllm.mount import options_of

_MOST_STEPS = 1_000_000
_NOWHERE = deque[tuple](maxlen=0).append


class RecordingScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler, which decides what it would, and writes a journal into the folder `record` of
    `--additional-config`'s "twinserve", of `most_steps` steps at most."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **options: Any):
        super().__init__(vllm_config, kv_cache_config, *args, **options)
        chosen = options_of(vllm_config)
        if "record" not in chosen:
            raise InputError("is missing, expected a new folder", field="additional_config.twinserve.record")
        most = chosen.get("most_steps", _MOST_STEPS)
        if type(most) is not int or most < 1:
            field = "additional_config.twinserve.most_steps"
            raise InputError("expected a whole number from 1", field=field, value=most)
        hashed_tokens = int(getattr(self, "hash_block_size", None) or self.block_size)  # 0.24 hashes whole blocks
        settings = settings_of(vllm_config, self.block_size)
        self._journal = JournalWriter(Path(chosen["record"]), settings, hashed_tokens, most)
        self._note, self._num_free = self._journal.note, self.kv_cache_manager.block_pool.get_num_free_blocks
        self._before: dict[str, int] = {}
        self._preempted: list[str] = []
        self._left: list[tuple[str, Any, list[Any]]] = []  # with the output that is being taken, or by an abort
        weakref.finalize(self, self._journal.close)  # also when the process ends and nobody shuts it down

    def add_request(self, request: Request, *args: Any, **options: Any) -> None:
        limits, hashes = (request.num_prompt_tokens, request.max_tokens, request.priority), list(request.block_hashes)
        super().add_request(request, *args, **options)
        self._note(("q", request.request_id, perf_counter_ns(), *limits, hashes))

    def schedule(self, *args: Any) -> Any:
        begun = perf_counter_ns()
        output = super().schedule(*args)
        ended = perf_counter_ns()
        scheduled, changes = output.num_scheduled_tokens, None
        if scheduled != self._before:
            scheduled = self._before = scheduled.copy()
            cached, admitted = output.scheduled_cached_reqs, output.scheduled_new_reqs
            if admitted:
                admitted = [(new.req_id, new.num_computed_tokens) for new in admitted]
            changes = scheduled, cached.req_ids.copy(), cached.num_computed_tokens.copy(), admitted
        preempted = tuple(self._preempted)
        if preempted:
            self._preempted.clear()
        counts = len(self.waiting), len(self.running), self._num_free(), output.total_num_scheduled_tokens
        self._note(("s", id(output), begun, ended, changes, preempted, counts))
        if not self._journal.is_open:
            self._note = _NOWHERE
        return output

    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        """vLLM asks for it once it has launched the model of a step."""
        self._note(("l", id(scheduler_output), perf_counter_ns()))
        return super().get_grammar_bitmask(scheduler_output)

    def update_from_output(self, scheduler_output: Any, *args: Any) -> Any:
        begun = perf_counter_ns()
        found = super().update_from_output(scheduler_output, *args)
        num_outputs = 0
        for one in found.values():
            num_outputs += len(one.outputs)
        left = tuple(self._left)
        if left:
            self._left.clear()
        self._note(("u", id(scheduler_output), begun, perf_counter_ns(), num_outputs, left))
        return found

    def finish_requests(self, *args: Any, **options: Any) -> Any:
        by_output = len(self._left)
        found = super().finish_requests(*args, **options)
        if len(self._left) > by_output:
            self._note(("a", perf_counter_ns(), self._left[by_output:]))
            del self._left[by_output:]
        return found

    def shutdown(self, *args: Any, **options: Any) -> Any:
        self._journal.close()
        return super().shutdown(*args, **options)

    def _preempt_request(self, request: Request, *args: Any, **options: Any) -> None:
        self._preempted.append(request.request_id)
        super()._preempt_request(request, *args, **options)

    def _free_request(self, request: Request, *args: Any, **options: Any) -> Any:
        self._left.append((request.request_id, request.get_finished_reason(), list(request.block_hashes)))
        return super()._free_request(request, *args, **options)


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
