"""Record scenarios of vLLM's own scheduler, drawn from seeds, in the format that tests/oracle_vllm.py decides again.

    python tests/record_vllm.py SITE FOLDER [--first 0] [--count 20] [--drafts]
    python tests/oracle_vllm.py FOLDER

SITE is a vLLM wheel unpacked without its binaries, of 0.24 or 0.33, as tests/vllm_world.py takes it. Its scheduler,
KV-cache manager, block pool and requests run as shipped, on a CPU; only the model is missing. Every scenario is another
combination of settings, with a pool that is too small: first come first served or by priority, synchronous or a step
ahead, thresholds, intervals, requests that stop by themselves, aborts before and after a decision. With --drafts, which
0.33 alone has rules for, each has drafts too: by every method, a fixed number or by a table, found and right by a law
drawn for each request.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections import deque
from pathlib import Path
from typing import Any

from oracle_vllm import depth_of, generated_token, prompt_tokens
from vllm_world import give_output, import_vllm, vllm_scheduler

Row = dict[str, Any]


def with_drafts(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """Settings with drafts of some method beside them."""
    most = rng.choice((1, 2, 3, 4, 6, 8))
    methods = ("draft_model", "eagle3", "ngram_gpu" if config["async_scheduling"] else "ngram")
    drafts = {"speculative_method": rng.choice(methods), "num_speculative_tokens": most}
    if rng.random() < 0.3:
        first, second = sorted(rng.sample(range(2, 12), 2))
        rows = [[1, first - 1, most], [first, second, rng.randint(0, most)], [second + 2, 20, rng.randint(0, most + 1)]]
        drafts["num_speculative_tokens_per_batch_size"] = rows[: rng.randint(1, 3)]
    if config["long_prefill_token_threshold"] <= most:  # by which vLLM cannot cut an admission that it has padded
        config.pop("long_prefill_token_threshold_adaptive", None)
    return config | drafts


def drawn_config(rng: random.Random, is_old: bool) -> dict[str, Any]:
    """Settings of a scenario; of 0.24's without those that it has not."""
    seqs = rng.choice((4, 8, 16, 32))
    config = {
        "block_size": rng.choice((8, 16, 16, 32)),
        "num_gpu_blocks": rng.randint(30, 90),
        "max_num_batched_tokens": rng.choice((48, 64, 128, 256, 512)),
        "max_num_seqs": seqs,
        "max_model_len": rng.choice((220, 4096)),
        "enable_prefix_caching": rng.random() < 0.8,
        "enable_chunked_prefill": True,
        "long_prefill_token_threshold": rng.choice((0, 0, 17, 40, 100)),
        "policy": rng.choice(("fcfs", "priority")),
        "scheduler_reserve_full_isl": rng.random() < 0.7,
        "watermark": rng.choice((0.0, 0.0, 0.05)),
        "async_scheduling": rng.random() < 0.6,
    }
    if not is_old:
        if config["async_scheduling"] and rng.random() < 0.3:
            config["pipeline_parallel_size"] = rng.choice((2, 3))
        if rng.random() < 0.3:
            config["long_prefill_token_threshold_adaptive"] = True
        if rng.random() < 0.5:
            config["prefill_schedule_interval"] = rng.choice((2, 3, 5))
        if rng.random() < 0.3:
            config["max_num_active_seqs"] = rng.randint(2, seqs)
    return config


