"""Known faults in a tiny model."""
