"""Drafts: how many are asked for, what a row of them costs, and what comes of it."""

from __future__ import annotations

import re

import pytest

from twinserve.policies import (
    Batch,
    BlockManager,
    Core,
    PrefixCache,
    Runs,
    SamplingParams,
    Scheduler,
    Sequence,
    Speculation,
)
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.settings.speculative import SpeculativeConfig, VllmDraftLength

NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


def scheduler(*, k: int = 3, blocks: int | None = None, block_size: int = 4, **values) -> Scheduler:
    """A scheduler of drafts by n-grams with a prefix cache."""
    speculation = values.pop("speculation", Speculation(k))
    return Scheduler(
        BlockManager(blocks, block_size),
        speculation=speculation,
        composition="mixed",
        enable_chunked_prefill=True,
        prefix_cache=PrefixCache(),
        **values,
    )


def sequence(prompt: int, most: int, **params) -> Sequence:
    return Sequence(list(range(100, 100 + prompt)), SamplingParams(max_tokens=most, **params))


def test_a_step_gives_a_sequence_its_drafts_and_takes_back_what_was_rejected():
    ours = scheduler()
    seq = sequence(6, 20)
    ours.add(seq)
    batch = ours.schedule()
    assert ([row[1:] for row in batch.rows], batch.num_drafts_asked) == ([(0, 6, True, True, 0)], 3)
    ours.postprocess(batch, Runs([1], [1], [3]))
    assert (seq.num_tokens, seq.num_computed_tokens, seq.num_drafts) == (7, 6, 3)
    batch = ours.schedule()
    assert [row[1:] for row in batch.rows] == [(6, 4, True, False, 3)]
    assert (seq.num_computed_tokens, seq.num_in_flight, len(seq.block_table), seq.num_drafts) == (10, 4, 3, 0)
    assert seq.num_registered_tokens == 4, "never a draft"
    ours.postprocess(batch, Runs([2, 3], [2], [1]))
    assert (seq.token_ids[6:], seq.num_computed_tokens, seq.num_in_flight) == ([1, 2, 3], 8, 0)
    assert (seq.num_registered_tokens, len(seq.block_table), seq.num_drafts) == (8, 3, 1)
    assert (batch.runs, batch.proposed) == ([(seq, 2, 2)], [(seq, 1)])
    ours.check_integrity()


@pytest.mark.parametrize(
    ("params", "kept", "reason"),
    [({"max_tokens": 3}, 2, "length"), ({"max_tokens": 9, "stop_token_ids": (7,)}, 2, "stop")],
)
def test_an_end_inside_a_run_throws_away_what_comes_behind_it(params, kept, reason):
    ours = scheduler()
    seq = Sequence([1, 2], SamplingParams(**params))
    ours.add(seq)
    ours.postprocess(ours.schedule(), Runs([5], [1], [3]))
    batch = ours.schedule()
    assert ours.postprocess(batch, Runs([6, 7, 8, 9], [4], [2])) == [seq]
    assert (seq.token_ids, seq.finish_reason, seq.num_drafts) == ([1, 2, 5, 6, 7], reason, 0)
    assert (batch.runs, batch.proposed) == ([(seq, 4, kept)], [])
    assert ours.block_manager.num_used_blocks == 0


def test_where_decisions_run_ahead_each_that_samples_has_as_many_drafts_as_were_asked_for():
    ours = scheduler(speculation=Speculation(2, is_async=True))
    seq = sequence(3, 30)
    ours.add(seq)
    first, second = ours.schedule(), ours.schedule()
    assert [row[1:] for row in second.rows] == [(3, 3, True, False, 2)] and seq.num_in_flight == 4
    third = None
    ours.postprocess(first, Runs([1], [1]))
    third = ours.schedule()
    assert [row[1:] for row in third.rows] == [(6, 3, True, False, 2)], "as if both drafts in flight were right"
    ours.postprocess(second, Runs([2], [1]))
    assert (seq.num_tokens, seq.num_computed_tokens, seq.num_in_flight) == (5, 7, 3)
    ours.check_integrity()
    with pytest.raises(ValueError, match=r"\[1\] drafts were proposed, expected 0 numbers"):
        ours.postprocess(third, Runs([3], [1], [1]))


