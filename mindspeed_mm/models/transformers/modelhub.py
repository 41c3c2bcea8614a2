"""The model hub at the import path that user scripts know."""

from mindspeed_mm.models.common.modelzoo import ModelHub

__all__ = ["ModelHub"]
