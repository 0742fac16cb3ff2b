"""Requests in, run records and metrics out; alike for the simulator and for the real engine."""
