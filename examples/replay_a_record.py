"""Record a run, decide it again from its facts alone, change one of its settings, and see where it first differs."""

import tempfile
from dataclasses import replace
from pathlib import Path

from twinserve.settings.build_core import Settings
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import choose_latency, run_sim
from twinserve.worlds.workload import Workload

requests = generate(
    seed=0,
    num_requests=60,
    rate=20.0,
    prompt_tokens=LengthSpec.parse("lognormal:400:1"),
    output_tokens=LengthSpec.parse("lognormal:80:0.5"),
)
workload = Workload(requests)
latency, about = choose_latency("roofline:llama-3-8b@h100")
settings = Settings(max_num_seqs=24, max_num_batched_tokens=1024, num_gpu_blocks=600)

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    run_sim(workload, settings, latency, latency_facts=about, out=out)
    record = load_record(out)

print("as recorded:", "exact" if replay(record).is_exact else "differs", f"over {len(record.steps)} decisions")
fewer = replace(record, run=record.run | {"settings": record.run["settings"] | {"max_num_seqs": 8}})
result = replay(fewer)
print(f"with 8 sequences: {result.equal} decisions alike, then the field {result.difference.field!r} differs")
