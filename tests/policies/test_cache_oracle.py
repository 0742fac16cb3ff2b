"""Prefix hits over the whole Mooncake conversation trace equal those of an independent cache, request by request."""

import hashlib
import os
from pathlib import Path

import pytest

from twinserve.policies import BlockManager, PrefixCache, SamplingParams, Scheduler
from twinserve.traces.readers import read_trace

TRACES = os.environ.get("TWINSERVE_TRACES")
BLOCK_SIZE = 512

# Whole blocks only, a request's last block evicted before its first: the sha256 of the hit tokens, a line a request.
COLUMNS = {None: "058a2d13dd796c12", 50_000: "7dcaa48e214cfb54", 10_000: "5dc450e80bd95a3f", 1_000: "2a4c594d100af017"}


@pytest.fixture(scope="module")
def requests():
    if TRACES is None:
        pytest.skip("TWINSERVE_TRACES does not name a folder of public traces")
    return read_trace(Path(TRACES) / "mooncake" / "conversation_trace.jsonl.gz").requests


@pytest.mark.parametrize("capacity", COLUMNS)
def test_hits_one_request_at_a_time_equal_the_oracles(requests, capacity):
    num_blocks = None if capacity is None else capacity + 1
    scheduler = Scheduler(BlockManager(num_blocks, BLOCK_SIZE), prefix_cache=PrefixCache())
    params = SamplingParams(ignore_eos=True)
    column = hashlib.sha256()
    for request in requests:
        seq = request._replace(max_tokens=1).to_sequence(params)
        assert scheduler.add(seq)
        batch = scheduler.schedule()
        assert scheduler.postprocess(batch, None) == [seq]
        column.update(b"%d\n" % seq.num_cached_tokens)
    assert column.hexdigest()[:16] == COLUMNS[capacity]
    scheduler.check_integrity()