def drawn_requests(rng: random.Random, config: dict[str, Any]) -> list[Row]:
    """Requests that share texts, follow one another, stop by themselves and are taken out; each fits the pool alone."""
    most = config.get("num_speculative_tokens", 0)
    room = min((config["num_gpu_blocks"] - 1) * config["block_size"] - 2 * most, config["max_model_len"] - 1) - 8
    rows: list[Row] = []
    step = 0
    for number in range(rng.randint(25, 45)):
        step += rng.choice((0, 0, 0, 1, 2, 8))
        out = rng.randint(1, min(90, room // 2))
        longest = room - (0 if config["max_model_len"] < 1000 and rng.random() < 0.3 else out)
        parts = [["t", 1000 + number, rng.randint(1, min(160, longest))]]
        if rng.random() < 0.5:
            parts = [["t", rng.randint(1, 3), rng.randint(1, 80)], *parts]
        if rows and rng.random() < 0.3:  # a next turn
            other = rng.choice(rows)
            parts = [*other["prompt"], ["o", other["request"], other["out"]], *parts]
        is_again = most > 0 and bool(rows) and rng.random() < 0.3
        if is_again:
            parts = rng.choice(rows)["prompt"]
        kept: list[list[Any]] = []
        for kind, which, length in parts:
            left = longest - sum(part[2] for part in kept)
            if min(length, left) > 0:
                kept.append([kind, which, min(length, left)])
        if is_again:  # so that all but the last token can be in the cache
            kept[-1][2] = max(1, kept[-1][2] - (sum(part[2] for part in kept) - 1) % config["block_size"])
        row = {"request": number, "at": step, "out": out, "prio": rng.randint(0, 3)}
        if rng.random() < 0.2:
            row["stop"] = rng.randint(1, out)
        if rng.random() < 0.15:
            row["abort"] = [step + rng.randint(0, 60), rng.randint(0, 1)]
        rows.append(row | {"len": sum(part[2] for part in kept), "prompt": kept})
    return rows


class Recording:
    """A scenario on its way through vLLM's scheduler.

    Args:
        rng: draws how many drafts are found, and how many of them are right.

    Attributes:
        config: as given, and what the method of speculation sets in the scheduler.
        never_computed: hit tokens whose KV no step had written.
        drafts, accepted: scheduled, and right.
    """

    def __init__(self, config: dict[str, Any], requests: list[Row], rng: random.Random):
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        init_none_hash(sha256)
        self._scheduler = vllm_scheduler(AsyncScheduler if config["async_scheduling"] else Scheduler, config)
        self.config, self._rng = config | self._set_by_method(), rng
        ahead = self.config.get("hash_lookahead_tokens", 0)
        self._hasher = get_request_block_hasher(config["block_size"], sha256, *[ahead] * (ahead > 0))
        self._shares = {row["request"]: rng.random() for row in requests} if "speculative_method" in config else {}
        self._block_size, self._depth = config["block_size"], depth_of(config)
        self._is_async = config["async_scheduling"]
        self._coming, self._rows = deque(requests), {str(row["request"]): row for row in requests}
        self._in_flight: deque[tuple[int, Any, list[str], set[str]]] = deque()
        self._preempted: list[int] = []
        self._ended: list[int] = []
        self._were_preempted: set[str] = set()
        self._tables: dict[str, list[int]] = {}
        self._written: dict[int, int] = {}  # of each block so many tokens
        self.never_computed = self.drafts = self.accepted = 0
        self._overheard("_preempt_request", self._preempted)
        self._overheard("_free_request", self._ended)

    def _set_by_method(self) -> dict[str, int]:
        """What the method of speculation sets in vLLM's scheduler, as the header of a scenario names it."""
        config = self._scheduler.vllm_config.speculative_config
        if config is None:
            return {}
        return {
            "num_lookahead_tokens": self._scheduler.num_lookahead_tokens,
            "draft_slots": config.max_num_new_slots_for_drafting,
            "hash_lookahead_tokens": self._scheduler.num_hash_lookahead_tokens,
        }

    def _overheard(self, name: str, numbers: list[int]) -> None:
        """Have a list take the requests that a method of the scheduler is called for."""
        method = getattr(self._scheduler, name)

        def heard(request: Any, *args: Any, **options: Any) -> Any:
            numbers.append(int(request.request_id))
            return method(request, *args, **options)

        setattr(self._scheduler, name, heard)

    def steps(self) -> list[Row]:
        """Every step until all requests have ended and all outputs are processed."""
        found, number = [], 0
        while self._coming or self._scheduler.requests or self._in_flight:
            if not self._scheduler.requests and not self._in_flight:
                number = max(number, self._coming[0]["at"])
            row = self._step(number)
            if row is not None:
                found.append(row)
            number += 1
        return found

    def _step(self, number: int) -> Row | None:
        scheduler = self._scheduler
        while self._coming and self._coming[0]["at"] <= number:
            scheduler.add_request(self._request(self._coming.popleft()))
        aborted = self._abort(number, 0)
        had_requests = bool(scheduler.requests)
        row = {"step": number} | self._decide(number)
        aborted += self._abort(number, 1)
        if aborted:
            row["abo"] = aborted
        self._ended.clear()
        processed = None
        if self._in_flight and self._in_flight[0][0] == number - self._depth:
            processed, got, proposed = self._process(*self._in_flight.popleft())
            row |= {"got": got, "prop": proposed} if self._shares else {}
        if self._is_async:
            row["upd"] = processed
        row |= {"fin": list(self._ended), "free_end": scheduler.kv_cache_manager.block_pool.get_num_free_blocks()}
        return row if had_requests or processed is not None or aborted else None

    def _request(self, row: Row) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        stops = [generated_token(row["request"], row["stop"] - 1)] if "stop" in row else None
        return Request(
            request_id=str(row["request"]),
            prompt_token_ids=prompt_tokens(row["prompt"]),
            sampling_params=SamplingParams(max_tokens=row["out"], ignore_eos=True, stop_token_ids=stops),
            pooling_params=None,
            arrival_time=float(row["request"]),
            priority=row["prio"],
            block_hasher=self._hasher,
        )

    def _abort(self, number: int, place: int) -> list[list[int]]:
        from vllm.v1.request import RequestStatus

        names = [
            name
            for name, row in self._rows.items()
            if row.get("abort") == [number, place] and name in self._scheduler.requests
        ]
        for name in names:
            self._scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        return [[int(name), place] for name in names]

    def _decide(self, number: int) -> Row:
        scheduler, pool = self._scheduler, self._scheduler.kv_cache_manager.block_pool
        self._preempted.clear()
        output = scheduler.schedule()
        scheduler.get_grammar_bitmask(output)
        scheduled = output.num_scheduled_tokens
        starts = {name: scheduler.requests[name].num_computed_tokens - n for name, n in scheduled.items()}
        self._were_preempted.update(map(str, self._preempted))
        for name in map(str, self._preempted):
            self._tables.pop(name, None)
        admitted = [name for name in scheduled if name not in self._tables]
        grown = []
        for name in scheduled:
            (table,) = scheduler.kv_cache_manager.get_block_ids(name)
            known = len(self._tables.get(name, ()))
            if name in admitted:
                known = starts[name] // self._block_size
                grown.append([int(name), list(table)])
            elif len(table) > known:
                grown.append([int(name), list(table[known:])])
            self._written |= dict.fromkeys(table[known:], 0)
            self._tables[name] = list(table)
        grown.sort(key=lambda entry: str(entry[0]) in admitted)
        for name, n in scheduled.items():
            self._write(self._tables[name], starts[name], n)
        for name in admitted:  # of what the step computes itself as well
            self._count_hits(self._tables[name][: starts[name] // self._block_size])
        if scheduled:
            sampling = [name for name in scheduled if not scheduler.requests[name].is_prefill_chunk]
            padded = {name for name in admitted if name in output.scheduled_spec_decode_tokens}
            self._in_flight.append((number, output, sampling, padded))
        drafts = [[int(name), len(own)] for name, own in output.scheduled_spec_decode_tokens.items() if own]
        self.drafts += sum(count for _, count in drafts)
        places = {int(name): place for place, name in enumerate(scheduled)}
        return {
            "sched": [[int(name), n, starts[name]] for name, n in scheduled.items()],
            **({"spec": sorted(drafts, key=lambda entry: places[entry[0]])} if self._shares else {}),
            "pre": list(self._preempted),
            "adm": [[int(name), starts[name], int(name in self._were_preempted)] for name in admitted],
            "free": pool.get_num_free_blocks(),
            "run": len(scheduler.running),
            "wait": len(scheduler.waiting) + len(getattr(scheduler, "skipped_waiting", ())),
            "blk": grown,
        }

    def _count_hits(self, blocks: list[int]) -> None:
        self.never_computed += sum(self._block_size - self._written.get(block, 0) for block in blocks)

    def _write(self, table: list[int], start: int, num_tokens: int) -> None:
        """A step computes so many tokens of a request, in order."""
        for place in range(start // self._block_size, -(-(start + num_tokens) // self._block_size)):
            filled = min(self._block_size, start + num_tokens - place * self._block_size)
            self._written[table[place]] = max(self._written.get(table[place], 0), filled)

    def _process(
        self, number: int, output: Any, sampling: list[str], padded: set[str]
    ) -> tuple[int, list[list[int]], list[list[int]]]:
        """Have the output of a step processed; its number, what its requests made and kept, and what is drafted."""
        scheduler, drafts = self._scheduler, output.scheduled_spec_decode_tokens
        made = {name: 1 + self._right(name, 0 if name in padded else len(drafts.get(name, ()))) for name in sampling}
        live = [name for name in output.num_scheduled_tokens if name in sampling and name in scheduler.requests]
        requests = {name: scheduler.requests[name] for name in live}
        before = {name: request.num_output_tokens for name, request in requests.items()}
        give_output(scheduler, output, sampling, generated_token, made.__getitem__)
        got = [[int(name), made[name], requests[name].num_output_tokens - before[name]] for name in live]
        for name in map(str, self._ended):
            self._tables.pop(name, None)
        proposed = [] if self._is_async or not self._shares else self._hand_over(output, sampling)
        return number, got, proposed

    def _right(self, name: str, drafts: int) -> int:
        """Of so many drafts of a request those that are right; where decisions run ahead, at times fewer were found."""
        found = self._rng.randint(0, drafts) if self._is_async and self._rng.random() < 0.2 else drafts
        right = 0
        while right < found and self._rng.random() < self._shares[int(name)]:
            right += 1
        self.accepted += right
        return right

    def _hand_over(self, output: Any, sampling: list[str]) -> list[list[int]]:
        """Hand drafts over behind a step, to chunks of prompts too; those of requests that sampled and go on."""
        from vllm.v1.outputs import DraftTokenIds

        most, rng = output.num_spec_tokens_to_schedule, self._rng
        found = {name: rng.choice((most, most, rng.randint(0, most))) for name in output.num_scheduled_tokens}
        tokens = [[1] * count for count in found.values()]
        self._scheduler.update_draft_token_ids(DraftTokenIds([*found], tokens))
        heard = [name for name in found if name in sampling and name in self._scheduler.requests and found[name]]
        return [[int(name), found[name]] for name in heard]


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("site", type=Path)
    parsing.add_argument("folder", type=Path)
    parsing.add_argument("--first", type=int, default=0, help="the first seed")
    parsing.add_argument("--count", type=int, default=20, help="how many seeds")
    parsing.add_argument("--drafts", action="store_true", help="speculative decoding beside the rest")
    arguments = parsing.parse_args()
    import_vllm(arguments.site)
    from vllm.version import __version__ as version

    arguments.folder.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.first, arguments.first + arguments.count):
        rng = random.Random(seed)
        config = drawn_config(rng, version.startswith("0.24"))
        config = with_drafts(rng, config) if arguments.drafts else config
        requests = drawn_requests(rng, config)
        recording = Recording(config, requests, rng)
        steps = recording.steps()
        totals = {
            "steps": len(steps),
            "preemptions": sum(len(step["pre"]) for step in steps),
            "hits": sum(hit for step in steps for _, hit, _ in step["adm"]),
            "aborts": sum(len(step.get("abo", ())) for step in steps),
            "hit_tokens_never_computed": recording.never_computed,
        } | ({"drafts": recording.drafts, "accepted": recording.accepted} if arguments.drafts else {})
        header = {"format": "vllm-scheduler-oracle/1", "name": f"seed_{seed}", "vllm": version}
        header["config"] = recording.config
        lines = [header | {"requests": len(requests), "totals": totals}, *requests, *steps]
        path = arguments.folder / f"seed_{seed:04}.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode(), mtime=0))
        print(f"{path.name} {totals}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
