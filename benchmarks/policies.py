"""What the policies cost: a step's decision and its result, hashing, hits, and many sequences that end at once.

    python benchmarks/policies.py [--json FILE] [--repeats 25] [--quick] [--other NAME=FOLDER ...] [--turns 5]
                                  [--vllm SITE ...]

Microseconds of CPU time on one core, the minimum and the median of the repeats. A decode-only step is `schedule` +
`postprocess` (choosing, block tables, hashing full blocks, checking stops, tokens handed over as the list that the
engine hands over; prefix caching on, no listener). A mixed step is the same beside a prompt of which each step computes
256 tokens. --quick takes fewer repeats and no step of 1,024 sequences.

With --other, other copies of twinserve do the same in turns with the one that is imported, each in a process of its own
on the same core: another commit's checkout, or a compiled wheel, as benchmarks/simulator.py says. Every figure is then
the median of the turns. With --vllm, so do the schedulers of vLLM wheels, as benchmarks/vllm_steps.py says.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from copies import Copy, add_other, medians, policies, stay_on_one_core, with_imported
from environment import ROOT, command, machine
from result_files import write_json

from twinserve.policies import BlockManager, PrefixCache, SamplingParams, Scheduler, Sequence

BLOCK_SIZES = (16, 256)
RUNNING = (1, 16, 64, 256, 1024)
CHUNK = 256
SLOW_MODEL = ROOT / "tests" / "policies" / "slow_model.py"

# Measured by others' own code on a like machine (one core of a shared 2-core VM), block 16 unless said otherwise.
ELSEWHERE: dict[str, dict[str, Any]] = {
    "vLLM 0.24": {
        "source": "vLLM 0.24.0's Scheduler as shipped, schedule + update_from_output, prefix caching on",
        "step_us": {"16": {"1": 18, "16": 139, "64": 524, "256": 2109, "1024": 9186}},
        "hash_mtok_s": 9,
        "hits_on_freed_mtok_s": 17,
    },
    "nano-vllm": {
        "source": "nano-vllm's Scheduler and BlockManager as shipped",
        "step_us": {"16": {"256": 210}, "256": {"256": 178}},
        "hits_on_freed_mtok_s": 0.04,
        "ends_us": 574,
    },
}


def timed(run: Callable[[], Any], repeats: int, per: float, prepare: Callable[[], Any] | None = None) -> dict:
    """Microseconds of CPU time of `run` divided by `per`, after `prepare`, with the garbage collector off."""
    values = []
    for _ in range(repeats):
        if prepare is not None:
            prepare()
        gc.collect()
        gc.disable()
        begun = time.process_time()
        run()
        values.append((time.process_time() - begun) / per * 1e6)
        gc.enable()
    return {"min": min(values), "median": statistics.median(values)}


def sequence(length: int, number: int, max_tokens: int) -> Sequence:
    """A prompt like no other."""
    return Sequence(list(range(number << 16, (number << 16) + length)), SamplingParams(max_tokens=max_tokens))


def decoding(block_size: int, running: int, *, num_steps: int, threshold: int = 0) -> Scheduler:
    """A scheduler in which so many sequences decode, with room for so many steps, their blocks begun at all times."""
    pool = running * ((64 + num_steps) // block_size + 3) + CHUNK * 64 // block_size + 8
    scheduler = Scheduler(
        BlockManager(pool, block_size),
        running + 1,
        composition="mixed",
        max_num_batched_tokens=1 << 30,
        enable_chunked_prefill=True,
        long_prefill_token_threshold=threshold,
        prefix_cache=PrefixCache(),
    )
    for number in range(running):
        assert scheduler.add(sequence(64 + number % block_size, number, num_steps))
    while any(not seq.has_sampled for seq in scheduler.running) or scheduler.waiting:
        batch = scheduler.schedule()
        scheduler.postprocess(batch, [7] * batch.num_sampled, 2)
    return scheduler


def steps(scheduler: Scheduler, count: int, tokens: list[int]) -> None:
    """So many steps, every one of which samples as many tokens."""
    for _ in range(count):
        scheduler.postprocess(scheduler.schedule(), tokens, 2)


def step_costs(repeats: int, running: tuple[int, ...]) -> dict[str, dict[str, dict]]:
    """A decode-only step, by block size and sequences running; whole blocks of steps are run."""
    costs: dict[str, dict[str, dict]] = {}
    for block_size, count in itertools.product(BLOCK_SIZES, running):
        num_steps = max(64, 2 * block_size)
        scheduler = decoding(block_size, count, num_steps=num_steps * (repeats + 1))
        tokens = [100 + number for number in range(count)]
        cost = timed(partial(steps, scheduler, num_steps, tokens), repeats, num_steps)
        costs.setdefault(str(block_size), {})[str(count)] = cost
    return costs


def mixed_costs(repeats: int, running: tuple[int, ...]) -> dict[str, dict[str, dict]]:
    """A step of decodes beside a chunk of a long prompt, by block size and decodes running."""
    costs: dict[str, dict[str, dict]] = {}
    for block_size, count in itertools.product(BLOCK_SIZES, running):
        scheduler = decoding(block_size, count, num_steps=60 * (repeats + 1) + 64, threshold=CHUNK)
        numbers = itertools.count(1 << 20)
        tokens = [100 + number for number in range(count)]

        def prepare(scheduler: Scheduler = scheduler, numbers: Any = numbers) -> None:
            for seq in scheduler.running:
                if not seq.has_sampled:
                    scheduler.abort(seq)
            scheduler.add(Sequence(list(range(CHUNK * 64)), SamplingParams(max_tokens=1), salt=str(next(numbers))))

        cost = timed(partial(steps, scheduler, 60, tokens), repeats, 60, prepare)
        costs.setdefault(str(block_size), {})[str(count)] = cost
    return costs


def ends_costs(repeats: int) -> dict[str, dict]:
    """256 sequences of 320 tokens that end in one step."""
    costs = {}
    for block_size in BLOCK_SIZES:
        made: list[Scheduler] = []

        def prepare(block_size: int = block_size, made: list[Scheduler] = made) -> None:
            manager = BlockManager(256 * (320 // block_size + 2), block_size)
            made[:] = [Scheduler(manager, composition="mixed", prefix_cache=PrefixCache())]
            for number in range(256):
                made[0].add(sequence(317, number, max_tokens=3))
            steps(made[0], 2, [7] * 256)

        def end(made: list[Scheduler] = made) -> None:
            steps(made[0], 1, [7] * 256)

        costs[str(block_size)] = timed(end, repeats, 1, prepare)
    return costs


def rates(repeats: int, pool: int) -> dict[str, float]:
    """Million tokens a second: hashing, and admissions that hit blocks held by another, or free ones.

    A hit is looked up, compared by content and taken; its hashes are made with it or, as when a preempted sequence
    comes back, were made before (`known`).
    """
    found: dict[str, float] = {}
    tokens = list(range(1 << 16))
    for block_size in BLOCK_SIZES:
        cache = PrefixCache()
        packed = array("I", tokens).tobytes()

        def hashing(cache: PrefixCache = cache, size: int = 4 * block_size, packed: bytes = packed) -> None:
            cache.extend_chain([], [], packed, size, -1)

        found[f"hash_{block_size}"] = 1 / timed(hashing, repeats, len(tokens))["min"]
    for held, known in itertools.product((True, False), (False, True)):
        manager = BlockManager(pool, 16)
        manager.allocate_with_cache(owner := Sequence(tokens), manager.prefix_cache or PrefixCache())
        if not held:
            manager.deallocate(owner)
        seqs: list[Sequence] = []

        def prepare(manager: BlockManager = manager, seqs: list[Sequence] = seqs, known: bool = known) -> None:
            for seq in seqs:
                manager.deallocate(seq)
            seqs[:] = [Sequence([*tokens, 1])]
            if known:
                manager.find_hits(seqs[0])

        def hit(manager: BlockManager = manager, seqs: list[Sequence] = seqs) -> None:
            manager.admit(seqs[0], manager.find_hits(seqs[0]), 1)
            assert seqs[0].num_cached_tokens == len(tokens)

        name = f"hits_on_{'live' if held else 'freed'}{'_known' if known else ''}"
        found[name] = 1 / timed(hit, repeats, len(tokens), prepare)["min"]
    return found


def slow_step_us(running: int) -> float | None:
    """A step of the slow model that the tests compare with; None where it is not at hand."""
    if not SLOW_MODEL.exists():
        return None
    spec = importlib.util.spec_from_file_location("slow_model", SLOW_MODEL)
    assert spec is not None and spec.loader is not None
    module = sys.modules["slow_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.SlowModel(module.Rules(num_blocks=running * 8 + 8, max_num_seqs=running))
    for number in range(running):
        tokens = list(range(number << 16, (number << 16) + 64 + number % 16))
        model.add(module.Request(number, tokens, len(tokens), 50, ignore_eos=True))

    def step() -> None:
        model.commit([7] * len(model.decide().sampled))

    step()
    return timed(step, 3, 1)["min"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--quick", action="store_true")
    add_other(parser)
    parser.add_argument("--vllm", type=Path, action="append", default=[], metavar="SITE", help="an unpacked vLLM wheel")
    parser.add_argument("--turns", type=int, default=5, help="of the copies, where there are others")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    theirs: dict[str, list[dict[str, Any]]] = {}
    if arguments.other or arguments.vllm:
        stay_on_one_core()
        measured = with_imported(arguments.other, parser)
        copies = in_turns(measured, arguments.turns, arguments.repeats, arguments.quick, arguments.vllm, theirs)
    else:
        copies = {policies(): measure(arguments.repeats, arguments.quick)}
    results = copies.pop(policies()) | {
        "policies": policies(),
        "others": copies,
        "vllm_step_us": {version: medians(found) for version, found in theirs.items()},
        "command": command(),
        "date": date.today().isoformat(),
        "machine": machine(),
        "load_before": load_before,
        "turns": arguments.turns if arguments.other or arguments.vllm else 1,
        "repeats": 2 if arguments.quick else arguments.repeats,
        "elsewhere": ELSEWHERE,
    }
    report(results)
    if arguments.json is not None:
        write_json(arguments.json, results)
    return 0


def measure(repeats: int, is_quick: bool) -> dict[str, Any]:
    """All figures of the policies that this process imports."""
    repeats, running = (2, RUNNING[:-1]) if is_quick else (repeats, RUNNING)
    decode, mixed = step_costs(repeats, running), mixed_costs(repeats, running)
    ends = ends_costs(repeats)
    small, large = rates(repeats, 1 << 13), rates(repeats, 1 << 17)
    slow = {str(count): slow_step_us(count) for count in running if count <= 64}
    return {
        "step_us": {size: {count: cost["min"] for count, cost in costs.items()} for size, costs in decode.items()},
        "step_median_us": {
            size: {count: cost["median"] for count, cost in costs.items()} for size, costs in decode.items()
        },
        "mixed_step_us": {size: {count: cost["min"] for count, cost in costs.items()} for size, costs in mixed.items()},
        "ends_256_us": {size: cost["min"] for size, cost in ends.items()},
        "hash_mtok_s": {size: small[f"hash_{size}"] for size in map(str, BLOCK_SIZES)},
        "hits_mtok_s": {
            f"pool of {pool} blocks": {name: value for name, value in found.items() if name.startswith("hits")}
            for pool, found in ((1 << 13, small), (1 << 17, large))
        },
        "slow_model_step_us": slow,
    }


def in_turns(
    copies: list[Copy],
    turns: int,
    repeats: int,
    is_quick: bool,
    sites: list[Path],
    theirs: dict[str, list[dict[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """The figures of several copies, by name: every number the median of turns in which each was measured once.

    Args:
        sites: of vLLM's wheels, measured in the same turns.
        theirs: takes their figures, by version, one a turn.
    """
    found: dict[str, list[dict[str, Any]]] = {copy.name: [] for copy in copies}
    for turn in range(turns):
        for copy in copies:
            found[copy.name].append(run_copy(copy, repeats, is_quick))
            print(f"turn {turn + 1}, {copy.name}: {found[copy.name][-1]['step_us']}", file=sys.stderr)
        for site in sites:
            command = [sys.executable, str(ROOT / "benchmarks" / "vllm_steps.py"), str(site)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            theirs.setdefault(measured["version"], []).append(measured["step_us"])
            print(f"turn {turn + 1}, vLLM {measured['version']}: {measured['step_us']}", file=sys.stderr)
    return {name: medians(of_copy) for name, of_copy in found.items()}


def run_copy(copy: Copy, repeats: int, is_quick: bool) -> dict[str, Any]:
    """The figures of a copy, by this script or its own in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="policies-") as name:
        path = Path(name) / "policies.json"
        options = ["--json", str(path), "--repeats", str(repeats), *["--quick"] * is_quick]
        started = [*copy.command(Path(__file__)), *options]
        subprocess.run(started, env=copy.environment(), check=True, stdout=subprocess.DEVNULL)
        results = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in results.items() if key.endswith(("_us", "_s"))}


