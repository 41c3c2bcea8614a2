"""Which optimizer the documented names stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from mindspeed_mm import accelerator
from mindspeed_mm.errors import UserError
from mindspeed_mm.optimizer.muon import MuonWithAdamW, local
from mindspeed_mm.optimizer.param_groups import ParameterGroup


class EMAAdamW(AdamW):
    """AdamW that also keeps an exponential moving average of the weights, in ``state[p]["ema"]``.

    ``ema = ema_decay * ema + (1 - ema_decay) * weight`` after every step, starting from the initial weights. It
    lives in the optimizer state, so it is sharded, saved and resumed with it.
    """

    def __init__(self, params: Any, *, ema_decay: float, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the weights, then the average."""
        stepping = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in stepping:
            self._start(parameter)
        loss = super().step(closure)
        found_inf = getattr(self, "found_inf", None)
        new = 1 - self.ema_decay
        for parameter in stepping:
            average, weight = local(self.state[parameter]["ema"]), local(parameter)
            # A step that was skipped on the device is none for the average either.
            average.lerp_(weight, new if found_inf is None else (new * (1 - found_inf)).to(average))
        return loss

    def _start(self, parameter: torch.nn.Parameter) -> None:
        state = self.state[parameter]
        if not state:  # AdamW initialises its own only where it finds none at all
            state.update(
                step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                exp_avg=torch.zeros_like(parameter),
                exp_avg_sq=torch.zeros_like(parameter),
            )
        if "ema" not in state:  # the state may be that of a run without averages
            state["ema"] = parameter.detach().clone()


@contextmanager
@torch.no_grad()
def averaged_weights(optimizer: EMAAdamW) -> Iterator[None]:
    """Let the weights be their averages inside, on this rank."""
    pairs = [(local(p), local(state["ema"])) for p, state in optimizer.state.items() if "ema" in state]
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


def _exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for first, second in pairs:
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)


def build_optimizer(
    groups: Sequence[ParameterGroup],
    *,
    name: str,
    selection: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
    ema_decay: float,
    muon_momentum: float = 0.95,
    ns_steps: int = 5,
    matched_adamw_rms: float = 0.2,
) -> Optimizer:
    """Build the optimizer of ``--optimizer`` and ``--optimizer-selection``.

    ``fused_torch_adamw`` and ``fused_adamw`` are both torch's AdamW, fused where the device has it (on a CPU its
    default loop is ten times slower); ``fused_ema_adamw`` adds the moving average of the weights. ``muon`` updates
    the groups that are marked for it by Muon and the others by AdamW.

    Raises:
        UserError: the optimizer is not available.
    """
    torch_groups = [group.to_optimizer_group(lr, weight_decay) for group in groups]
    fused: dict[str, Any] = {"fused": True} if accelerator.has_fused_optimizers() else {"foreach": True}
    if name == "sgd":
        return SGD(torch_groups, momentum=momentum, foreach=True)  # DTensor has no fused SGD
    adam = {"betas": betas, "eps": eps, **fused}
    if name == "muon":
        return MuonWithAdamW(
            [mine for group, mine in zip(groups, torch_groups, strict=True) if group.muon],
            [theirs for group, theirs in zip(groups, torch_groups, strict=True) if not group.muon],
            momentum=muon_momentum,
            ns_steps=ns_steps,
            rms=matched_adamw_rms,
            **adam,
        )
    if name != "adam":
        raise UserError(f"--optimizer {name}: not available in this version. Use 'adam', 'sgd' or 'muon'.")
    if selection == "fused_ema_adamw":
        return EMAAdamW(torch_groups, ema_decay=ema_decay, **adam)
    return AdamW(torch_groups, **adam)