def test_tokens_that_are_no_runs_are_runs_of_one():
    ours = scheduler()
    seq = sequence(3, 9)
    ours.add(seq)
    ours.postprocess(ours.schedule(), [4])
    assert (seq.token_ids[-1], seq.num_drafts) == (4, 0)
    simulated = Sequence(None, SamplingParams(max_tokens=3), num_prompt_tokens=5, prefix_key=lambda n: n)
    ours = scheduler()
    ours.add(simulated)
    ours.postprocess(ours.schedule(), None)
    assert simulated.num_tokens == 6


def decided() -> tuple[Scheduler, Batch]:
    """A scheduler with a step of one row with three drafts in flight."""
    ours = scheduler()
    ours.add(sequence(6, 20))
    ours.postprocess(ours.schedule(), Runs([1], [1], [3]))
    return ours, ours.schedule()


@pytest.mark.parametrize(
    ("runs", "problem"),
    [
        (Runs([], []), r"runs of \[\] tokens, expected one of 1 to each of \[4\]"),
        (Runs([], [0], [0]), r"runs of \[0\] tokens"),
        (Runs([1] * 5, [5], [0]), r"runs of \[5\] tokens, expected one of 1 to each of \[4\]"),
        (Runs([1, 2], [1], [0]), "2 tokens for a batch that samples 1"),
        (Runs([1], [1], []), r"\[\] drafts were proposed, expected 1 numbers"),
        (Runs([1], [1], [4]), r"\[4\] drafts were proposed, expected 1 numbers from 0 to 3"),
        (Runs([1], [1], [-1]), r"\[-1\] drafts were proposed"),
        (Runs(None, [1], [0]), "token_ids is None"),
    ],
)
def test_what_cannot_come_of_a_step_is_refused_and_changes_nothing(runs, problem):
    ours, batch = decided()
    with pytest.raises(ValueError, match=problem):
        ours.postprocess(batch, runs)
    with pytest.raises(ValueError, match="the oldest batch in flight"):
        ours.postprocess(Batch(1), Runs([1], [1], [0]))
    ours.postprocess(batch, Runs([1], [1], [0]))


def test_what_came_of_drafts_of_a_sequence_that_has_ended_is_told_and_kept_by_nobody():
    ours = scheduler()
    seq = sequence(6, 20)
    ours.add(seq)
    ours.postprocess(ours.schedule(), Runs([1], [1], [3]))
    batch = ours.schedule()
    ours.abort(seq)
    assert ours.postprocess(batch, Runs([2, 3], [2], [1])) == []
    assert (batch.runs, batch.proposed, seq.num_tokens, seq.num_drafts) == ([(seq, 2, 0)], [], 7, 0)


def test_a_table_says_how_many_drafts_a_batch_of_some_size_asks_for():
    """As vLLM's: rows in any order, no number above the most, sizes between two rows and behind the last as before."""
    length = VllmDraftLength(5, [(3, 8, 2), (1, 2, 9), (10, 20, 0)])
    asked = []
    for size in (0, 1, 2, 3, 8, 9, 10, 20, 21):
        batch = Batch(1)
        batch.seqs = [sequence(1, 1) for _ in range(size)]
        asked.append(length.choose(batch))
    assert asked == [5, 5, 5, 2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ([(0, 2, 1)], "is (0, 2, 1), expected first 1, last >= first and drafts >= 0"),
        ([(3, 2, 1)], "is (3, 2, 1), expected first 1,"),
        ([(2, 4, 1)], "is (2, 4, 1), expected first 1,"),
        ([(1, 4, 1), (4, 5, 1)], "is (4, 5, 1), expected first > 4,"),
        ([(1, 4, 1), (6, 5, 1)], "is (6, 5, 1), expected first > 4, last >= first"),
        ([(1, 2, -1)], "is (1, 2, -1), expected first 1, last >= first and drafts >= 0"),
    ],
)
def test_a_table_that_cannot_be_is_refused(table, problem):
    with pytest.raises(ValueError, match=re.escape(f"a row of the table {problem}")):
        VllmDraftLength(5, table)


