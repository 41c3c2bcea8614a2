"""What a run saves and how it continues: the flags around ``--save`` and ``--load``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from mindspeed_mm import accelerator
from mindspeed_mm.checkpoint import store
from mindspeed_mm.checkpoint.adapters import adapter_config, adapter_files, check_adapters, write_adapter
from mindspeed_mm.checkpoint.background import HostCopy
from mindspeed_mm.checkpoint.coordination import gather, run_together
from mindspeed_mm.checkpoint.hf_export import check_target, export_hf
from mindspeed_mm.checkpoint.hf_import import load_hf_weights
from mindspeed_mm.checkpoint.publish import TRACKER, checkpoints_in, clean_up, is_hf_folder, iteration_of
from mindspeed_mm.checkpoint.retention import Retention
from mindspeed_mm.checkpoint.run_state import ModuleState, RunState
from mindspeed_mm.distributed.main_parameters import unwrap
from mindspeed_mm.distributed.state import print_rank_0, warn_rank_0
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.transformers_model import TransformersModel
from mindspeed_mm.optimizer.schedule import Schedule
from mindspeed_mm.optimizer.selection import EMAAdamW, averaged_weights
from mindspeed_mm.training.saving import Saver


class Checkpointer:
    """Saves and restores everything a run needs to continue as if it had never stopped.

    Args:
        args: the parsed command line; its checkpoint flags are read here and nowhere else.
        model: the sharded model.
        optimizer: over its parameters.
        schedule: of that optimizer.
        state: what the store is given of model and optimizer; default these themselves.
        keeper: whether this rank looks after ``--save`` on its disk; default rank 0.
    """

    def __init__(
        self,
        args: Namespace,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        state: RunState | None = None,
        keeper: bool | None = None,
    ) -> None:
        self.args = args
        self.state = state or ModuleState(model, optimizer)
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.saver: Saver | None = None
        if args.save:
            keep = Retention(args.keep_last, args.keep_every, args.keep_best)
            self.saver = Saver(args.save, beside=args.async_save, keep=keep, form=args.ckpt_format, keeper=keeper)
        self._rank_state: dict[str, Any] | None = None
        self._positions: dict[str, Any] = {}
        self._consumed_samples = 0
        self._adapters = self.adapter_config()
        # Weights that do not change and can be read again are not saved.
        self._adapters_only = getattr(self._adapters, "base_model_name_or_path", None) is not None
        self._loaded: Path | None = None
        self._loaded_whole = False

    @property
    def layout(self) -> dict[str, Any]:
        """How the model is split; the same on all ranks."""
        return {}

    def random_state(self) -> dict[str, Any]:
        """Return the state of all generators of this rank."""
        return accelerator.rng_state()

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`random_state` returned."""
        accelerator.set_rng_state(state)

    def adapter_config(self) -> Any:
        """Return peft's configuration of the adapters, as it is written; None without adapters."""
        return adapter_config(hf_model(self.model))

    def adapter_files(self) -> dict[str, bytes]:
        """Return the files of the adapters, on rank 0. A collective."""
        return adapter_files(hf_model(self.model))

    def read_hf(self, folder: str) -> list[str]:
        """Read the weights of a Hugging Face folder, also those under adapters; return what did not match."""
        model = hf_model(self.model)
        if not isinstance(model, PreTrainedModel):
            raise UserError(
                f"{folder} is a Hugging Face folder, and the model of this run is no Hugging Face model; pass a "
                "checkpoint, or read the folder where the model is built."
            )
        return load_hf_weights(model, folder, strict=self.args.load_strict)

    def weights_source(self) -> Any:
        """Return the folder that the model starts from, None for random weights."""
        return getattr(self.model, "weights_source", None)

    @property
    def newest(self) -> Path | None:
        """The newest whole checkpoint that this run has saved, or started from."""
        return (self.saver.newest if self.saver else None) or self._loaded

    @property
    def resumes_itself(self) -> bool:
        """Whether the run goes on from a checkpoint in its own ``--save``."""
        return self.newest is not None and self.newest.parent.resolve() == Path(self.args.save or "").resolve()

    @property
    def can_go_back(self) -> bool:
        """Whether the newest checkpoint is all of a state that the run has been in.

        Raises:
            UserError: it is not, and to save that state would replace it.
        """
        if self.newest is None or self._loaded_whole or self.newest != self._loaded:
            return self.newest is not None
        if self.resumes_itself:
            raise UserError(
                f"--nan-policy rollback would go back to {self.newest}, of which --no-load-optim, --no-load-rng or "
                "--load-strict false takes a part only; give --save another folder, or load all of it."
            )
        return False

    def load(self) -> tuple[int, int]:
        """Load the newest checkpoint under ``--auto-resume``, else what ``--load`` names, else initial weights.

        ``--load`` may name a Hugging Face folder, whose weights take the place of the initial ones.

        Returns:
            The iteration and the number of consumed training samples to continue from.

        Raises:
            UserError: what is to be loaded holds no checkpoint, or one that does not fit.
        """
        args = self.args
        resumes, step = False, None
        if self.saver:
            keeps = self.saver.keeper and Path(args.save).is_dir()
            run_together(f"cleaning {args.save}", lambda: clean_up(Path(args.save)) if keeps else None)
            if args.auto_resume:  # each host's disk may be another, and one of them new
                resumes, step = max(gather(self._to_resume()), key=lambda answer: answer[0])
        folder = args.save if resumes else args.load
        if folder and not self._adapters and args.ckpt_step is None and gather(is_hf_folder(folder))[0]:
            self._load_hf(folder)
            return 0, 0
        if folder is None or self._adapters:
            self._load_initial_weights()
        if folder is None:
            return 0, 0
        loaded = store.load(
            folder,
            model=self.state,
            optimizer=None if args.no_load_optim else self.optimizer,
            strict=args.load_strict,
            step=step if resumes else args.ckpt_step,
            finetune=args.finetune and not resumes,
            fallback=args.load_fallback,
            check=lambda path: check_adapters(path, self._adapters),
        )
        print_rank_0(f" loading checkpoint from {loaded.path} at iteration {loaded.iteration}")
        for warning in loaded.warnings:
            warn_rank_0(warning)
        if not loaded.extra:  # weights only
            return 0, 0
        averages = [state for state in self.optimizer.state.values() if "ema" in state]
        if averages and not isinstance(self.optimizer, EMAAdamW):
            for state in averages:
                del state["ema"]
            warn_rank_0(
                f"{loaded.path} holds averaged weights, which are left behind here; --optimizer-selection "
                "fused_ema_adamw goes on with them"
            )
        if not args.no_load_optim and "schedule" in loaded.extra:
            self.schedule.load_state_dict(loaded.extra["schedule"])
        alike = loaded.extra.get("layout", {}) == self.layout
        self._rank_state = loaded.rank_state if alike else None
        if self._rank_state and args.no_load_rng:
            self._rank_state.pop("rng", None)
        self._consumed_samples = loaded.extra["consumed_train_samples"]
        self._loaded = loaded.path
        self._loaded_whole = args.load_strict and not args.no_load_optim and not args.no_load_rng
        self._positions = loaded.extra.get("positions", {})
        if self._rank_state is None:
            warn_rank_0(
                f"{loaded.path} was saved by another number of ranks{'' if alike else ' or parallel layout'}: the "
                "sample order continues where it was, random numbers (dropout) do not."
            )
        return loaded.iteration, self._consumed_samples

    def _to_resume(self) -> tuple[bool, int | None]:
        """Return whether ``--save`` has a checkpoint, and its iteration where no tracker file names it."""
        folder = Path(self.args.save)
        if (folder / TRACKER).is_file():
            return True, None
        # Killed between the first checkpoint and its tracker, or copied without it: that is no reason to start over.
        saved = [iteration_of(path) for path in checkpoints_in(folder)] if folder.is_dir() else []
        newest = next((iteration for iteration in reversed(saved) if iteration is not None), None)
        if newest is not None:
            warn_rank_0(f"--save {folder} has checkpoints and no {TRACKER}: going on from iteration {newest}")
        return newest is not None, newest

    def go_back(self, iterators: Mapping[str, Any]) -> tuple[int, int]:
        """Put everything back to the newest checkpoint of this run. A collective.

        Returns:
            The iteration and the number of consumed training samples to continue from.
        """
        if self.saver:
            self.saver.wait()
        assert self.newest is not None
        loaded = store.load(self.newest, model=self.state, optimizer=self.optimizer)
        print_rank_0(f" going back to checkpoint {loaded.path} at iteration {loaded.iteration}")
        self.schedule.load_state_dict(loaded.extra["schedule"])
        self._rank_state, self._consumed_samples = loaded.rank_state, loaded.extra["consumed_train_samples"]
        self._positions = loaded.extra.get("positions", {})
        self.restore_iterators(iterators)
        self.restore_rng()
        return loaded.iteration, self._consumed_samples

    def where_to_resume(self) -> str:
        """Tell how to continue after the run has ended without saving its last state."""
        if self.saver:
            self.saver.wait()
        if self.newest is None:
            return "no checkpoint was saved before it: start over" + (
                ", with a smaller --save-interval" if self.args.save else ", with --save and --save-interval"
            )
        iteration = int(self.newest.name.removeprefix("iter_"))
        return f"resume from iteration {iteration}: --load {self.newest.parent}"

    def _load_initial_weights(self) -> None:
        base = self.args.load_base_model
        if base is not None and not is_hf_folder(base):
            print_rank_0(f" loading the weights under the adapters from {base}")
            for warning in store.load_base(base, model=self.state, strict=self.args.load_strict):
                warn_rank_0(warning)
        elif folder := base or self.weights_source():
            self._load_hf(folder)

    def _load_hf(self, folder: str) -> None:
        print_rank_0(f" loading weights from {folder}")
        for warning in self.read_hf(folder):
            warn_rank_0(warning)

    def restore_iterators(self, iterators: Mapping[str, Any]) -> None:
        """Put the data iterators where the checkpoint left them.

        Iterators that cannot be positioned are advanced batch by batch, which is said, because it takes time.
        """
        own = (self._rank_state or {}).get("iterators", {})
        for name, iterator in iterators.items():
            if iterator is None:
                continue
            saved = self._positions if getattr(iterator, "shared_position", False) else own
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
        if self._rank_state and "rng" in self._rank_state:
            self.set_random_state(self._rank_state["rng"])
        self._rank_state = None

    def save(
        self, iteration: int, consumed_samples: int, iterators: Mapping[str, Any], loss: float | None = None
    ) -> None:
        """Save the run, with the validation loss of this iteration if there is one. A collective."""
        args = self.args
        assert self.saver is not None
        states = {name: it.state_dict() for name, it in iterators.items() if hasattr(it, "state_dict")}
        shared = {name for name in states if getattr(iterators[name], "shared_position", False)}
        rank_state: dict[str, Any] = {"iterators": {name: states[name] for name in states.keys() - shared}}
        if not args.no_save_rng:
            rank_state["rng"] = self.random_state()
        extra: dict[str, Any] = {
            "consumed_train_samples": consumed_samples,
            "args": plain_values(vars(args)),
            "layout": self.layout,
        }
        extra["positions"] = one_position(gather({name: states[name] for name in shared}))
        if not args.no_save_optim:
            extra["schedule"] = self.schedule.state_dict()

        def take(copy_to: HostCopy | None) -> store.Snapshot:
            return store.take_snapshot(
                iteration,
                model=self.state,
                optimizer=None if args.no_save_optim else self.optimizer,
                extra=extra,
                rank_state=rank_state,
                adapters_only=self._adapters_only,
                files=self.adapter_files() if self._adapters else None,
                copy_to=copy_to,
            )

        self.saver.save(iteration, take, loss)

    def check_export(self, folder: str) -> None:
        """See that `export_hf` will be able to write ``folder``. A collective.

        Raises:
            UserError: it will not.
        """
        check_target(folder, None if self._adapters else self._assets())

    def export_hf(self, folder: str) -> None:
        """Write the trained model as a Hugging Face folder. A collective.

        Of a model with adapters it is a peft folder; averaged weights go to ``<folder>-ema``.
        """
        self.write_hf(folder)
        print_rank_0(f" exported {'the adapters' if self._adapters else 'a Hugging Face folder'} to {folder}")
        if isinstance(self.optimizer, EMAAdamW):
            folder = f"{folder.rstrip('/')}-ema"
            with averaged_weights(self.optimizer):
                self.write_hf(folder)
            print_rank_0(f" exported the averaged weights to {folder}")

    def write_hf(self, folder: str) -> None:
        """Write the weights as they are."""
        if self._adapters:
            write_adapter(self.adapter_files(), folder)
        else:
            export_hf(hf_model(self.model), folder, assets_from=self._assets())

    def _assets(self) -> str | None:
        """Return the folder with the tokenizer and the processor that an export copies."""
        return getattr(self.model, "hf_path", None)


