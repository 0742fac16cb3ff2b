"""The real engine: torch models over paged KV, driven by the same Core as the simulator."""
