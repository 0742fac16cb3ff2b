"""Wrong versions of cycle 6: attention over packed and paged keys and values."""

from __future__ import annotations

from plants import planted

ATTENTION = "twinserve.engine.layers.attention:FlashAttention"
TEST = "test_flash_attention_correctness"


@planted(f"{ATTENTION}.prefill_attention", "lets a token see those behind it", TEST)
def _(right):
    def wrong(self, *args, **kwargs):
        kernel = self._varlen
        self._varlen = lambda *args, causal, **kwargs: kernel(*args, causal=False, **kwargs)
        return right(self, *args, **kwargs)

    return wrong


@planted(f"{ATTENTION}.prefill_attention", "reads the pages in the pool's order", TEST)
def _(right):
    def wrong(self, *args, block_table=None):
        *lengths, table = args if len(args) == 8 else (*args, block_table)
        return right(self, *lengths, None if table is None else table.sort(dim=1).values)

    return wrong


@planted(f"{ATTENTION}.prefill_attention", "scales the queries again", TEST)
def _(right):
    return lambda self, q, *args, **kwargs: right(self, q / q.shape[-1] ** 0.5, *args, **kwargs)


@planted(f"{ATTENTION}.decode_attention", "reads the pages in the pool's order", TEST)
def _(right):
    return lambda self, q, k_cache, v_cache, context_lens, block_table: right(
        self, q, k_cache, v_cache, context_lens, block_table.sort(dim=1).values
    )


@planted(f"{ATTENTION}.decode_attention", "leaves out the token itself", TEST)
def _(right):
    return lambda self, q, k_cache, v_cache, context_lens, block_table: right(
        self, q, k_cache, v_cache, (context_lens - 1).clamp(min=1), block_table
    )