def report(results: dict[str, Any]) -> None:
    """Print the figures as tables."""
    columns = list(results["step_us"]["16"])
    print("microseconds a step, by sequences running".ljust(48) + "".join(f"{count:>9}" for count in columns))
    vllm, nano = ELSEWHERE["vLLM 0.24"]["step_us"], ELSEWHERE["nano-vllm"]["step_us"]
    lines = [(f"decode-only, block {size}", costs) for size, costs in results["step_us"].items()]
    lines += [(f"  median, block {size}", costs) for size, costs in results["step_median_us"].items()]
    lines += [(f"beside a chunk of {CHUNK}, block {size}", costs) for size, costs in results["mixed_step_us"].items()]
    lines += [("the tests' slow model, block 16", results["slow_model_step_us"])]
    lines += [("vLLM 0.24, block 16 (elsewhere)", vllm["16"])]
    lines += [(f"nano-vllm, block {size} (elsewhere)", costs) for size, costs in nano.items()]
    for name, costs in lines:
        cells = (costs.get(count) for count in columns)
        print(name.ljust(48) + "".join("        -" if cell is None else f"{cell:9.1f}" for cell in cells))
    for size, cost in results["ends_256_us"].items():
        print(f"256 sequences that end in one step, block {size}:".ljust(48) + f"{cost:9.0f} us (nano-vllm: 574)")
    for size, rate in results["hash_mtok_s"].items():
        print(f"hashing, block {size}:".ljust(48) + f"{rate:9.0f} M tokens/s (vLLM 0.24, sha256: 9)")
    for pool, found in results["hits_mtok_s"].items():
        for name, rate in found.items():
            print(f"{name}, block 16, {pool}:".ljust(48) + f"{rate:9.1f} M tokens/s (vLLM 0.24, freed: 17)")


if __name__ == "__main__":
    sys.exit(main())
