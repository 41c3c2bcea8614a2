"""Loss and gradient norm over the steps of a run."""
