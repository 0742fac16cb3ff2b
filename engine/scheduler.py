from twinserve.policies.scheduler import Batch, Scheduler

__all__ = ["Batch", "Scheduler"]
