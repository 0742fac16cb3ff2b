from twinserve.policies.block_manager import Block, BlockManager

__all__ = ["Block", "BlockManager"]
