"""Nothing to patch: ring attention is part of :mod:`mindspeed_mm.distributed.context_parallel`."""
