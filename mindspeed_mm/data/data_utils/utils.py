"""The documented import path of ``build_iterations`` and ``TextProcesser``."""

from mindspeed_mm.data.captions import TextProcesser
from mindspeed_mm.data.iterators import build_iterations

__all__ = ["TextProcesser", "build_iterations"]
