"""Speculative decoding in the engine: who proposes drafts, and the runner that verifies them."""
