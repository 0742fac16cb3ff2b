"""One policy file, three worlds: the same decisions in Core and in vLLM's own scheduler, step by step.

    python tests/vllm_world.py SITE [WORKLOAD ...]     a line a policy and workload; exit status 1 if one parts

SITE is a vLLM 0.33 wheel unpacked without its binaries (docs/vllm.md says how), with what it imports. The scheduler,
its KV-cache manager and its block pool run as shipped, on a CPU; only the model is missing, so tokens are made up. One
step is in flight when the next is decided, here as there. Then the recorder: what it wrote is decided again, and what
it costs is measured, on the workloads and on 16, 64 and 256 requests that decode.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from twinserve.policies import SamplingParams, Sequence
from twinserve.settings.build_core import Settings

HERE = Path(__file__).parent


def policies(folder: Path) -> dict[str, dict[str, Any]]:
    """By name, the settings of each policy; fair share is the one of docs/policies.md, as a file in `folder`."""
    page = (HERE.parent / "docs" / "policies.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class FairShare" in block)
    file = folder / "fair_share.py"
    file.write_text(code, encoding="utf-8")
    own = HERE / "own_rules.py"
    return {
        "shortest prompt": {"scheduling_policy": "shortest"},
        "fair share": {"scheduling_policy": f"{file}:FairShare"},
        "cache-aware": {"scheduling_policy": "cache-aware"},
        "roomy, first admitted goes": {"admission": f"{own}:Roomy(spare=3)", "victim": f"{own}:FirstAdmitted"},
    }


@dataclass(frozen=True)
class Arrival:
    """A request: the step before whose decision it comes, its tokens, and what the orders look at."""

    step: int
    number: int
    prompt: list[int]
    max_tokens: int
    tenant: str


@dataclass(frozen=True)
class Workload:
    """Requests, and the engine's settings."""

    name: str
    arrivals: list[Arrival]
    num_blocks: int
    max_num_seqs: int
    budget: int


def workloads() -> list[Workload]:
    """Five, in each of which the pool is too small: bursts, shared prompts, long prompts in chunks, long outputs."""
    made = []
    for number, (name, prompt, output, blocks, seqs, budget) in enumerate(
        (
            ("burst", (20, 200), (10, 120), 70, 12, 256),
            ("shared prompts", (60, 240), (5, 80), 60, 10, 192),
            ("chunks", (200, 700), (5, 60), 90, 8, 128),
            ("long outputs", (8, 60), (80, 300), 60, 16, 128),
            ("dense", (10, 150), (10, 60), 40, 20, 64),
        )
    ):
        rng = random.Random(number)
        systems = [[10_000 * text + at for at in range(64)] for text in (1, 2, 3)]
        arrivals, step = [], 0
        for request in range(60):
            step += rng.choice([0, 0, 0, 1, 3, 9])
            length = rng.randint(*prompt)
            own = [100_000 + 1000 * request + at for at in range(length)]
            tokens = (rng.choice(systems) + own)[: max(length, 1)] if rng.random() < 0.5 else own
            arrivals.append(Arrival(step, request, tokens, rng.randint(*output), f"tenant {rng.randrange(3)}"))
        made.append(Workload(name, arrivals, blocks, seqs, budget))
    return made


def decodes(count: int) -> Workload:
    """Requests that decode side by side, in a pool that is large enough."""
    arrivals = [Arrival(0, i, [1000 * i + at for at in range(32)], 600, "") for i in range(count)]
    return Workload(f"{count} decodes", arrivals, 50 * count, count, 32 * count)


def token(request: int, number: int) -> int:
    """The token that a request generates as its `number`-th one."""
    return 10_000_000 + 1000 * request + number


