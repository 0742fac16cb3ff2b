"""Learn what a prefix cache buys: conversations of four turns behind one system prompt, with the cache and without."""

from twinserve.settings.build_core import Settings
from twinserve.traces.generator import LengthSpec, generate
from twinserve.worlds.run import choose_latency, run_sim
from twinserve.worlds.workload import Workload

requests = generate(
    seed=0,
    num_requests=160,
    rate=6.0,
    prompt_tokens=LengthSpec.parse("lognormal:200:0.8"),
    output_tokens=LengthSpec.parse("lognormal:100:0.5"),
    num_system_prompts=1,
    system_prompt_tokens=1500,
    turns=4,
    think_time_s=2.0,
)
workload = Workload(requests)
latency, about = choose_latency("roofline:llama-3-8b@h100")
for cached in (True, False):
    settings = Settings(enable_prefix_caching=cached, max_num_seqs=64, num_gpu_blocks=6000)
    summary = run_sim(workload, settings, latency, latency_facts=about)
    share = summary["cached_tokens"] / summary["prompt_tokens"]
    print(f"{'with' if cached else 'without'} a prefix cache: {share:.1%} of the prompt tokens cached, TTFT", end=" ")
    print(f"p50 {summary['ttft_s']['p50'] * 1e3:.1f} ms, p99 {summary['ttft_s']['p99'] * 1e3:.1f} ms")
