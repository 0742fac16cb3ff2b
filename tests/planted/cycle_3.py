"""Wrong versions of cycle 3: sequences, and the blocks that hold their KV."""

from __future__ import annotations

from plants import planted

SEQUENCE = "twinserve.policies.sequence:Sequence"
BLOCK = "twinserve.policies.block_manager:Block"
MANAGER = "twinserve.policies.block_manager:BlockManager"
OF_SEQUENCE, OF_BLOCKS = "test_sequence_basic", "test_block_manager_allocate"


@planted(f"{SEQUENCE}.num_blocks", "rounds down", OF_SEQUENCE)
def _(right):
    return lambda self: self.num_tokens // self.block_size


@planted(f"{SEQUENCE}.num_blocks", "counts one too many where the last block is full", OF_SEQUENCE)
def _(right):
    return lambda self: self.num_tokens // self.block_size + 1


@planted(f"{SEQUENCE}.num_tokens", "counts the prompt alone", OF_SEQUENCE)
def _(right):
    return lambda self: self.num_prompt_tokens


@planted(f"{SEQUENCE}.num_completion_tokens", "counts the prompt as well", OF_SEQUENCE)
def _(right):
    return lambda self: self.num_tokens


@planted(f"{SEQUENCE}.append_token", "does not append", OF_SEQUENCE)
def _(right):
    return lambda self, token_id: None


@planted(f"{SEQUENCE}.append_token", "counts the token and does not keep it", OF_SEQUENCE)
def _(right):
    def wrong(self, token_id):
        right(self, token_id)
        self.token_ids.pop()

    return wrong


@planted(f"{SEQUENCE}.__init__", "takes the first token for the whole prompt", OF_SEQUENCE)
def _(right):
    def wrong(self, token_ids, *args, **kwargs):
        right(self, token_ids, *args, **kwargs)
        self.num_prompt_tokens = 1

    return wrong


@planted(f"{BLOCK}.__init__", "is held from the start", OF_BLOCKS)
def _(right):
    def wrong(self, block_id):
        right(self, block_id)
        self.ref_count = 1

    return wrong


@planted(f"{BLOCK}.reset", "does nothing", OF_BLOCKS)
def _(right):
    return lambda self: None


@planted(f"{MANAGER}.__init__", "has one block too few", OF_BLOCKS)
def _(right):
    return lambda self, num_blocks, block_size: right(self, num_blocks - 1, block_size)


@planted(f"{MANAGER}.can_allocate", "is always true", OF_BLOCKS)
def _(right):
    return lambda self, seq: True


@planted(f"{MANAGER}.can_allocate", "wants one block more than needed", OF_BLOCKS)
def _(right):
    return lambda self, seq: self.blocks_for(seq.num_tokens) < self.num_free_blocks


@planted(f"{MANAGER}.allocate", "gives one block too few", OF_BLOCKS)
def _(right):
    return lambda self, seq: self.admit(seq, [], seq.num_tokens - self.block_size)


@planted(f"{MANAGER}.allocate", "gives one block too many", OF_BLOCKS)
def _(right):
    return lambda self, seq: self.admit(seq, [], seq.num_tokens + self.block_size)


@planted(f"{MANAGER}.allocate", "does not count who holds a block", OF_BLOCKS)
def _(right):
    def wrong(self, seq):
        right(self, seq)
        for block_id in seq.block_table:
            self.blocks[block_id].ref_count = 0

    return wrong


@planted(f"{MANAGER}.allocate", "gives blocks that stay free", OF_BLOCKS)
def _(right):
    def wrong(self, seq):
        right(self, seq)
        self.free_block_ids.blank.extend(seq.block_table)

    return wrong


@planted(f"{MANAGER}.deallocate", "takes nothing back", OF_BLOCKS)
def _(right):
    return lambda self, seq: None


@planted(f"{MANAGER}.deallocate", "leaves the ref_count as it was", OF_BLOCKS)
def _(right):
    def wrong(self, seq):
        counts = {block_id: self.blocks[block_id].ref_count for block_id in seq.block_table}
        right(self, seq)
        for block_id, count in counts.items():
            self.blocks[block_id].ref_count = count

    return wrong


@planted(f"{MANAGER}.deallocate", "frees blocks that another sequence holds", OF_BLOCKS)
def _(right):
    def wrong(self, seq):
        for block_id in seq.block_table:
            self.blocks[block_id].ref_count = 1
        right(self, seq)

    return wrong


@planted(f"{MANAGER}.deallocate", "leaves the sequence its block table", OF_BLOCKS)
def _(right):
    def wrong(self, seq):
        table = seq.block_table
        right(self, seq)
        seq.block_table = table

    return wrong


@planted(f"{MANAGER}.can_append", "is always true", OF_BLOCKS)
def _(right):
    return lambda self, seq: True


@planted(f"{MANAGER}.can_append", "wants a free block even where the last one has room", OF_BLOCKS)
def _(right):
    return lambda self, seq: len(self.free_block_ids) > 0
