"""The two roads behind one interface: what the training loop may ask of them."""

from mindspeed_mm.engine.base import Engine, Listener, StepResult

__all__ = ["Engine", "Listener", "StepResult"]
