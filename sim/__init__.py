"""The simulator: a simulated clock and a latency model around the same Core as the real engine's."""
