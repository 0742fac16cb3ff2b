"""The serving policies: what is admitted, batched, cached and preempted.

Pure Python (standard library and xxhash). Nothing here executes a model, reads a clock or draws an unseeded random
number, so the same objects decide in the simulator and in the real engine.
"""

from twinserve.policies import sequence
from twinserve.policies.batch import Batch, Row
from twinserve.policies.block_manager import Block, BlockManager
from twinserve.policies.core import Core, CoreListener
from twinserve.policies.orders import (
    CacheAware,
    FirstCome,
    LastAdmitted,
    LeastUrgent,
    Priority,
    ShortestJob,
    VllmAdmission,
)
from twinserve.policies.prefix_cache import PrefixCache
from twinserve.policies.scheduler import Scheduler
from twinserve.policies.sequence import SamplingParams, Sequence, SequenceStatus

IS_COMPILED = not str(sequence.__file__).endswith(".py")
"""Are the policies compiled? What they decide is the same."""
