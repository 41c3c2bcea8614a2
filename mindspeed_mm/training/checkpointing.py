"""What a run saves and how it continues: the flags around ``--save`` and ``--load``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mindspeed_mm import accelerator
from mindspeed_mm.checkpoint import store
from mindspeed_mm.checkpoint.background import HostCopy
from mindspeed_mm.checkpoint.coordination import rank, run_together
from mindspeed_mm.checkpoint.hf_export import export_hf
from mindspeed_mm.checkpoint.hf_import import load_hf_weights
from mindspeed_mm.checkpoint.publish import TRACKER, clean_up
from mindspeed_mm.checkpoint.retention import Retention
from mindspeed_mm.distributed.state import print_rank_0, warn_rank_0
from mindspeed_mm.models.transformers_model import TransformersModel
from mindspeed_mm.optimizer.schedule import Schedule
from mindspeed_mm.training.saving import Saver


class Checkpointer:
    """Saves and restores everything a run needs to continue as if it had never stopped.

    Args:
        args: the parsed command line; its checkpoint flags are read here and nowhere else.
        model: the sharded model.
        optimizer: over its parameters.
        schedule: of that optimizer.
    """

    def __init__(self, args: Namespace, model: nn.Module, optimizer: Optimizer, schedule: Schedule) -> None:
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.saver: Saver | None = None
        if args.save:
            keep = Retention(args.keep_last, args.keep_every, args.keep_best)
            self.saver = Saver(args.save, beside=args.async_save, keep=keep)
        self._rank_state: dict[str, Any] | None = None
        self._consumed_samples = 0

    def load(self) -> tuple[int, int]:
        """Load the newest checkpoint under ``--auto-resume``, else what ``--load`` names, else initial weights.

        Returns:
            The iteration and the number of consumed training samples to continue from.

        Raises:
            UserError: what is to be loaded holds no checkpoint, or one that does not fit.
        """
        args = self.args
        if args.save and Path(args.save).is_dir():
            run_together(f"cleaning {args.save}", lambda: clean_up(Path(args.save)) if rank() == 0 else None)
        resumes = args.auto_resume and args.save is not None and (Path(args.save) / TRACKER).is_file()
        folder = args.save if resumes else args.load
        if folder is None:
            self._load_initial_weights()
            return 0, 0
        loaded = store.load(
            folder,
            model=self.model,
            optimizer=None if args.no_load_optim else self.optimizer,
            strict=args.load_strict,
            step=None if resumes else args.ckpt_step,
            finetune=args.finetune and not resumes,
            fallback=args.load_fallback,
        )
        print_rank_0(f" loading checkpoint from {loaded.path} at iteration {loaded.iteration}")
        for warning in loaded.warnings:
            warn_rank_0(warning)
        if not loaded.extra:  # weights only
            return 0, 0
        if not args.no_load_optim and "schedule" in loaded.extra:
            self.schedule.load_state_dict(loaded.extra["schedule"])
        self._rank_state = loaded.rank_state
        self._consumed_samples = loaded.extra["consumed_train_samples"]
        if loaded.rank_state is None:
            warn_rank_0(
                f"{loaded.path} was saved by another number of ranks: the sample order continues where it was, "
                "random numbers (dropout) do not."
            )
        return loaded.iteration, self._consumed_samples

    def _load_initial_weights(self) -> None:
        source = getattr(self.model, "weights_source", None)
        if source is not None:
            print_rank_0(f" loading weights from {source}")
            load_hf_weights(self.model.model, source, strict=self.args.load_strict)

    def restore_iterators(self, iterators: Mapping[str, Any]) -> None:
        """Put the data iterators where the checkpoint left them.

        Iterators that cannot be positioned are advanced batch by batch, which is said, because it takes time.
        """
        saved = (self._rank_state or {}).get("iterators", {})
        for name, iterator in iterators.items():
            if iterator is None:
                continue
            batches = self._consumed_samples // (self.args.micro_batch_size * self.args.data_parallel_size)
            if name in saved and hasattr(iterator, "load_state_dict"):
                iterator.load_state_dict(saved[name])
            elif name == "train" and batches and hasattr(iterator, "seek"):
                iterator.seek(batches)
            elif name == "train" and batches:
                print_rank_0(f" replaying {batches} batches: the {name} data is an iterator without a position")
                for _ in range(batches):
                    next(iterator)

    def restore_rng(self) -> None:
        """Continue the random streams of this rank, if the checkpoint has them."""
        if self._rank_state and "rng" in self._rank_state and not self.args.no_load_rng:
            accelerator.set_rng_state(self._rank_state["rng"])
        self._rank_state = None

    def save(
        self, iteration: int, consumed_samples: int, iterators: Mapping[str, Any], loss: float | None = None
    ) -> None:
        """Save the run, with the validation loss of this iteration if there is one. A collective."""
        args = self.args
        assert self.saver is not None
        rank_state: dict[str, Any] = {
            "iterators": {name: it.state_dict() for name, it in iterators.items() if hasattr(it, "state_dict")}
        }
        if not args.no_save_rng:
            rank_state["rng"] = accelerator.rng_state()
        extra: dict[str, Any] = {"consumed_train_samples": consumed_samples, "args": _plain(vars(args))}
        if not args.no_save_optim:
            extra["schedule"] = self.schedule.state_dict()

        def take(copy_to: HostCopy | None) -> store.Snapshot:
            return store.take_snapshot(
                iteration,
                model=self.model,
                optimizer=None if args.no_save_optim else self.optimizer,
                extra=extra,
                rank_state=rank_state,
                copy_to=copy_to,
            )

        self.saver.save(iteration, take, loss)

    def export_hf(self, folder: str) -> None:
        """Write the trained model as a Hugging Face folder. A collective."""
        export_hf(hf_model(self.model), folder, assets_from=getattr(self.model, "hf_path", None))
        print_rank_0(f" exported a Hugging Face folder to {folder}")


def hf_model(model: nn.Module) -> Any:
    """Return the Hugging Face model inside ours, or ``model`` itself, which may be one."""
    return model.model if isinstance(model, TransformersModel) else model


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are plain values: what a checkpoint can hold without running code when read."""
    kinds = (str, int, float, bool, type(None))
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, kinds) or (isinstance(value, list) and all(isinstance(v, kinds) for v in value))
    }
