"""Where the seconds go from a process's start to its first token on CUDA.

    python benchmarks/start.py [--shape qwen3-0.6b] [--repeats N] [--out FOLDER]

Each repeat is a process of its own, random weights in bfloat16; the stages follow one another and their sum is what
one waits. The first repeat finds an empty cache of Triton's kernels, the others what it left there. Results:
FOLDER/h100/start.json, the folder called after the card.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGES = (
    "python",
    "import torch",
    "import triton",
    "import the engine",
    "CUDA context",
    "weights",
    "pool and kernels",
    "captures",
    "first token",
)
"""The engine's own stages are its options' check, pool and first launches of kernels together, and then its graphs."""


def stages(shape: str, begun_s: float) -> dict[str, Any]:
    """Seconds of each stage in this process, which was asked for at `begun_s` of time.time."""
    seconds: dict[str, float] = {"python": time.time() - begun_s}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - begun

    with stage("import torch"):
        import torch
    with stage("import triton"):
        import triton  # noqa: F401
    with stage("import the engine"):
        from twinserve.engine.graphs import graph_runner  # noqa: F401
        from twinserve.engine.llm import LLM
        from twinserve.engine.models.dummy import dummy_model
        from twinserve.policies import SamplingParams
        from twinserve.settings.build_core import Settings
    with stage("CUDA context"):
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    with stage("weights"):
        decoder = dummy_model(shape, dtype=torch.bfloat16, device="cuda")
        torch.cuda.synchronize()
    settings = Settings.load(
        {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 2048, "pipeline_depth": 1}
    )
    with stage("pool and kernels"):
        llm = LLM(decoder, name=shape, device="cuda", settings=settings)
        torch.cuda.synchronize()
    with stage("captures"):
        llm.capture()
    with stage("first token"):
        llm.generate([[1, 2, 3]], SamplingParams(temperature=0.6, max_tokens=1, ignore_eos=True))
    num_graphs = len(llm.runner._graphs)  # type: ignore[union-attr]
    return {"seconds": {name: round(seconds[name], 3) for name in STAGES}, "graphs": num_graphs}


def measured(shape: str, kernels: str) -> dict[str, Any]:
    """`stages` of a process of its own, whose compiled kernels lie in the folder `kernels`."""
    environment = os.environ | {"TRITON_CACHE_DIR": kernels}
    begun_s = time.time()
    call = [sys.executable, __file__, "--shape", shape, "--begun", str(begun_s)]
    done = subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"total": round(sum(found["seconds"].values()), 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b", help="of the model; qwen3-0.6b unless given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.begun is not None:
        print(json.dumps(stages(arguments.shape, arguments.begun)))
        return 0
    from environment import cuda_facts, device_folder
    from result_files import RESULTS, merge

    with tempfile.TemporaryDirectory() as kernels:
        repeats = [measured(arguments.shape, kernels) for _ in range(1 + arguments.repeats)]
    first, *others = repeats
    print(f"{'seconds':20} {'first':>8} {'median':>8}   of {first['graphs']} graphs, {arguments.shape}")
    for name in STAGES:
        middle = statistics.median(one["seconds"][name] for one in others)
        print(f"{name:20} {first['seconds'][name]:8.2f} {middle:8.2f}")
    print(f"{'in all':20} {first['total']:8.2f} {statistics.median(one['total'] for one in others):8.2f}")
    keeps = not os.environ.get("PYTHONDONTWRITEBYTECODE")
    values = {"shape": arguments.shape, "keeps_bytecode": keeps, "first": first, "repeats": others}
    path = (arguments.out or RESULTS) / device_folder("cuda") / "start.json"
    merge(path, values | cuda_facts(arguments.commit))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
