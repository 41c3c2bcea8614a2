"""A piece of a recorded step once more, by every rule that could explain it."""