def give_output(
    scheduler: Any,
    output: Any,
    sampling: list[str],
    token_of: Callable[[int, int], int],
    length_of: Callable[[str], int] = lambda name: 1,
) -> None:
    """Tell vLLM's scheduler what came of a step, in which these requests sample.

    Args:
        token_of: what a request generates, by how many tokens it had generated before.
        length_of: how many tokens came of it.
    """
    from vllm.v1.outputs import ModelRunnerOutput

    names, tokens = list(output.num_scheduled_tokens), []
    for name in names:
        request = scheduler.requests.get(name)
        samples = request is not None and name in sampling
        first, count = (request.num_output_tokens, length_of(name)) if samples else (0, 0)
        tokens.append([token_of(int(name), first + place) for place in range(count)])
    places = {name: place for place, name in enumerate(names)}
    scheduler.update_from_output(
        output, ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=tokens)
    )


Step = dict[str, Any]


def steps_of_core(workload: Workload, policy: dict[str, Any]) -> list[Step]:
    """The decisions of our Core, one step ahead."""
    values = {"max_num_seqs": workload.max_num_seqs, "max_num_batched_tokens": workload.budget}
    values |= {"num_gpu_blocks": workload.num_blocks, "pipeline_depth": 1}
    core = Settings.load(values | policy).build_core()
    coming, steps, in_flight = deque(workload.arrivals), [], deque()
    while coming or core.sequences:
        while coming and coming[0].step <= len(steps):
            one = coming.popleft()
            params = SamplingParams(max_tokens=one.max_tokens, ignore_eos=True)
            seq = Sequence(one.prompt, params, seq_id=one.number, tenant=one.tenant)
            assert core.ingest(seq, 0), seq.refusal
        batch = core.decide(0)
        in_flight.append(batch)
        steps.append(
            {
                "scheduled": [[row.seq.seq_id, row.num_tokens, row.start] for row in batch.rows],
                "preempted": sorted(seq.seq_id for seq in batch.preempted),
                "running": len(core.scheduler.running),
                "waiting": len(core.scheduler.waiting),
                "free": core.scheduler.block_manager.num_free_blocks,
            }
        )
        if len(in_flight) > 1:
            done = in_flight.popleft()
            core.commit([token(seq.seq_id, seq.num_completion_tokens) for seq in done.sampled], 0)
    return steps


def build_vllm(workload: Workload, scheduler_cls: type, options: dict[str, Any]) -> Any:
    """A scheduler of vLLM's with a workload's settings."""
    config = {
        "max_num_seqs": workload.max_num_seqs,
        "max_num_batched_tokens": workload.budget,
        "num_gpu_blocks": workload.num_blocks + 1,
    }
    return vllm_scheduler(scheduler_cls, config, options)


def vllm_scheduler(scheduler_cls: type, config: dict[str, Any], options: dict[str, Any] | None = None) -> Any:
    """A scheduler of vLLM's.

    Args:
        config: vLLM's settings, as the header of a recorded scenario has them; what is left out is vLLM's default.
        options: what stands under "twinserve" in its additional configuration.
    """
    import torch
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        SpeculativeConfig,
        VllmConfig,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    rest = {
        "block_size": 16,
        "enable_prefix_caching": True,
        "max_model_len": 4096,
        "pipeline_parallel_size": 1,
    } | config
    block_size, num_blocks = rest.pop("block_size"), rest.pop("num_gpu_blocks")
    method = rest.pop("speculative_method", None)
    drafts = {name: rest.pop(name) for name in NUMBERS_OF_DRAFTS if name in rest}
    caching, ranks, longest = (
        rest.pop(name) for name in ("enable_prefix_caching", "pipeline_parallel_size", "max_model_len")
    )
    scheduling = SchedulerConfig(
        max_model_len=longest, is_encoder_decoder=False, **{"enable_chunked_prefill": True} | rest
    )
    cache = CacheConfig(block_size=block_size, gpu_memory_utilization=0.9, enable_prefix_caching=caching)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", seed=0, max_model_len=longest)
    parallel = ParallelConfig()
    speculative = None
    if method is not None:
        speculative = SpeculativeConfig(
            method="ngram", target_model_config=model, target_parallel_config=parallel, **drafts
        )
    whole = VllmConfig(
        scheduler_config=scheduling,
        model_config=model,
        cache_config=cache,
        device_config=DeviceConfig(device="cpu"),
        parallel_config=parallel,
        speculative_config=speculative,
        additional_config={"twinserve": options or {}},
    )
    whole.parallel_config.pipeline_parallel_size = ranks  # no rank is asked whether it is there
    if speculative is not None:
        speculative.method = method  # nor a model that drafts
    cache.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    return scheduler_cls(
        vllm_config=whole,
        kv_cache_config=KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(whole),
        block_size=block_size,
        log_stats=False,
    )


