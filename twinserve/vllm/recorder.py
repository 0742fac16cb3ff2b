"""RecordingScheduler placeholder."""
from vllm.v1.core.sched.async_scheduler import AsyncScheduler


class RecordingScheduler(AsyncScheduler):
    """x"""
