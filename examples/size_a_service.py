"""Size a service: the fewest replicas that keep an objective, and how close one fewer comes."""

from twinserve.planning.fleets import FleetOptions
from twinserve.planning.objectives import Objective
from twinserve.settings.build_core import Settings
from twinserve.traces.generator import LengthSpec, generate
from twinserve.worlds.run import ReplicaSpec, choose_latency
from twinserve.worlds.workload import Workload

objective = Objective.parse("p99 TTFT <= 1 s and p99 TPOT <= 40 ms")
requests = generate(
    seed=0,
    num_requests=300,
    rate=30.0,
    prompt_tokens=LengthSpec.parse("lognormal:1500:0.8"),
    output_tokens=LengthSpec.parse("fixed:100"),
)
workload = Workload(requests)
latency, about = choose_latency("roofline:llama-3-8b@h100")
settings = Settings(max_num_seqs=128, max_num_batched_tokens=4096, num_gpu_blocks=8000)
replica = ReplicaSpec(settings, latency, about)

print(f"asked: {objective}; {latency.name}")
for replicas in range(1, 9):
    fleet = FleetOptions(replicas=replicas, router="least-outstanding")
    summary = fleet.serve(workload, [replica] * replicas)
    ttft, tpot = summary["ttft_s"]["p99"], summary["tpot_s"]["p99"]
    missed = objective.missed(summary)
    said = f"misses {', '.join(missed)}" if missed else "keeps it"
    print(f"{replicas} x H100: p99 TTFT {ttft * 1e3:.0f} ms, p99 TPOT {tpot * 1e3:.1f} ms: {said}")
    if not missed:
        break
