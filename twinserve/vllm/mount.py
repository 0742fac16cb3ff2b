"""MountedScheduler: an order, an admission and a victim rule of ours in vLLM 0.33's own scheduler.

vLLM's scheduler, pool and cache run as they are. Three places of theirs are ours: the waiting queue is an `Order`; what
asks the KV-cache manager for blocks passes by `_Gate`, where the `Admission` may say no; and when a running request is
told no, the `Victim` rule names who goes, by giving it the last rank for as long as vLLM looks for the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.request import Request, RequestStatus
from vllm.version import __version__ as vllm_version

from twinserve.orders import CacheAware
from twinserve.policies import IS_COMPILED, SamplingParams, Sequence, SequenceStatus
from twinserve.policies.orders import Admission, Order
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.settings.own_class import RULES
from twinserve.settings.vllm_versions import NEWEST, nearest_version

_LAST_RANK = 1 << 62


def options_of(vllm_config: Any) -> dict[str, Any]:
    """What stands under "twinserve" in vLLM's `--additional-config`."""
    found = vllm_config.additional_config
    return dict(found.get("twinserve", {})) if isinstance(found, dict) else {}


class Sequences:
    """The Sequence that our rules see of each request: what is known and computed of it, priority, salt and tenant.

    The tenant is `tenant` among the sampling parameters' `extra_args` (`vllm_xargs` over HTTP). Tokens are not copied.
    """

    def __init__(self) -> None:
        self._of: dict[str, Sequence] = {}
        self._requests: dict[int, Request] = {}
        self._num_added = self._num_admitted = 0

    def add(self, request: Request) -> Sequence:
        """Begin to follow a request."""
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        seq = Sequence(
            None,
            SamplingParams(max_tokens=max(1, request.max_tokens)),
            seq_id=self._num_added,
            num_prompt_tokens=request.num_prompt_tokens,
            prefix_key=_no_key,
            arrival_ns=round(request.arrival_time * 1e9),
            priority=request.priority,
            salt=request.cache_salt or "",
            tenant=str(extra.get("tenant", "")),
        )
        seq.arrival_index = self._num_added
        self._num_added += 1
        self._of[request.request_id] = seq
        self._requests[seq.seq_id] = request
        return seq

    def of(self, request: Request) -> Sequence:
        """The Sequence of a request, as the request is now."""
        seq = self._of[request.request_id]
        seq.num_tokens, seq.num_computed_tokens = request.num_tokens, request.num_computed_tokens
        seq.num_in_flight = request.num_output_placeholders
        return seq

    def request_of(self, seq: Sequence) -> Request:
        """The request that a Sequence stands for."""
        return self._requests[seq.seq_id]

    def admitted(self, seq: Sequence) -> None:
        """Number an admission."""
        seq.status, seq.admission_index = SequenceStatus.RUNNING, self._num_admitted
        self._num_admitted += 1

    def is_waiting(self, request: Request) -> bool:
        """Is a request in the queue?"""
        return self._of[request.request_id].status is SequenceStatus.WAITING

    def drop(self, request: Request) -> None:
        """Follow a request no longer."""
        seq = self._of.pop(request.request_id, None)
        if seq is not None:
            del self._requests[seq.seq_id]


def _no_key(num_tokens: int) -> int:
    raise NotImplementedError("vLLM hashes the tokens; a rule in vLLM asks find_hits of its manager")


class OrderQueue(RequestQueue):
    """vLLM's waiting queue in the order of an `Order`."""

    def __init__(self, order: Order, sequences: Sequences, blocks: VllmBlocks):
        self._order, self._sequences, self._blocks = order, sequences, blocks

    def add_request(self, request: Request) -> None:
        self._order.push(self._sequences.add(request))

    def pop_request(self) -> Request:
        seq = self._order.pop_next()
        self._sequences.admitted(seq)
        return self._sequences.request_of(seq)

    def peek_request(self) -> Request:
        """The next one; vLLM looks at one and then takes it, so nothing is looked up anew in between."""
        self._blocks.forget()
        self.refresh()
        return self._sequences.request_of(self._order.peek())

    def prepend_request(self, request: Request) -> None:
        self._order.push_preempted(self._sequences.of(request))

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        seq = self._sequences.of(request)
        self._order.remove(seq)
        seq.status = SequenceStatus.FINISHED
        if request.is_finished():
            self._sequences.drop(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.remove_request(request)

    def refresh(self) -> None:
        """Let those that came back know the tokens that have come since."""
        for seq in self._order:
            if seq.num_preemptions:
                self._sequences.of(self._sequences.request_of(seq))

    def __bool__(self) -> bool:
        return len(self._order) > 0

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Request]:
        return (self._sequences.request_of(seq) for seq in self._order)


class VllmBlocks:
    """What an order or an admission rule may ask of a BlockManager, answered by vLLM's KV-cache manager."""

    def __init__(self, manager: Any, sequences: Sequences, block_size: int):
        self._manager, self._sequences, self.block_size = manager, sequences, block_size
        self._found: dict[int, list[int]] = {}

    @property
    def num_blocks(self) -> int:
        """Usable blocks: all but the null block."""
        return self._manager.block_pool.num_gpu_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """Free blocks, cached ones included."""
        return self._manager.block_pool.get_num_free_blocks()

    @property
    def num_used_blocks(self) -> int:
        """Blocks that some request holds."""
        return self.num_blocks - self.num_free_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def find_hits(self, seq: Sequence) -> list[int]:
        """The cached blocks of the longest prefix, as they were when the queue was looked at."""
        if seq.seq_id not in self._found:
            blocks, _, _ = self._manager.get_computed_blocks(self._sequences.request_of(seq))
            self._found[seq.seq_id] = [block.block_id for block in blocks.blocks[0]]
        return self._found[seq.seq_id]

    def blocks_to_take(self, hits: list[int], num_tokens: int) -> int:
        """Free blocks that a sequence of so many tokens takes up when `hits` are its first blocks."""
        blocks = self._manager.block_pool.blocks
        return self.blocks_for(num_tokens) - sum(blocks[block_id].ref_cnt > 0 for block_id in hits)

    def forget(self) -> None:
        """Look hits up anew from now on."""
        self._found.clear()