def one_position(of_ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the positions that all ranks share, given those of each rank.

    Raises:
        UserError: two are not at the same place. Which samples share a pack depends on what a rank reads; where a host
            lacks a file, samples would be lost and others come twice without a word.
    """
    found: dict[str, tuple[int, Any]] = {}
    for number, positions in enumerate(of_ranks):
        for name, position in positions.items():
            first, expected = found.setdefault(name, (number, position))
            if position != expected:
                raise UserError(
                    f"the ranks have come apart in the {name} data: rank {number} is at {position}, rank {first} at "
                    f"{expected}. They have read different data; let all hosts have the same files, and resume from "
                    "the checkpoint before this one"
                )
    return {name: position for name, (_, position) in found.items()}


def base_folder(args: Namespace, model: nn.Module) -> str | None:
    """Return where the weights under the adapters of ``model`` can be read again, None if nowhere."""
    return args.load_base_model or getattr(model, "pretrained_from", None)


def hf_model(model: nn.Module) -> Any:
    """Return the Hugging Face model inside ours, or the one it is built after, or ``model``, which may be one."""
    if isinstance(model, nn.ModuleList):  # the chunks of a Megatron model
        blueprint = getattr(unwrap(model[0]), "blueprint", None)
        return model if blueprint is None else blueprint.model
    return model.model if isinstance(model, TransformersModel) else model


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are plain values: what a checkpoint can hold without running code when read."""
    kinds = (str, int, float, bool, type(None))
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, kinds) or (isinstance(value, list) and all(isinstance(v, kinds) for v in value))
    }
