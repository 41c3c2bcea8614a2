"""Tools that watch a run from the side: the profiler and memory snapshots. They do nothing until tools.json asks."""
