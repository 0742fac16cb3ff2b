"""Try a policy of your own: the shortest prompt first, against first come, first served, on the same requests."""

import heapq

from twinserve.policies import LastAdmitted
from twinserve.settings.build_core import Settings
from twinserve.traces.generator import LengthSpec, generate
from twinserve.worlds.run import choose_latency, run_sim
from twinserve.worlds.workload import Workload


class ShortestPrompt:
    """The waiting sequence with the shortest prompt is next; of equal ones, the one that came first."""

    starvation_free = False
    is_steady = True
    victim = LastAdmitted()

    def __init__(self):
        self.heap = []

    def push(self, seq):
        heapq.heappush(self.heap, (seq.num_prompt_tokens, seq.seq_id, seq))

    push_preempted = push

    def peek(self):
        return self.heap[0][2]

    def pop_next(self):
        return heapq.heappop(self.heap)[2]

    def remove(self, seq):
        self.heap = [entry for entry in self.heap if entry[2] is not seq]
        heapq.heapify(self.heap)

    def __len__(self):
        return len(self.heap)

    def __iter__(self):
        return (entry[2] for entry in self.heap)


def main():
    requests = generate(
        seed=0,
        num_requests=200,
        rate=25.0,
        prompt_tokens=LengthSpec.parse("lognormal:1200:1.2"),
        output_tokens=LengthSpec.parse("fixed:60"),
    )
    workload = Workload(requests)
    latency, about = choose_latency("roofline:llama-3-8b@h100")
    for name, order in (("first come", "fcfs"), ("shortest prompt", f"{__file__}:ShortestPrompt")):
        settings = Settings.load({"scheduling_policy": order, "max_num_seqs": 16, "num_gpu_blocks": 8000})
        summary = run_sim(workload, settings, latency, latency_facts=about)
        ttft = summary["ttft_s"]
        print(f"{name}: TTFT " + ", ".join(f"{at} {ttft[at] * 1e3:.0f} ms" for at in ("mean", "p50", "p99")))


if __name__ == "__main__":
    main()
