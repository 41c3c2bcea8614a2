"""Random number generators: seeded, saved and restored together."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from mindspeed_mm.accelerator.hardware import _module, is_cpu
from mindspeed_mm.accelerator.numerics import use_deterministic_algorithms


def seed_all(seed: int = 42, deterministic: bool = False) -> None:
    """Seed Python, NumPy, torch on the CPU and torch on the device: all that dropout, attention's included, draws from.

    Args:
        seed: at least 0.
        deterministic: choose deterministic kernels and collectives as well; see
            :func:`~mindspeed_mm.accelerator.numerics.use_deterministic_algorithms` for when to call this then.
    """
    if deterministic:
        use_deterministic_algorithms()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # seeds the device generators too


def rng_state() -> dict[str, Any]:
    """Return the state of every generator of this process, in types that ``torch.load(weights_only=True)`` takes."""
    algorithm, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(algorithm), torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if not is_cpu():
        state["device"] = _module().get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((algorithm, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if not is_cpu():
        _module().set_rng_state(state["device"])
