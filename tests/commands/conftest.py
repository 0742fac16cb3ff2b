"""The shell's fixtures."""

from shell import latency, trace, twinserve

__all__ = ["latency", "trace", "twinserve"]
