"""Triton kernels; imported where a CUDA device runs them."""

SMALLEST_DOT = 16
"""Rows of the narrowest product that tensor cores make."""