NUMBERS_OF_DRAFTS = ("num_speculative_tokens", "num_speculative_tokens_per_batch_size")
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 1000,
    "max_position_embeddings": 100_000,
    "torch_dtype": "float32",
}


class VllmWorld:
    """vLLM's scheduler on a workload; each step is decided with the outputs of so many before it unknown."""

    def __init__(self, workload: Workload, scheduler: Any, steps_ahead: int = 1):
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        init_none_hash(sha256)
        self.scheduler, self._hasher = scheduler, get_request_block_hasher(16, sha256)
        self._coming, self._in_flight, self.steps = deque(workload.arrivals), deque(), list[Step]()
        self._steps_ahead = steps_ahead

    @property
    def is_done(self) -> bool:
        """Have all requests come and ended?"""
        return not self._coming and not self.scheduler.requests

    def run(self) -> list[Step]:
        """Every decision until all have ended."""
        while not self.is_done:
            self.step()
        while self._in_flight:
            self._process(*self._in_flight.popleft())
        return self.steps

    def step(self) -> None:
        """Arrivals, a decision, and the output of the step before."""
        scheduler = self.scheduler
        while self._coming and self._coming[0].step <= len(self.steps):
            scheduler.add_request(self._request(self._coming.popleft()))
        output = scheduler.schedule()
        scheduler.get_grammar_bitmask(output)  # as vLLM does when it has launched the step
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self.steps.append(
            {
                "scheduled": [[int(name), n, computed[name]] for name, n in output.num_scheduled_tokens.items()],
                "preempted": sorted(map(int, output.preempted_req_ids or ())),
                "running": len(scheduler.running),
                "waiting": len(scheduler.waiting),
                "free": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            }
        )
        sampling = [name for name in output.num_scheduled_tokens if not scheduler.requests[name].is_prefill_chunk]
        self._in_flight.append((output, sampling))
        if len(self._in_flight) > self._steps_ahead:
            self._process(*self._in_flight.popleft())

    def _process(self, output: Any, sampling: list[str]) -> None:
        give_output(self.scheduler, output, sampling, token)

    def _request(self, one: Arrival) -> Any:
        from vllm.sampling_params import SamplingParams as VllmParams
        from vllm.v1.request import Request

        params = VllmParams(max_tokens=one.max_tokens, ignore_eos=True, extra_args={"tenant": one.tenant})
        return Request(
            request_id=str(one.number),
            prompt_token_ids=one.prompt,
            sampling_params=params,
            pooling_params=None,
            arrival_time=float(one.number),
            block_hasher=self._hasher,
        )


def first_difference(ours: list[Step], theirs: list[Step]) -> str | None:
    """Step, field and both values where two worlds part first."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        for field, value in one.items():
            if value != other[field]:
                return f"step {number}: {field} is {value}, vLLM's is {other[field]}"
    return None if len(ours) == len(theirs) else f"{len(ours)} steps, vLLM took {len(theirs)}"


class Timed:
    """A world whose scheduler's calls are timed, step by step: for each step the least of several runs."""

    CALLS = ("add_request", "schedule", "get_grammar_bitmask", "update_from_output")

    def __init__(self, workload: Workload, kind: type):
        self._workload, self._kind = workload, kind
        self.least_ns: dict[int, int] = {}
        self.world: VllmWorld

    def begin(self, options: dict[str, Any]) -> None:
        """Begin a run."""
        scheduler = build_vllm(self._workload, self._kind, options)
        for name in self.CALLS:
            setattr(scheduler, name, self._timed(getattr(scheduler, name)))
        self.world = VllmWorld(self._workload, scheduler)

    def step(self) -> None:
        """The next step of the run."""
        number, self._ns = len(self.world.steps), 0
        self.world.step()
        self.least_ns[number] = min(self._ns, self.least_ns.get(number, self._ns))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begun = time.perf_counter_ns()
            try:
                return call(*arguments)
            finally:
                self._ns += time.perf_counter_ns() - begun

        return timed


