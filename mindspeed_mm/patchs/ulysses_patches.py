"""Nothing to patch: Ulysses is context parallelism, which ``--context-parallel-size`` refuses for now."""
