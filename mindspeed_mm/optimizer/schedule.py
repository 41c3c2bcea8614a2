"""The schedule of learning rate and weight decay, megatron-core's, counted in samples."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from mindspeed_mm import accelerator
from mindspeed_mm.errors import UserError

accelerator.load_megatron_core()
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402


class Schedule(OptimizerParamScheduler):
    """megatron-core's scheduler with the two group multipliers on every supported version of it.

    At each step a group gets ``lr = scheduled_lr * lr_mult`` and ``weight_decay = scheduled_wd * wd_mult``.
    """

    num_steps: int

    def step(self, increment: int) -> None:
        """Advance by ``increment`` samples and write the new values into the optimizer's groups."""
        self.num_steps += increment
        for group in self.optimizer.param_groups:
            group["lr"] = self.get_lr(group) * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.get_wd() * group.get("wd_mult", 1.0)

    @property
    def current_lr(self) -> float:
        """The learning rate of a group without a multiplier of its own, for the log."""
        return float(self.get_lr({}))

    def preview(self, samples: int) -> float:
        """Return what :attr:`current_lr` is after so many samples."""
        before = self.num_steps
        self.num_steps = samples
        try:
            return self.current_lr
        finally:
            self.num_steps = before

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position, and check that the schedule is still the one that was saved.

        Raises:
            UserError: it is not, and neither of the two flags says which one counts.
        """
        self.num_steps = 0  # megatron-core adds the saved position to the present one
        try:
            super().load_state_dict(state_dict)
        except AssertionError as error:
            raise UserError(
                f"The schedule, in samples, differs from the checkpoint's: {_spaced(error)}. Pass "
                "--override-opt_param-scheduler to go on with the command line's values or "
                "--use-checkpoint-opt_param-scheduler for the saved ones."
            ) from error


def _spaced(error: AssertionError) -> str:
    return str(error).removeprefix("OptimizerParamScheduler: ").replace("checkpointvalue", "checkpoint value")


def build_schedule(
    optimizer: Optimizer,
    *,
    lr: float,
    min_lr: float,
    warmup_init: float,
    warmup_samples: int,
    decay_samples: int,
    decay_style: str,
    weight_decay: tuple[float, float],
    weight_decay_style: str,
    weight_decay_samples: int,
    wsd_decay_samples: int | None = None,
    wsd_decay_style: str | None = None,
    use_checkpoint: bool = False,
    override: bool = False,
) -> Schedule:
    """Build the schedule and set the first learning rate.

    Args:
        optimizer: its groups may carry ``lr_mult`` and ``wd_mult``.
        lr: peak learning rate, reached after the warm-up.
        min_lr: learning rate at the end of the decay and afterwards.
        warmup_init: learning rate at sample 0 of the linear warm-up.
        warmup_samples: length of the warm-up, in samples.
        decay_samples: sample at which the decay ends, warm-up included.
        decay_style: ``constant``, ``linear``, ``cosine``, ``inverse-square-root`` or ``WSD``.
        weight_decay: its first and last value.
        weight_decay_style: ``constant``, ``linear`` or ``cosine``.
        weight_decay_samples: sample at which the last value is reached.
        wsd_decay_samples: length of the final decay of ``WSD``, in samples.
        wsd_decay_style: ``exponential``, ``linear``, ``cosine`` or ``minus_sqrt``.
        use_checkpoint: a loaded checkpoint's schedule replaces this one.
        override: this schedule replaces a loaded checkpoint's.
    """
    return Schedule(
        optimizer,
        init_lr=warmup_init,
        max_lr=lr,
        min_lr=min_lr,
        lr_warmup_steps=warmup_samples,
        lr_decay_steps=decay_samples,
        lr_decay_style=decay_style,
        start_wd=weight_decay[0],
        end_wd=weight_decay[1],
        wd_incr_steps=weight_decay_samples,
        wd_incr_style=weight_decay_style,
        use_checkpoint_opt_param_scheduler=use_checkpoint,
        override_opt_param_scheduler=override,
        wsd_decay_steps=wsd_decay_samples,
        lr_wsd_decay_style=wsd_decay_style,
    )
