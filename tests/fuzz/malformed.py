"""Malformed inputs of all commands, drawn from a seed: `python tests/fuzz/malformed.py --count 1200 --seed 0`.

Every input is a valid file, option or body that is changed somewhere. A command may take it, or has to refuse it with
status 2 and one line, within 10 s of a processor and 1 GB, and leave nothing under the name that it was to write. Each
runs in a process of its own that is forked from this one, which has imported everything. `--out` keeps the counts;
those of the last run are in benchmarks/results/malformed.json.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import latency_case, record_case, settings_case, trace_case
from command_options import option_case
from engine_cases import body_case, draft_case, engine_case, fit_case, model_case, planning_case, sampling_case
from outcome import Work, keep, run
from valid import Valid, served, valid_files

CASES: dict[str, Callable[[random.Random, Valid, Path], Work]] = {
    "trace": trace_case, "latency": latency_case, "settings": settings_case, "record": record_case,
    "option": option_case, "model": model_case, "engine": engine_case, "planning": planning_case, "drafts": draft_case,
    "fit": fit_case, "sampling": sampling_case, "body": body_case,
}  # fmt: skip


def fuzz(
    count: int, seed: int, say: Callable[[str], None], kinds: tuple[str, ...] = tuple(CASES), only: int | None = None
) -> tuple[Counter[str], list[str]]:
    """Try so many inputs; how they ended, by kind and command, and what was wrong."""
    import_all()
    ends: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        (kept := Path(scratch) / "valid").mkdir()
        valid = valid_files(kept)
        if "body" in kinds:
            valid.url = stack.enter_context(served(valid.model))
        with suppress(KeyboardInterrupt):  # what was found until then is said
            for number in range(count) if only is None else [only]:
                rng = random.Random(f"{seed}:{number}")
                kind = kinds[number % len(kinds)]
                (folder := Path(scratch) / str(number)).mkdir()
                work = CASES[kind](rng, valid, folder)
                outcome = run(work, folder)
                fault = outcome.fault()
                words = " ".join(work) if isinstance(work, list) else repr(work)
                left = sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))
                if fault is None and outcome.status == 2 and left and words.split()[0] not in GOES_ON:
                    fault = f"left {left}"
                name = words.split()[0] if isinstance(work, list) else kind
                ends[f"{kind}, {name}: status {outcome.status}"] += 1
                if fault is not None:
                    last = (outcome.err.strip().splitlines() or [""])[-1]
                    faults.append(f"input {number} of seed {seed}: {fault}: {words[:300]!r}: {last[:300]!r}")
                    say(faults[-1])
                shutil.rmtree(folder)
    return ends, faults


GOES_ON = {"sweep", "capacity", "plan"}
"""Commands that keep what they have found, and go on with it."""


def import_all() -> None:
    """Import what the forked processes would import again and again."""
    import httpx  # noqa: F401
    import torch
    import transformers.models.llama  # noqa: F401

    import twinserve.commands.app
    import twinserve.engine.llm
    import twinserve.engine.profile
    import twinserve.planning.deployments
    import twinserve.planning.tune
    import twinserve.planning.upgrade
    import twinserve.reports.page
    import twinserve.serving.run
    import twinserve.sim.replica  # noqa: F401

    torch.set_num_threads(1)


def main() -> None:
    """Try inputs, and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", type=int, help="this input alone")
    parser.add_argument("--out", type=Path, help="JSON file of the counts")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ends, faults = fuzz(
        chosen.count, chosen.seed, lambda line: print(line, flush=True), tuple(chosen.kinds), chosen.only
    )
    for end, number in sorted(ends.items()):
        print(f"{end}: {number}")
    print(f"{ends.total()} inputs, {len(faults)} faults")
    if chosen.out is not None:
        keep(chosen.out, {"inputs": ends.total(), "faults": faults, "ends": dict(sorted(ends.items()))})
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
