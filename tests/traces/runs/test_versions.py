"""Records and the version of vLLM whose rules decided: one that says none means those of 0.24."""

from __future__ import annotations

import json

import pytest

from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay

NEW = (
    "vllm_version",
    "max_num_active_seqs",
    "long_prefill_token_threshold_adaptive",
    "long_prefill_token_threshold_binds_alone",
    "prefill_schedule_interval",
    "self_preemption_ends_pass",
    "victim_before_skips",
)


def without_the_settings(folder) -> None:
    """The record as it was written before there was a version to say."""
    run = json.loads((folder / "run.json").read_text())
    for name in NEW:
        del run["settings"][name]
    (folder / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize(("version", "is_exact"), [("0.24", True), ("0.33", False)])
def test_a_record_that_says_no_version_is_decided_again_by_the_rules_of_0_24(
    record_run, some_requests, version, is_exact
):
    """A request is alone, and its prompt is longer than the threshold: there the two versions part."""
    run = record_run(requests=some_requests[:1], vllm_version=version, long_prefill_token_threshold=5)
    assert replay(load_record(run.path)).is_exact
    without_the_settings(run.path)
    assert replay(load_record(run.path)).is_exact is is_exact
