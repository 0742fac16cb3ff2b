"""twinserve: the same serving policies in a simulator and in a real engine."""
