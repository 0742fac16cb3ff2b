"""The serving policies: what is admitted, batched, cached and preempted. Nothing here runs a model, reads a clock or
draws an unseeded random number, so the same objects decide in the simulator and in the real engine."""

from twinserve.policies import sequence
from twinserve.policies.batch import Batch, Row, Runs
from twinserve.policies.block_manager import Block, BlockManager
from twinserve.policies.core import Core, CoreListener
from twinserve.policies.orders import FirstCome, LastAdmitted
from twinserve.policies.prefix_cache import PrefixCache
from twinserve.policies.scheduler import Scheduler
from twinserve.policies.sequence import SamplingParams, Sequence, SequenceStatus
from twinserve.policies.speculation import Speculation
from twinserve.policies.vllm_rules import VllmAdmission

IS_COMPILED = not str(sequence.__file__).endswith(".py")
"""Are the policies compiled? What they decide is the same."""