class _Gate:
    """vLLM's KV-cache manager, but for who is told no and what happens then."""

    def __init__(self, manager: Any, scheduler: MountedScheduler):
        self._manager, self._scheduler = manager, scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def allocate_slots(self, request: Request, num_new_tokens: int, *args: Any, **options: Any) -> Any:
        """Blocks for a request, or None."""
        if request.status == RequestStatus.RUNNING:
            found = self._manager.allocate_slots(request, num_new_tokens, *args, **options)
            if found is None:
                self._scheduler.choose_victim(request)
            return found
        if self._scheduler.admission is not None:
            if self._scheduler.is_refused(request, num_new_tokens, options.get("new_computed_blocks")):
                return None
            options["full_sequence_must_fit"] = False
        return self._manager.allocate_slots(request, num_new_tokens, *args, **options)


class MountedScheduler(AsyncScheduler):
    """vLLM 0.33's asynchronous scheduler with rules of ours, named under "twinserve" in `--additional-config` as
    settings name them: `scheduling_policy`, `scheduling_ageing`, `admission`, `victim`.

    Raises:
        InputError: another version of vLLM, an unknown option, a class that cannot be used, or a rule that vLLM's
            interface cannot carry beside what else is asked of it.
    """

    kv_cache_manager: Any

    def __init__(self, vllm_config: Any, *args: Any, **options: Any):
        settings = mounted_settings(vllm_config)
        super().__init__(vllm_config, *args, **options)
        self._sequences = Sequences()
        order = settings.build_order()
        self.admission: Admission | None = settings.build_admission() if settings.admission is not None else None
        self._victim = settings.build_victim() or order.victim
        self._ranks: dict[str, int] = {}
        manager = self.kv_cache_manager
        self._blocks = VllmBlocks(manager, self._sequences, self.block_size)
        if hasattr(order, "bind"):
            order.bind(self._blocks)
        self.waiting = OrderQueue(order, self._sequences, self._blocks)
        self.policy = SchedulingPolicy.PRIORITY  # so that the last rank goes, wherever it runs
        self.kv_cache_manager = _Gate(manager, self)

    def choose_victim(self, request: Request) -> None:
        """Give the one that the victim rule chooses the last rank, until it has been preempted."""
        running = [self._sequences.of(other) for other in self.running]
        chosen = self._victim.choose(running, self._sequences.of(request))
        if chosen not in running:
            raise ValueError(f"the victim rule chose {chosen}, expected a running sequence")
        victim = self._sequences.request_of(chosen)
        self._ranks[victim.request_id], victim.priority = victim.priority, _LAST_RANK

    def is_refused(self, request: Request, num_new_tokens: int, hits: Any) -> bool:
        """Does the admission rule say no?"""
        assert self.admission is not None
        block_ids = [] if hits is None else [block.block_id for block in hits.blocks[0]]
        seq = self._sequences.of(request)
        lacking = self.admission.lacks(self._blocks, seq, block_ids, num_new_tokens, not self.running)  # type: ignore[arg-type]
        return lacking > 0

    def _preempt_request(self, request: Request, *args: Any, **options: Any) -> None:
        request.priority = self._ranks.pop(request.request_id, request.priority)
        seq = self._sequences.of(request)
        seq.num_preemptions, seq.status = seq.num_preemptions + 1, SequenceStatus.WAITING
        super()._preempt_request(request, *args, **options)

    def _free_request(self, request: Request, *args: Any, **options: Any) -> Any:
        if not self._sequences.is_waiting(request):  # else vLLM takes it out of the queue afterwards
            self._sequences.drop(request)
        return super()._free_request(request, *args, **options)


def mounted_settings(vllm_config: Any) -> Settings:
    """The rules that a vLLM is told to mount.

    Raises:
        InputError: see `MountedScheduler`.
    """
    if nearest_version(vllm_version) != NEWEST:
        raise InputError(f"expected vLLM {NEWEST} or newer", field="vllm", value=vllm_version)
    given = {name: value for name, value in options_of(vllm_config).items() if name not in ("record", "most_steps")}
    for name in given:
        if name not in (*RULES, "scheduling_ageing"):
            known = ", ".join((*RULES, "scheduling_ageing"))
            raise InputError(f"expected one of {known}", field=f"additional_config.twinserve.{name}", value=given[name])
    settings = Settings.load(given)
    refused = {
        "pipeline_parallel_size > 1": vllm_config.parallel_config.pipeline_parallel_size > 1,
        "kv_transfer_config": vllm_config.kv_transfer_config is not None,
        "speculative_config": vllm_config.speculative_config is not None,
        "lora_config": vllm_config.lora_config is not None,
        "watermark beside admission": settings.admission is not None and vllm_config.scheduler_config.watermark > 0,
        "cache-aware with compiled policies": IS_COMPILED and isinstance(settings.build_order(), CacheAware),
    }
    for name, is_there in refused.items():
        if is_there:
            raise InputError("expected none of it: vLLM's interface cannot carry the rules then", field=name)
    return settings
