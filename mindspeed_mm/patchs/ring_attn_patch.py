"""Nothing to patch: ring attention is context parallelism, which ``--context-parallel-size`` refuses for now."""
