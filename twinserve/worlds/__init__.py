"""A workload made of a trace, and its run in one of the two worlds."""
