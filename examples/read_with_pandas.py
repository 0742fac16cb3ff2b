"""Read a run with pandas: does the wait for the first token grow with the prompt, and where does a step's time go?"""

import tempfile
from pathlib import Path

import twinserve
from twinserve.settings.build_core import Settings
from twinserve.traces.generator import LengthSpec, generate
from twinserve.worlds.run import choose_latency, run_sim
from twinserve.worlds.workload import Workload

made = generate(
    seed=0,
    num_requests=120,
    rate=10.0,
    prompt_tokens=LengthSpec.parse("lognormal:900:1"),
    output_tokens=LengthSpec.parse("fixed:50"),
)
workload = Workload(made)
latency, about = choose_latency("roofline:llama-3-8b@h100")
settings = Settings(max_num_seqs=32, max_num_batched_tokens=2048, num_gpu_blocks=8000)

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    run_sim(workload, settings, latency, latency_facts=about, out=out)
    requests, steps = twinserve.load(out)

sizes = requests["prompt_tokens"].map(lambda tokens: "short" if tokens < 1000 else "long")
print((requests.groupby(sizes)["ttft_s"].median() * 1e3).round(1).to_string(header=False))
kinds = steps["prompt_tokens"].map(lambda tokens: "with prompts" if tokens else "decode alone")
print((steps.groupby(kinds)["duration_s"].sum() / steps["duration_s"].sum()).round(3).to_string(header=False))
