"""A window of traffic that two devices served together, decided again and simulated: by their profile and the roofline.

    python benchmarks/tensor_parallel_window.py [--out FOLDER] [--check]

The profile and the record of FOLDER/h200/tensor-parallel were made on two NVIDIA H200s one after the other, at random
weights of the Llama-3-8B shape, by

    twinserve profile --shapes 384 --max-seqs 256 --max-context 8192 --max-prompt 2048 ENGINE --out latency.json
    twinserve run AzureLLMInferenceTrace_conv.csv --window-s 400:540 --rate-scale 3.5 --max-prompt-tokens 4096 \\
        --max-output-tokens 1000 --pipeline-depth 1 ENGINE --out run

where ENGINE is `--device cuda --dtype bfloat16 --model llama-3-8b --load-format dummy --tensor-parallel-size 2
--max-num-seqs 256 --max-num-batched-tokens 2048 --block-size 16 --num-gpu-blocks 80000 --max-model-len 8192`. Results:
FOLDER/h200/tensor-parallel-window.json, of which render.py makes a table; --check compares it instead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fidelity_numbers import METRICS, unpacked
from result_files import RESULTS, load_json, write_json

from twinserve.commands.progress import say
from twinserve.settings.build_core import Settings
from twinserve.traces.runs.compare import Comparison, value_of
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import choose_latency, run_sim
from twinserve.worlds.workload import load_workload

ROOFLINE = "roofline:llama-3-8b@h200:tp=2"


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--out", type=Path, default=RESULTS)
    parsing.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    arguments = parsing.parse_args()
    folder = arguments.out / "h200"
    found, path = window(folder / "tensor-parallel"), folder / "tensor-parallel-window.json"
    for name, errors in found["errors"].items():
        print(name, {metric: f"{error:+.1%}" for metric, error in errors.items()})
    if not arguments.check:
        write_json(path, found)
    elif found != load_json(path):
        say(f"tensor_parallel_window.py: {path} says something else")
        return 1
    return 0


def window(folder: Path) -> dict[str, Any]:
    """What was served, whether it was decided again alike, and the simulations' errors by metric.

    Raises:
        RuntimeError: a decision was another.
    """
    with unpacked(folder / "azure-window.tar.xz") as record:
        again = replay(record)
        if not again.is_exact:
            raise RuntimeError(f"{again.equal} of {again.recorded} decisions were made again")
        settings, served = Settings.load(record.run["settings"]), record.run["summary"]
        errors = {}
        for name, source in (("profile", str(folder / "latency.json")), ("roofline", ROOFLINE)):
            latency, facts = choose_latency(source)
            twin = run_sim(load_workload(record.path, {}), settings, latency, latency_facts=facts)
            pairs = [Comparison(metric, value_of(twin, metric), value_of(served, metric)) for metric in METRICS]
            errors[name] = {pair.metric: round(pair.error, 4) for pair in pairs if pair.error is not None}
        return {
            "device": record.run["device"],
            "model": record.run["facts"]["model"],
            "requests": served["requests"],
            "duration_s": round(served["duration_s"], 1),
            "decisions": {"recorded": again.recorded, "equal": again.equal},
            "served": {metric: value_of(served, metric) for metric in METRICS},
            "errors": errors,
        }


if __name__ == "__main__":
    sys.exit(main())
