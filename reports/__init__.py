"""Pages from run records."""