def test_an_admission_is_padded_where_the_number_of_drafts_is_fixed_and_nowhere_else(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN.format(most=3, asked="3"))
    prompt, lengths = list(range(9)), {}
    for name, values in (
        ("fixed", {}),
        ("by a table", {"num_speculative_tokens_per_batch_size": [[1, 9, 3]]}),
        ("by a rule", {"draft_length": f"{file}:Halves"}),
    ):
        settings = {"block_size": 4, "num_gpu_blocks": 99, "speculative_config": NGRAM | values}
        ours = Settings.load(settings).build_core().scheduler
        for _ in range(2):  # the second has all but its last token from the first
            ours.add(Sequence(prompt, SamplingParams(max_tokens=1)))
            batch = ours.schedule()
            ours.postprocess(batch, Runs([1], [1], [0]))
        lengths[name] = [row[1:3] for row in batch.rows]
    assert lengths == {"fixed": [(8, 4)], "by a table": [(8, 1)], "by a rule": [(8, 1)]}


def test_numbers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_speculative_tokens is 0, expected an integer >= 1"):
        VllmDraftLength(0)
    with pytest.raises(ValueError, match="max_num_batched_tokens is 4, expected at least 5"):
        scheduler(speculation=Speculation(3, draft_slots=1), max_num_batched_tokens=4)
    with pytest.raises(ValueError, match="composition is 'prefill-first', expected 'mixed'"):
        Scheduler(BlockManager(None, 4), speculation=Speculation(1))
    with pytest.raises(ValueError, match="is_async is False, but pipeline_depth is 1"):
        Core(scheduler(), pipeline_depth=1)


def test_what_a_method_of_vllms_sets():
    def said(method: str, **values) -> tuple[int, int, bool]:
        config = SpeculativeConfig(method=method, num_speculative_tokens=4)
        _, _, *others = config.build_speculation(**values)
        return *others, config.hash_lookahead_tokens

    assert said("ngram", is_async=False) == (0, 0, False, 0)
    assert said("ngram_gpu", is_async=True) == (0, 0, True, 0)
    assert said("draft_model", is_async=False) == (4, 1, False, 0)
    assert said("eagle3", is_async=False) == (4, 0, False, 1)


def test_one_that_could_hang_at_its_end_for_want_of_blocks_is_refused():
    """Alone and padded behind a hit, it needs blocks for its drafts as well."""
    tokens = {most: scheduler(blocks=3, block_size=4).add(sequence(5, most)) for most in (5, 6)}
    assert tokens == {5: True, 6: False}, "12 tokens of room, the last token needs none, drafts need three"
    assert scheduler(blocks=3, block_size=4, max_model_len=12).add(sequence(5, 6)), "none goes beyond max_model_len"


OWN = """
class Halves:
    most = {most}

    def choose(self, batch):
        return {asked}
"""


def test_a_class_of_ones_own_says_how_many_drafts_to_ask_for(tmp_path):
    file = tmp_path / "halves.py"
    file.write_text(OWN.format(most=4, asked="4 // max(1, len(batch))"))
    own = {"method": "ngram", "num_speculative_tokens": 4, "draft_length": f"{file}:Halves"}
    settings = Settings.load({"speculative_config": own})
    assert settings.speculative_config is not None and "@" in str(settings.speculative_config.draft_length)
    core = settings.build_core()
    asked = []
    for number in range(4):
        core.ingest(Sequence([1, 2, number], SamplingParams(max_tokens=9), seq_id=number), 0)
        batch = core.decide(0)
        asked.append(batch.num_drafts_asked)
        core.commit(Runs([5] * len(batch.sampled), [1] * len(batch.sampled), [0] * len(batch.sampled)), 0)
    assert asked == [4, 2, 1, 1]


