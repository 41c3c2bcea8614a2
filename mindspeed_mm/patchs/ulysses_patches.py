"""Nothing to patch: Ulysses is part of :mod:`mindspeed_mm.distributed.context_parallel`."""
