"""Triton kernels; imported where a CUDA device runs them."""
