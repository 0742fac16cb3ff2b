"""Kernels: padding and cuts, worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

from twinserve.sim.kernels import Kernels
from twinserve.sim.recorded_steps import kernels_of

BESIDE = Kernels(decodes=(1, 4, 16), decodes_beside=(8, 16), prompt_tokens=(64, 256), prompts=4)
"""Prompts behind padded decodes."""
TOGETHER = Kernels(decodes=(1, 4, 16), decodes_beside=(8, 16), tokens=(64, 256), prompts=4)
"""All tokens in one size."""


def test_decodes_alone_are_padded_to_the_next_size_and_so_are_the_rows_that_are_sampled():
    assert [BESIDE.padded(rows, 0, 0, rows)[0] for rows in (1, 2, 4, 5, 16, 17)] == [1, 4, 4, 16, 16, 17]
    assert BESIDE.padded(5, 0, 0, 3) == (16, 16, 16)
    assert Kernels().padded(5, 0, 0, 3) == (5, 5, 3), "where nothing is captured nothing is padded"


def test_a_step_with_prompts_is_padded_in_one_size_or_in_two():
    assert TOGETHER.padded(5, 40, 2, 6) == (8, 64, 12)
    assert TOGETHER.padded(5, 62, 2, 6) == (8, 256, 12), "decodes count among the tokens"
    assert TOGETHER.padded(9, 40, 9, 6) == (16, 64, 25), "more prompts than there is room for"
    assert BESIDE.padded(5, 40, 2, 6) == (8, 8 + 64, 12)
    assert BESIDE.padded(5, 64, 2, 6) == (8, 8 + 64, 12)
    assert BESIDE.padded(5, 65, 2, 6) == (8, 8 + 256, 12)
    assert Kernels(decodes=(4,)).padded(5, 40, 2, 6) == (5, 45, 6)


def test_a_step_beyond_the_sizes_is_not_padded_and_never_less_than_the_largest():
    assert TOGETHER.padded(5, 300, 2, 6) == (8, 305, 12)
    assert BESIDE.padded(5, 257, 2, 6) == (8, 8 + 256, 12), "256 and 8 padded ones are more than 257 and 5"
    assert BESIDE.padded(5, 300, 2, 6) == (8, 305, 12)


def test_the_sizes_under_narrower_limits_are_those_up_to_the_first_that_holds_all():
    narrow = TOGETHER.at(max_num_seqs=6, max_num_batched_tokens=64)
    assert (narrow.decodes, narrow.decodes_beside, narrow.tokens) == ((1, 4, 6), (6,), (64,))
    assert TOGETHER.at(6, 65).tokens == (64, 256) and BESIDE.at(6, 64).prompt_tokens == (64,)
    assert BESIDE.at(6, 63).prompt_tokens == (64,) and BESIDE.at(6, 65).prompt_tokens == (64, 256)
    assert TOGETHER.at(16, None) == TOGETHER == TOGETHER.at(99, 10**6), "what lies beyond its own is not known"


def test_rows_of_drafts_are_so_many_decodes():
    drafted = Kernels(decodes=(5, 20, 80), single=5)
    assert drafted.at(8, None, most_drafts=3) == Kernels(decodes=(5, 20, 32), single=4)
    assert drafted.at(8, 16, most_drafts=4).decodes == (5, 16), "no more than the budget"


def test_spans_are_whole_blocks_and_no_shorter_than_the_shortest():
    kernels = Kernels(decode_cuts=((4, 8, 256, 64), (32, 1, 256, 128)))
    assert kernels.blocks(3, 1000) == 1000, "fewer rows than the first cut is for: one span, read by the token"
    assert [kernels.blocks(4, longest) for longest in (64, 256, 2048, 2049, 4096)] == [1, 4, 4, 5, 8]
    assert kernels.blocks(32, 1000) == 8
    assert kernels.cut_tokens(4, 4, 10_000) == 4 * 8 * 256 and kernels.cut_tokens(4, 4, 5_000) == 5_000
    assert kernels.cut_tokens(3, 3, 10_000) == kernels.cut_tokens(32, 32, 10_000) == 0


def test_each_tile_of_a_prompt_reads_what_lies_before_its_end():
    kernels = Kernels(prompt_tile=4)
    for start, length in ((0, 1), (0, 4), (0, 5), (3, 14), (100, 16)):
        ends = [*range(start + 4, start + length, 4), start + length]
        assert kernels.tiles([(start, length)]) == (len(ends), sum(ends))
    assert kernels.tiles([(0, 5), (3, 14)]) == (2 + 4, (4 + 5) + (7 + 11 + 15 + 17))


def test_what_the_engine_did_that_wrote_records_that_do_not_say_it():
    facts = {"execution": "graphs", "attention": "triton", "shape": {"num_kv_heads": 8, "num_heads": 16}}
    settings = {"max_num_seqs": 20, "max_num_batched_tokens": 300}
    cuts = ((1, 16, 64, 64), (16, 8, 256, 128), (128, 1, 256, 128))
    found = kernels_of(SimpleNamespace(run={"facts": facts, "settings": settings}))
    assert found == Kernels(
        (1, 2, 4, 8, 16, 20),
        (),
        (0, 16, 20),
        (16, 64, 128, 192, 256, 384),
        prompts=32,
        decode_cuts=cuts,
        prompt_tile=64,
    )
    drafted = settings | {"speculative_config": {"num_speculative_tokens": 3}, "max_num_batched_tokens": 30}
    found = kernels_of(SimpleNamespace(run={"facts": facts, "settings": drafted}))
    assert found == Kernels((1, 2, 4, 8, 16, 24, 30), decode_cuts=cuts, prompt_tile=32, single=4, waits=True)
    wide = settings | {"speculative_config": {"num_speculative_tokens": 15}, "max_num_batched_tokens": 8192}
    found = kernels_of(SimpleNamespace(run={"facts": facts, "settings": wide}))
    assert found.decodes == (1, 2, 4, *range(8, 256, 8), 256, 288, 320)
    for other in ({"attention": "sdpa"}, {"execution": "eager"}):
        assert kernels_of(SimpleNamespace(run={"facts": facts | other, "settings": settings})) == Kernels()
