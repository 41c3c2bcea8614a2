"""The documented import path of ``build_iterations``."""

from mindspeed_mm.data.iterators import build_iterations

__all__ = ["build_iterations"]
