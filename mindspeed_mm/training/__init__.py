"""The training loop and what user scripts import around it.

Importing this package loads no torch, so that a script's ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindspeed_mm.arguments import get_args

if TYPE_CHECKING:
    from mindspeed_mm.distributed.state import print_rank_0, print_rank_last
    from mindspeed_mm.training.helpers import (
        average_losses_across_data_parallel_group,
        get_num_microbatches,
        unwrap_model,
    )

__all__ = [
    "average_losses_across_data_parallel_group",
    "get_args",
    "get_num_microbatches",
    "pretrain",
    "print_rank_0",
    "print_rank_last",
    "unwrap_model",
]


def pretrain(
    train_valid_test_dataset_provider: Callable[..., Any],
    model_provider: Callable[..., Any],
    model_type: Any,
    forward_step_func: Callable[..., Any],
    process_non_loss_data_func: Callable[..., Any] | None = None,
    extra_args_provider: Callable[..., Any] | None = None,
    args_defaults: dict[str, Any] | None = None,
) -> None:
    """Train a model: parse the command line, build everything from the callbacks, train, evaluate and save.

    Args:
        train_valid_test_dataset_provider: returns the train, validation and test loaders (or iterables, or
            iterators; each may be None). Called with the list of three sample counts if it takes an argument.
        model_provider: returns the model, on the CPU or the meta device.
        model_type: accepted for compatibility with Megatron scripts, and not used by the FSDP2 road.
        forward_step_func: ``forward_step(data_iterator, model) -> (output, loss_func)``, where
            ``loss_func(output)`` returns ``loss``, ``(loss, report)`` or ``(loss_sum, num_tokens, report)``.
        process_non_loss_data_func: accepted for compatibility with Megatron scripts, and never called.
        extra_args_provider: ``provider(parser) -> parser`` adds the script's own flags.
        args_defaults: defaults of this script for flags the user does not pass.

    A mistake of the user ends the job on all ranks with one message and exit code 1.
    """
    from mindspeed_mm.training.failures import report_failures

    with report_failures() as store_slot:
        from mindspeed_mm.training.run import run

        run(
            train_valid_test_dataset_provider,
            model_provider,
            forward_step_func,
            extra_args_provider,
            args_defaults or {},
            store_slot,
        )


def __getattr__(name: str) -> Any:
    if name in ("print_rank_0", "print_rank_last"):
        from mindspeed_mm.distributed import state

        return getattr(state, name)
    if name in __all__:
        from mindspeed_mm.training import helpers

        return getattr(helpers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