@pytest.mark.parametrize(
    ("most", "asked", "problem"),
    [
        (2, "3", "choose to answer an integer from 0 to 2, it is 3"),
        (2, "-1", "choose to answer an integer from 0 to 2, it is -1"),
        (2, "0.5", "choose to answer an integer from 0 to 2, it is 0.5"),
        (2, "None", "choose to answer an integer from 0 to 2, it is None"),
        (2, "1 // 0", "choose to answer (ZeroDivisionError: integer division or modulo by zero)"),
        (0, "0", "most an integer from 1 to 3, it is 0"),
        (4, "0", "most an integer from 1 to 3, it is 4"),
        ("'2'", "0", "most an integer from 1 to 3, it is '2'"),
    ],
)
def test_a_class_of_ones_own_that_says_what_cannot_be_is_refused_in_a_line(tmp_path, most, asked, problem):
    file = tmp_path / "halves.py"
    file.write_text(OWN.format(most=most, asked=asked))
    core = None
    with pytest.raises(InputError, match=re.escape(f"{file}: draft_length is 'Halves', expected {problem}")):
        core = Settings.load({"speculative_config": NGRAM | {"draft_length": f"{file}:Halves"}}).build_core()
        core.ingest(Sequence([1, 2], SamplingParams(max_tokens=9), seq_id=0), 0)
        core.decide(0)
    assert (core is None) == problem.startswith("most")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ("{", "expected: a JSON object"),
        ("[]", "speculative_config is \\[\\], expected: Input should be a valid dictionary"),
        ({"method": "medusa", "num_speculative_tokens": 1}, "speculative_config.method is 'medusa'"),
        ({"method": "ngram"}, "speculative_config.num_speculative_tokens"),
        (NGRAM | {"num_speculative_tokens": 0}, "greater than or equal to 1"),
        (NGRAM | {"odd": 1}, "speculative_config.odd"),
        (NGRAM | {"prompt_lookup_max": 2}, "prompt_lookup_min is 5, expected at most prompt_lookup_max"),
        (NGRAM | {"model": "x"}, "expected none with the method ngram"),
        (NGRAM | {"num_speculative_tokens_per_batch_size": [[1, 2]]}, "a row of the table is \\[1, 2\\]"),
        (NGRAM | {"num_speculative_tokens_per_batch_size": [[2, 3, 1]]}, "a row of the table is \\(2, 3, 1\\)"),
        (NGRAM | {"num_speculative_tokens_per_batch_size": [[1, 2, 1.5]]}, "per_batch_size.0.2 is 1.5"),
        (NGRAM | {"num_speculative_tokens_per_batch_size": 3}, "per_batch_size is 3"),
        (NGRAM | {"acceptance": "a", "synthetic_acceptance_rate": 0.5}, "expected none beside"),
        (NGRAM | {"draft_length": "a.py"}, "FILE.py:CLASS"),
    ],
)
def test_bad_settings_of_drafts_are_refused_in_a_line(values, problem):
    with pytest.raises(InputError, match=problem) as caught:
        Settings.load({"speculative_config": values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"composition": "prefill-first"}, "composition is 'prefill-first', expected 'mixed'"),
        ({"pipeline_depth": 1}, "the method is 'ngram', expected 'ngram_gpu' with pipeline_depth 1"),
        ({"max_model_len": 4}, "num_speculative_tokens is 3, expected at most max_model_len \\(4\\) - 2"),
        ({"max_num_batched_tokens": 4, "max_num_seqs": 4}, "max_num_batched_tokens is 4, expected at least 5"),
    ],
)
def test_settings_that_do_not_go_with_drafts_are_refused(values, problem):
    with pytest.raises(InputError, match=problem):
        Settings.load({"speculative_config": NGRAM} | values)