def watch_recorder(workload: Workload, folder: Path) -> tuple[str, bool]:
    """A run by RecordingScheduler, decided again from its journal; what is found, and whether all is equal.

    What a step costs is found side by side with vLLM's own scheduler, the two in turns step by step, as the sum over
    the steps of the least of nine runs: so what else runs on the machine falls on both, or is left out. The thread that
    writes is told apart: its CPU time.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from twinserve.traces.runs.replay import replay
    from twinserve.traces.runs.vllm_records import load_run
    from twinserve.vllm import RecordingScheduler

    plain, recorded = Timed(workload, AsyncScheduler), Timed(workload, RecordingScheduler)
    writer_s = []
    for number in range(9):
        plain.begin({})
        recorded.begin({"record": str(folder / f"{workload.name}-{number}")})
        gc.collect()
        pair = plain, recorded
        while not plain.world.is_done:
            for timed in pair:
                timed.step()
            pair = pair[::-1]
        writer_s.append(written(recorded.world.scheduler))
    record = load_run(folder / f"{workload.name}-0")
    result = replay(record)
    steps = len(plain.world.steps)
    before, after = (sum(timed.least_ns.values()) / steps / 1e3 for timed in (plain, recorded))
    found = "equal" if result.is_exact else str(result.difference)
    cost = f"{before:.0f} us a step {after - before:+.1f} ({after / before - 1:+.1%})"
    thread = f"its thread {min(writer_s) / steps * 1e6:.1f} us"
    return f"{result.equal:5} of {result.recorded} decisions made again, {cost}, {thread}  {found}", result.is_exact


def written(scheduler: Any) -> float:
    """Have a recorder write what it has noted, and close it; the CPU time of its thread, in seconds."""
    clock = time.pthread_getcpuclockid(scheduler._journal._thread.ident)
    before, begun = time.clock_gettime(clock), time.process_time()
    scheduler.shutdown()  # waits for the thread, and does nothing else
    return before + time.process_time() - begun


def import_vllm(site: str | Path) -> None:
    """Have vLLM be imported from an unpacked wheel, here and where it asks itself about models."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])


def main() -> int:
    site, names = sys.argv[1], sys.argv[2:]
    import_vllm(site)
    from twinserve.vllm import MountedScheduler

    parted = 0
    with tempfile.TemporaryDirectory() as folder:
        for (name, policy), workload in product(policies(Path(folder)).items(), workloads()):
            if names and workload.name not in names:
                continue
            ours = steps_of_core(workload, policy)
            theirs = VllmWorld(workload, build_vllm(workload, MountedScheduler, policy)).run()
            difference = first_difference(ours, theirs)
            preemptions = sum(len(step["preempted"]) for step in ours)
            parted += difference is not None
            told = f"{len(ours):5} steps {preemptions:4} preemptions  {difference or 'equal'}"
            print(f"{name:28} {workload.name:16} {told}", flush=True)
        for workload in [*workloads(), *map(decodes, (16, 64, 256))]:
            if not names or workload.name in names:
                told, is_exact = watch_recorder(workload, Path(folder))
                parted += not is_exact
                print(f"{'recorder':28} {workload.name:16} {told}", flush=True)
    return 1 if parted else 0


if __name__ == "__main__":
    sys.exit(main())
