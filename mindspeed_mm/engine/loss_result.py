"""Reading what a user's ``loss_func`` returned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from mindspeed_mm.engine.base import Report
from mindspeed_mm.errors import UserError

_FORMS = "It must return 'loss', '(loss, report)' or '(loss_sum, num_tokens, report)'."


@dataclass(frozen=True)
class LossResult:
    """One micro-batch's loss, a scalar with a gradient.

    Attributes:
        loss: the mean, or the sum over ``num_tokens`` when that is given.
        num_tokens: number of target tokens, or of samples, behind a summed loss, a scalar; None for a mean.
        report: what is logged.
    """

    loss: Tensor
    num_tokens: Tensor | None
    report: Report

    @property
    def mean(self) -> Tensor:
        """The loss over its own number of tokens; 0 without tokens."""
        return self.loss if self.num_tokens is None else self.loss / at_least_one(self.num_tokens)


def read_forward(pair: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Check what ``forward_step`` returned: ``(output, loss_func)``."""
    if not (isinstance(pair, tuple) and len(pair) == 2 and callable(pair[1])):
        raise UserError(f"forward_step returned a {type(pair).__name__}: it must return '(output, loss_func)'.")
    return pair


def one_if_finite(loss: Tensor) -> Tensor:
    """Return the gradient to start from: NaN for a loss that is not finite, so that no rank updates its weights."""
    return loss.detach() * 0 + 1


def at_least_one(count: Tensor) -> Tensor:
    """Return ``count``, or 1 where there is nothing to divide by; a sum of weights may well be less than 1."""
    return count.where(count != 0, 1)


def read_loss(result: Any, *, per_token_loss: bool) -> LossResult:
    """Accept the three documented return forms of ``loss_func``.

    A loss without a report, or with an empty one, is logged as ``loss``, the way it is optimised. The loss may have
    any shape of one element.

    Args:
        result: what ``loss_func`` returned.
        per_token_loss: a sum is divided by the number in the global batch, not by its own.

    Raises:
        UserError: the value has none of these forms.
    """
    num_tokens: Tensor | None = None
    report: Any = None
    if isinstance(result, Tensor):
        loss = result
    elif isinstance(result, tuple) and len(result) == 2:
        loss, report = result
    elif isinstance(result, tuple) and len(result) == 3:
        loss, num_tokens, report = result
    else:
        length = f" of length {len(result)}" if isinstance(result, (tuple, list)) else ""
        raise UserError(f"loss_func returned a {type(result).__name__}{length}. {_FORMS}")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UserError(f"loss_func returned {_found(loss)} as the loss: it must be one number. {_FORMS}")
    if report is not None and not isinstance(report, dict):
        raise UserError(f"loss_func returned a {type(report).__name__} as the report: it must be a dict. {_FORMS}")
    for key, value in (report or {}).items():
        parts = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value,)
        if not all(_is_number(part) for part in parts):
            raise UserError(
                f"loss_func reported {_found(value)} as '{key}': it must be one number, or a pair of numbers "
                "(numerator, denominator). Leave it out of the report where there is none."
            )
    if num_tokens is not None:
        if not _is_number(num_tokens):
            raise UserError(f"loss_func returned {_found(num_tokens)} as num_tokens: it must be one number. {_FORMS}")
        num_tokens = torch.as_tensor(num_tokens, device=loss.device).reshape(())
    loss = loss.reshape(())
    read = LossResult(loss, num_tokens, report or {})
    if not report:
        summed = per_token_loss and num_tokens is not None
        read.report["loss"] = (loss.detach(), num_tokens) if summed else read.mean.detach()
    return read


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, SupportsFloat)


def _found(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
