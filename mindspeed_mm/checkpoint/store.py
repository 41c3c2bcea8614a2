"""Save and load a run: weights and optimizer state as one distributed checkpoint, the rest as plain values beside it.

::

    iter_0000100/.metadata, __0_0.distcp, __1_0.distcp   tensors: model.<name>, optimizer.state.<name>.<state>
    iter_0000100/state.pt                                iteration, world size, optimizer groups, what the caller adds
    iter_0000100/rank_0.pt, rank_1.pt                    what each rank adds: random state, data position

Tensors are resharded when the world size changes; a rank's own state is only given back to the same world size.
Nothing but DCP's ``.metadata`` index is a pickle that could run code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from mindspeed_mm.checkpoint.coordination import condense, rank, run_together, world_size
from mindspeed_mm.checkpoint.optimizer_state import (
    allocate_state,
    check_groups,
    optimizer_groups,
    optimizer_tensors,
    restore_groups,
)
from mindspeed_mm.checkpoint.publish import RELEASE, find, folder_name, publish
from mindspeed_mm.checkpoint.python_state import read_python_state, write_python_state
from mindspeed_mm.checkpoint.tensors import listing, named_tensors
from mindspeed_mm.errors import UserError

MODEL = "model."
_STATE = "state.pt"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What `load` read besides the tensors.

    Attributes:
        iteration: completed iterations, 0 when only weights were taken.
        extra: what the saving run passed as ``extra``; empty when only weights were taken.
        rank_state: what this rank passed as ``rank_state``; None on another world size or with weights only.
        path: the checkpoint's folder.
        warnings: lines about weights that did not match, when ``strict`` was off.
    """

    iteration: int
    extra: dict[str, Any]
    rank_state: dict[str, Any] | None
    path: Path
    warnings: list[str] = field(default_factory=list)


