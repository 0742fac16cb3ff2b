"""Runs out: records, digests, replay, metrics and comparisons; alike for the simulator and for the real engine."""
