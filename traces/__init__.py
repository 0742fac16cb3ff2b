"""Requests in: formats, changes, synthetic ones; alike for the simulator and for the real engine."""
