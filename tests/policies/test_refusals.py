"""What the policies refuse, in words that say what came and what was expected; nothing has changed after it."""

from __future__ import annotations

import pytest

from twinserve.policies import IS_COMPILED, BlockManager, Core, PrefixCache, SamplingParams, Scheduler, Sequence
from twinserve.policies.block_manager import NoFreeBlocksError
from twinserve.policies.vllm_rules import PrefillInterval
from twinserve.sim.horizon import advance, horizon


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5, expected a number >= 0"),
        ({"temperature": float("nan")}, "temperature is nan, expected a number >= 0"),
        ({"max_tokens": 0}, "max_tokens is 0, expected an integer >= 1"),
        ({"top_k": -2}, "top_k is -2, expected an integer >= -1"),
        ({"top_p": 0.0}, "top_p is 0.0, expected a number in"),
        ({"top_p": 1.5}, "top_p is 1.5, expected a number in"),
        ({"min_p": -0.1}, "min_p is -0.1, expected a number in"),
        ({"min_p": 1.1}, "min_p is 1.1, expected a number in"),
        ({"min_p": float("nan")}, "min_p is nan, expected a number in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected a number > 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf, expected a number > 0"),
        ({"logprobs": -1}, "logprobs is -1, expected an integer >= 0, or None"),
    ],
)
def test_sampling_that_means_nothing(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_a_sequence_of_which_neither_tokens_nor_prefixes_are_known():
    with pytest.raises(ValueError, match="needs num_prompt_tokens and prefix_key"):
        Sequence(None, num_prompt_tokens=3)


def test_a_token_without_an_id_where_there_are_ids():
    seq = Sequence([1, 2], seq_id=7)
    with pytest.raises(ValueError, match="sequence 7 has token ids"):
        seq.append_token(None)
    assert seq.num_tokens == 2 and list(seq.token_ids) == [1, 2]


def test_a_token_for_a_sequence_whose_tokens_a_scheduler_counts():
    scheduler = Scheduler(BlockManager(8, 4))
    seq = Sequence([1, 2], SamplingParams(max_tokens=1))
    scheduler.add(seq)
    for is_finished in (False, True):
        with pytest.raises(ValueError, match="takes no token from outside"):
            seq.append_token(5)
        if not is_finished:
            batch = scheduler.schedule()
            with pytest.raises(ValueError, match="takes no token from outside"):
                seq.append_token(5)
            scheduler.postprocess(batch, [7])
    assert seq.is_finished and seq.token_ids == [1, 2, 7]


@pytest.mark.parametrize("ends", ["not at all", "served", "aborted", "refused"])
def test_a_sequence_that_was_added_before(ends):
    scheduler = Scheduler(BlockManager(2, 4))
    seq = Sequence([1] * (2 if ends != "refused" else 20), SamplingParams(max_tokens=1))
    assert scheduler.add(seq) is (ends != "refused")
    if ends == "served":
        scheduler.postprocess(scheduler.schedule(), [7])
    elif ends == "aborted":
        scheduler.abort(seq)
    reason, waiting = seq.finish_reason, len(scheduler.waiting)
    with pytest.raises(ValueError, match="was added before, expected a new sequence"):
        scheduler.add(seq)
    assert (seq.finish_reason, len(scheduler.waiting)) == (reason, waiting)


def test_a_pipeline_of_less_than_no_step():
    with pytest.raises(ValueError, match="pipeline_depth is -1, expected an integer >= 0"):
        Core(Scheduler(BlockManager(4, 4)), pipeline_depth=-1)


def test_a_pipeline_of_no_rank():
    with pytest.raises(ValueError, match="pipeline_parallel_size is 0, expected an integer >= 1"):
        Scheduler(BlockManager(4, 4), pipeline_parallel_size=0)


def test_a_prefill_interval_of_no_step():
    with pytest.raises(ValueError, match="prefill_schedule_interval is 0, expected an integer >= 1"):
        PrefillInterval(0)


def test_a_block_that_is_stored_already():
    cache = PrefixCache()
    cache.store([1, 2], 5)
    with pytest.raises(ValueError, match="block 5 is stored already"):
        cache.store([3, 4], 5)
    assert cache.lookup([1, 2, 3], 2) == ([5], 2)


def test_more_blocks_than_are_free():
    manager = BlockManager(3, 2)
    seq, other = Sequence([1, 2, 3]), Sequence([1])
    manager.admit(seq, [], 3)
    manager.admit(other, [], 1)
    seq.num_computed_tokens = 3
    assert (manager.num_missing(seq, 1), manager.num_missing(seq, 2)) == (0, 1)
    for extend in (lambda: manager.grow(seq, manager.take(1)), lambda: manager.take(1)):
        with pytest.raises(NoFreeBlocksError, match="0 are free"):
            extend()
    assert len(seq.block_table) == 2 and len(other.block_table) == 1
    manager.check_integrity()


def test_more_blocks_than_are_free_though_some_are():
    manager = BlockManager(4, 2)
    seq = Sequence([1, 2, 3])
    manager.admit(seq, [], 3)
    seq.num_computed_tokens = 3
    assert manager.num_missing(seq, 6) == 3
    for extend in (lambda: manager.grow(seq, manager.take(3)), lambda: manager.take(3)):
        with pytest.raises(NoFreeBlocksError, match="3 blocks are needed, 2 are free"):
            extend()
    assert (seq.block_table, manager.free_block_ids) == ([0, 1], [2, 3])
    manager.check_integrity()


def test_an_admission_rule_that_lets_nobody_in():
    class Closed:
        def lacks(self, *_):
            return 1

    core = Core(Scheduler(BlockManager(4, 4), admission=Closed()))
    core.ingest(Sequence([1, 2], SamplingParams(max_tokens=2)), 0)
    with pytest.raises(RuntimeError, match="nothing can be scheduled: 1 waiting, none running"):
        core.decide(0)


@pytest.mark.parametrize("at_once", [True, False])
def test_more_repetitions_than_there_are(at_once):
    core = Core(Scheduler(BlockManager(64, 4), composition="mixed"))
    core.ingest(Sequence(None, SamplingParams(max_tokens=5), num_prompt_tokens=3, prefix_key=lambda end: end), 0)
    core.decide(0)
    core.commit(None, 1)
    steps = horizon(core, core.decide(1), 100)
    assert steps == 4
    spans = [(2 + step, 2 + step, 3 + step) for step in range(steps)]
    if not at_once:
        for span in spans[:-1]:
            advance(core, [span])
        spans = spans[-1:]
    with pytest.raises(AssertionError, match="steps go on past the end of Sequence"):
        advance(core, spans)


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "min_tokens", "logprobs", "seed"])
@pytest.mark.parametrize("value", [True, 2.5, "4", [1], float("nan")])
def test_whole_numbers_of_sampling_are_whole_numbers(name, value):
    if IS_COMPILED and value is True:
        pytest.skip("compiled, a number that is True is 1")
    with refused(name, "an integer"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [float("inf"), float("nan"), "1", True, -1.0]),
        ("top_p", [1e-46, 0.0, "1", None]),
        ("repetition_penalty", [1e-40, float("inf"), float("nan"), True]),
        ("min_p", ["0", float("nan")]),
        ("presence_penalty", [float("nan"), "1"]),
    ],
)
def test_numbers_of_sampling_are_numbers_that_float32_can_hold(name, values):
    for value in values:
        if IS_COMPILED and value is True:
            continue
        with refused(name, "a number"):
            SamplingParams(**{name: value})


def test_a_value_of_sampling_is_shown_on_one_line():
    with pytest.raises((ValueError, TypeError)) as error:
        SamplingParams(min_p="a\nb")  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def refused(name: str, expected: str):
    """A wrong kind is refused; compiled, a class that holds a number takes nothing else, and says so itself."""
    if IS_COMPILED:
        return pytest.raises((ValueError, TypeError))
    return pytest.raises(ValueError, match=f"{name} is .*, expected {expected}")
