"""Nothing to patch: torch DCP checkpoints are written and read by :mod:`mindspeed_mm.checkpoint`."""
