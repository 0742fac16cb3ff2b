"""Inside vLLM: policies of one's own in its scheduler, and a recorder of its steps. vLLM is imported here alone.

    vllm serve MODEL --scheduler-cls twinserve.vllm.MountedScheduler \\
        --additional-config '{"twinserve": {"scheduling_policy": "fair_share.py:FairShare"}}'
    vllm serve MODEL --scheduler-cls twinserve.vllm.RecordingScheduler \\
        --additional-config '{"twinserve": {"record": "runs/mine", "most_steps": 1000000}}'
"""

from twinserve.vllm.mount import MountedScheduler
from twinserve.vllm.recorder import RecordingScheduler

__all__ = ["MountedScheduler", "RecordingScheduler"]
