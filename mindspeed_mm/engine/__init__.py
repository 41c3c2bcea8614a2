"""The two roads behind one interface: what the training loop may ask of them."""

from mindspeed_mm.engine.base import Engine, StepResult

__all__ = ["Engine", "StepResult"]
