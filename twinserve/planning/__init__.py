"""Many simulations to decide by: fleets, sweeps over settings, objectives, and the capacity that keeps one."""