def save(
    save_dir: str | Path,
    iteration: int,
    *,
    model: nn.Module,
    optimizer: Optimizer | None,
    extra: dict[str, Any],
    rank_state: dict[str, Any],
    adapters_only: bool = False,
    beside: Callable[[Path], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save a checkpoint and make it the newest one; every rank calls this.

    Args:
        save_dir: the folder that holds the checkpoints.
        iteration: completed iterations; names the folder.
        model: its parameters and persistent buffers are saved, shared ones once.
        optimizer: its state, or None to leave it out.
        extra: plain values that are the same on all ranks (scheduler, consumed samples); rank 0's are saved.
        rank_state: plain values of this rank (random state, data position).
        adapters_only: leave out the weights under the adapters, which can be read again where they came from.
        beside: writes further files into the checkpoint's folder; called on every rank, must not communicate.
        group: ranks that save; default all.

    Raises:
        UserError: a rank could not write; raised on all ranks. Earlier checkpoints are untouched.
    """
    part: Literal["all", "adapters"] = "adapters" if adapters_only else "all"
    tensors = {MODEL + names[0]: tensor for names, tensor in named_tensors(model, part).items()}
    state = {"iteration": iteration, "world_size": world_size(), "extra": extra, "optimizer_groups": None}
    if optimizer is not None:
        tensors |= optimizer_tensors(model, optimizer)
        state["optimizer_groups"] = optimizer_groups(model, optimizer)

    def write(folder: Path) -> None:
        write_tensors(tensors, folder, group=group)
        write_python_state(folder / _rank_file(rank()), rank_state)
        if beside is not None:
            beside(folder)
        if rank() == 0:
            write_python_state(folder / _STATE, state)

    return publish(Path(save_dir), folder_name(iteration), write, group)


def load(
    load_dir: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizer | None,
    strict: bool = True,
    step: int | None = None,
    finetune: bool = False,
    group: dist.ProcessGroup | None = None,
) -> LoadedCheckpoint:
    """Load a checkpoint into ``model`` and ``optimizer``; every rank calls this.

    A checkpoint of adapters alone leaves the weights under them as they are.

    Args:
        load_dir: the folder that holds the tracker file, or one checkpoint's folder.
        model: plain or sharded, with storage (not on meta).
        optimizer: built over the model's parameters; None leaves its state out.
        strict: whether weights that are missing, unexpected or of another shape are an error.
        step: the iteration to load instead of the tracker's.
        finetune: take the weights only and start at iteration 0, as is always done for ``release``.
        group: ranks that load; default all.

    Raises:
        UserError: there is no such checkpoint, it cannot be read, or it does not fit. Nothing was changed when the
            checkpoint does not fit.
    """

    def prepare() -> tuple[Path, dict[str, Any], dict[str, torch.Tensor], list[str]]:
        path = find(load_dir, step)
        metadata = read_metadata(path)
        saved = _weights(metadata)
        tensors, problems = _match(_wanted(model, saved), saved)
        if problems and strict:
            raise UserError("\n".join([f"{path} does not fit the model.", *problems, _STRICT_HINT]))
        if finetune or path.name == RELEASE:
            return path, _WEIGHTS_ONLY, tensors, problems
        state = _read_state(path)
        if optimizer is not None:
            if state["optimizer_groups"] is None:
                raise UserError(f"{path} was saved without optimizer state; pass --no-load-optim or --finetune")
            check_groups(model, optimizer, state["optimizer_groups"])
            tensors |= allocate_state(model, optimizer, metadata)
        return path, state, tensors, problems

    path, state, tensors, problems = run_together(f"loading {load_dir}", prepare, group)
    run_together(f"reading {path}", lambda: read_tensors(tensors, path, group=group), group)
    if optimizer is not None and state["optimizer_groups"] is not None:
        restore_groups(model, optimizer, state["optimizer_groups"])

    rank_state = None
    if state["world_size"] == world_size():
        file = path / _rank_file(rank())
        rank_state = run_together(f"reading {path}", lambda: read_python_state(file), group)
    return LoadedCheckpoint(state["iteration"], dict(state["extra"]), rank_state, path, problems)


_WEIGHTS_ONLY: dict[str, Any] = {"iteration": 0, "extra": {}, "world_size": None, "optimizer_groups": None}
_STRICT_HINT = "Load it with the model it was saved from, or pass --load-strict false to take what fits."


def load_base(
    load_dir: str | Path, *, model: nn.Module, strict: bool = True, group: dist.ProcessGroup | None = None
) -> list[str]:
    """Load a full checkpoint's weights under the adapters of ``model``; every rank calls this.

    Returns:
        Lines about weights that did not match, when ``strict`` is off.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or it does not fit.
    """

    def prepare() -> tuple[Path, dict[str, torch.Tensor], list[str]]:
        path = find(load_dir)
        tensors, problems = _match(named_tensors(model, "base"), _weights(read_metadata(path)))
        if problems and strict:
            raise UserError("\n".join([f"--load-base-model {path} does not fit the model.", *problems, _STRICT_HINT]))
        return path, tensors, problems

    path, tensors, problems = run_together(f"loading {load_dir}", prepare, group)
    run_together(f"reading {path}", lambda: read_tensors(tensors, path, group=group), group)
    return list(problems)


def _weights(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {
        key.removeprefix(MODEL): entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(MODEL) and isinstance(entry, TensorStorageMetadata) and not key.endswith("_extra_state")
    }


def _wanted(model: nn.Module, saved: Iterable[str]) -> dict[tuple[str, ...], torch.Tensor]:
    """Return the model's tensors that a checkpoint should have: the adapters, if it has nothing but adapters."""
    adapters = named_tensors(model, "adapters")
    alone = adapters and {name for names in adapters for name in names}.issuperset(saved)
    return adapters if alone else named_tensors(model)


def _match(
    wanted: dict[tuple[str, ...], torch.Tensor], saved: dict[str, TensorStorageMetadata]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Pair the model's tensors with the checkpoint's; return these by key, and what does not match."""
    tensors, missing, reshaped = {}, [], []
    known: set[str] = set()
    for names, tensor in wanted.items():
        known.update(names)
        name = next((name for name in names if name in saved), None)
        if name is None:
            missing.append(names[0])
        elif saved[name].size != tensor.shape:
            reshaped.append(f"{name}: saved {tuple(saved[name].size)}, model {tuple(tensor.shape)}")
        else:
            tensors[MODEL + name] = tensor
    problems = {
        "missing from the checkpoint": missing,
        "in the checkpoint but not in the model": sorted(saved.keys() - known),
        "of another shape": reshaped,
    }
    return tensors, [f"{len(names)} weights {what}:\n{listing(names)}" for what, names in problems.items() if names]


def _read_state(path: Path) -> dict[str, Any]:
    if not (path / _STATE).is_file():
        raise UserError(
            f"{path} has no {_STATE}, so another program wrote it; pass --finetune to start from its weights"
        )
    return read_python_state(path / _STATE)


def _rank_file(index: int) -> str:
    return f"rank_{index}.pt"


def read_metadata(path: Path) -> Metadata:
    """Return the index of a checkpoint's tensors.

    Raises:
        UserError: the index is damaged.
    """
    try:
        return dcp.FileSystemReader(path).read_metadata()
    except Exception as error:
        raise UserError(
            f"cannot read {path / '.metadata'}: {condense(error)}; pass --ckpt-step for another checkpoint"
        ) from error


def write_tensors(
    tensors: dict[str, torch.Tensor],
    folder: Path,
    planner: dcp.SavePlanner | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write this rank's parts of ``tensors`` to ``folder`` and flush them to the disk."""
    with _one_process_is_fine():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), planner=planner, process_group=group)


def read_tensors(tensors: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Fill ``tensors`` in place from the checkpoint in ``folder``, casting to their dtypes."""
    with _one_process_is_fine():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), process_group=group)


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Silence DCP's warning that no process group exists."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to .* in a single process.*")
        yield
