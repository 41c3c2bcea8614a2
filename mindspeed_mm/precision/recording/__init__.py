"""Watching a run: from its tensors to the entries of a record."""
