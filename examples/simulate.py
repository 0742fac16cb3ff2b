"""Simulate a service: requests that a seed makes, an H100 that serves Llama-3-8B, and what the requests see of it."""

from twinserve.settings.build_core import Settings
from twinserve.traces.generator import LengthSpec, generate
from twinserve.worlds.run import choose_latency, run_sim
from twinserve.worlds.workload import Workload

requests = generate(
    seed=0,
    num_requests=150,
    rate=8.0,
    prompt_tokens=LengthSpec.parse("lognormal:700:1"),
    output_tokens=LengthSpec.parse("lognormal:120:0.6"),
)
workload = Workload(requests)
latency, about = choose_latency("roofline:llama-3-8b@h100")
settings = Settings(max_num_seqs=64, max_num_batched_tokens=2048, num_gpu_blocks=8000)
summary = run_sim(workload, settings, latency, latency_facts=about)

print(f"{summary['finished']} of {summary['requests']} requests, {summary['steps']} steps; {latency.name}")
for name, metric in (("TTFT", "ttft_s"), ("TPOT", "tpot_s")):
    print(f"{name}: " + ", ".join(f"{at} {summary[metric][at] * 1e3:.1f} ms" for at in ("p50", "p90", "p99")))
print(f"{summary['output_tok_s']:.0f} output tokens/s")
