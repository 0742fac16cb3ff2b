"""Windows of public traces in both worlds: the engine on this machine, its exact replay, and the simulation's errors.

    python benchmarks/windows.py [--requests 60] [--traces FOLDER] [--out benchmarks/results/windows.json]

For each trace: its first requests, lengths capped (counted), at a rate that this machine can serve; served in real
time by SmolLM2-135M on the CPU, replayed from the facts of the record, and simulated with a latency model measured
just before. FOLDER defaults to $TWINSERVE_TRACES.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from environment import commit, take_traces, traces_of, versions
from result_files import RESULTS, write_json

from twinserve.commands.progress import Bar, say
from twinserve.commands.tables import comparison_table
from twinserve.engine.llm import LLM
from twinserve.engine.options import EngineOptions
from twinserve.settings.build_core import Settings
from twinserve.traces.runs.compare import compare
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import fit_steps, load_llm, measure_steps, run_real, run_sim
from twinserve.worlds.workload import load_workload

SETTINGS = Settings(max_num_seqs=8, max_num_batched_tokens=128, max_model_len=512, num_gpu_blocks=192)
WINDOWS = {
    "azure": ("azure/AzureLLMInferenceTrace_conv.csv", {"rate_scale": 0.4}),
    "mooncake": ("mooncake/conversation_trace.jsonl.gz", {"spread_seed": 0, "rate_scale": 0.3}),
}
CAPS = {"max_prompt_tokens": 256, "max_output_tokens": 32}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=60)
    take_traces(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "windows.json")
    arguments = parser.parse_args()
    traces = traces_of(parser, arguments)
    profiled = load_llm(EngineOptions(), Settings(), progress=say)
    samples = measure_steps(
        profiled,
        shapes=64,
        max_seqs=8,
        max_context=512,
        max_prompt=128,
        repeats=6,
        progress=lambda total: Bar("profile", total),
    )
    latency = fit_steps(profiled, samples)
    profiled.close()
    model = profiled.runner.model
    results = {"command": "python benchmarks/windows.py", "device": profiled.device_name, "versions": versions()}
    results |= {
        "commit": commit(),
        "settings": SETTINGS.model_dump(),
        "caps": CAPS,
        "residuals": latency.data["residuals"],
    }
    exact = True
    for name, (path, options) in WINDOWS.items():
        workload = load_workload(traces / path, options | CAPS | {"limit": arguments.requests})
        llm = LLM(model, tokenizer=profiled.tokenizer, name=profiled.name, settings=SETTINGS)
        with tempfile.TemporaryDirectory() as folder:
            real, sim = Path(folder) / "real", Path(folder) / "sim"
            with Bar(name, len(workload.requests)) as bar:
                run_real(workload, llm, out=real, progress=bar.ended)
            facts = {"name": f"SmolLM2-135M on {llm.device_name}", "identity": latency.identity}
            run_sim(workload, SETTINGS, latency, latency_facts=facts, out=sim)
            records = load_record(sim), load_record(real)
        llm.close()
        replayed = replay(records[1])
        exact &= replayed.is_exact
        comparisons = compare(*records)
        print(f"{name}: {replayed.equal} of {replayed.recorded} decisions made again from the facts")
        comparison_table(comparisons)
        results[name] = {
            "trace": workload.facts,
            "replay": {"equal": replayed.equal, "recorded": replayed.recorded, "exact": replayed.is_exact},
            "metrics": {row.metric: {"sim": row.sim, "real": row.real, "error": row.error} for row in comparisons},
        }
    write_json(arguments.out, results)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
