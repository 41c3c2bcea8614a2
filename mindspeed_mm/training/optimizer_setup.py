"""The optimizer of a run and its schedule, as the command line describes them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from mindspeed_mm.distributed import state
from mindspeed_mm.optimizer import (
    ParameterGroup,
    build_optimizer,
    build_param_groups,
    build_schedule,
    param_group_table,
)
from mindspeed_mm.optimizer.schedule import Schedule


def parameter_groups(
    args: Namespace, named_parameters: Iterable[tuple[str, nn.Parameter]], muon: Sequence[nn.Parameter] = ()
) -> list[ParameterGroup]:
    """Return the groups of the trainable parameters, and print them on rank 0; ``muon`` are those for Muon."""
    bare = [word for word in args.lr_scale_modules if "=" not in word]
    if bare and args.lr_mult == 1:
        state.warn_rank_0(
            f"--lr-scale-modules {' '.join(bare)}: no effect, they are scaled by --lr-mult, which is 1; add it, or "
            f"write {bare[0]}=0.1"
        )
    if args.lr_scale_modules and not bare and args.lr_mult != 1:
        state.warn_rank_0(f"--lr-mult {args.lr_mult}: no effect, every keyword of --lr-scale-modules has its own scale")
    groups = build_param_groups(
        named_parameters,
        weight_decay_exclude=args.weight_decay_exclude_modules,
        lr_scale=args.lr_scale_modules,
        lr_mult=args.lr_mult,
        decay_all=args.weight_decay_all,
        muon_matrices=muon,
    )
    for line in param_group_table(groups, args.lr, args.weight_decay):
        state.print_rank_0(line)
    return groups


def optimizer_from(args: Namespace, groups: Sequence[ParameterGroup]) -> Optimizer:
    """Return the optimizer over these groups."""
    return build_optimizer(
        groups,
        name=args.optimizer,
        selection=args.optimizer_selection,
        lr=args.lr,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
        momentum=args.sgd_momentum,
        ema_decay=args.ema_decay,
        muon_momentum=args.muon_momentum,
        ns_steps=args.ns_steps,
        matched_adamw_rms=args.matched_adamw_rms,
    )


def schedule_from(args: Namespace, optimizer: Optimizer) -> Schedule:
    """Return the schedule, the command line's iterations translated into the samples it counts in."""
    batch, wsd = args.global_batch_size, args.lr_wsd_decay_iters
    warmup = args.lr_warmup_iters
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * args.lr_decay_iters
    return build_schedule(
        optimizer,
        lr=args.lr,
        min_lr=args.min_lr,
        warmup_init=args.lr_warmup_init,
        warmup_samples=warmup * batch,
        decay_samples=args.lr_decay_iters * batch,
        decay_style=args.lr_decay_style,
        weight_decay=(args.start_weight_decay, args.end_weight_decay),
        weight_decay_style=args.weight_decay_incr_style,
        # A constant has no length, and then a longer --train-iters on resume changes nothing about it.
        weight_decay_samples=0 if args.weight_decay_incr_style == "constant" else args.train_iters * batch,
        wsd_decay_samples=None if wsd is None else wsd * batch,
        wsd_decay_style=args.lr_wsd_decay_style,
        use_checkpoint=args.use_checkpoint_opt_param_scheduler,
        override=args.override_opt_param_scheduler,
    )
