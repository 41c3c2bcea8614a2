"""Save and load a run: weights and optimizer state as one distributed checkpoint, the rest as plain values beside it.

::

    iter_0000100/.metadata, __0_0.distcp, __1_0.distcp   tensors: model.<name>, optimizer.state.<name>.<state>
    iter_0000100/state.pt                                iteration, world size, optimizer groups, what the caller adds
    iter_0000100/rank_0.pt, rank_1.pt                    what each rank adds: random state, data position
    iter_0000100/manifest.json                           checksums of these files, digests of the tensors

Tensors are resharded when the world size changes; a rank's own state is only given back to the same world size.
Reading them runs no code, whoever wrote them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from mindspeed_mm.checkpoint.background import HostCopy
from mindspeed_mm.checkpoint.coordination import gather, rank, run_together, world_size
from mindspeed_mm.checkpoint.disks import complete
from mindspeed_mm.checkpoint.integrity import inspect
from mindspeed_mm.checkpoint.manifest import Manifest, Part, describe, record_file
from mindspeed_mm.checkpoint.optimizer_state import changed_settings
from mindspeed_mm.checkpoint.publish import RELEASE, find, find_all, folder_name, publish
from mindspeed_mm.checkpoint.python_state import encode_python_state, read_python_state, write_flushed
from mindspeed_mm.checkpoint.run_state import RunState, Selection, run_state
from mindspeed_mm.checkpoint.tensor_files import (
    DigestingPlanner,
    changed_tensors,
    read_tensors,
    write_tensors,
)
from mindspeed_mm.checkpoint.tensor_index import read_index
from mindspeed_mm.checkpoint.tensors import listing
from mindspeed_mm.errors import UserError

MODEL = "model."
STATE = "state.pt"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What `load` read besides the tensors.

    Attributes:
        iteration: completed iterations, 0 when only weights were taken.
        extra: what the saving run passed as ``extra``; empty when only weights were taken.
        rank_state: what this rank passed as ``rank_state``; None on another world size or with weights only.
        path: the checkpoint's folder.
        warnings: lines about weights that did not match, when ``strict`` was off, and about a checkpoint that was
            refused or cannot be verified.
    """

    iteration: int
    extra: dict[str, Any]
    rank_state: dict[str, Any] | None
    path: Path
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment, ready to be written.

    Attributes:
        iteration: completed iterations; names the folder.
        tensors: weights and optimizer state, live or copies.
        files: the other files of this rank, by name.
    """

    iteration: int
    tensors: dict[str, torch.Tensor]
    files: dict[str, bytes]


def take_snapshot(
    iteration: int,
    *,
    model: nn.Module | RunState,
    optimizer: Optimizer | None,
    extra: dict[str, Any],
    rank_state: dict[str, Any],
    adapters_only: bool = False,
    files: Mapping[str, bytes] | None = None,
    copy_to: HostCopy | None = None,
) -> Snapshot:
    """Collect what a checkpoint holds; with ``copy_to`` the run may go on while it is written.

    Args:
        iteration: completed iterations.
        model: its parameters and persistent buffers are saved, shared ones once.
        optimizer: its state, or None to leave it out; of a ``RunState`` it only says whether.
        extra: plain values that are the same on all ranks (scheduler, consumed samples); rank 0's are saved.
        rank_state: plain values of this rank (random state, data position).
        adapters_only: leave out the weights under the adapters, which can be read again where they came from.
        files: further files of this rank, by name.
        copy_to: where to copy the tensors to; None refers to the live ones.
    """
    run = run_state(model, optimizer)
    part: Selection = "adapters" if adapters_only else "all"
    tensors = {MODEL + names[0]: tensor for names, tensor in run.weights(part).items()}
    state = {"iteration": iteration, "world_size": world_size(), "extra": extra, "optimizer_groups": None}
    if optimizer is not None:
        tensors |= run.optimizer_tensors()
        state["optimizer_groups"] = run.optimizer_groups()
    own = Path(_rank_file(rank()))
    all_files = {**(files or {}), own.name: encode_python_state(rank_state, own.stem)}
    if rank() == 0:
        all_files[STATE] = encode_python_state(state, Path(STATE).stem)
    return Snapshot(iteration, copy_to.take(tensors) if copy_to else tensors, all_files)


def write_snapshot(
    save_dir: str | Path,
    snapshot: Snapshot,
    group: dist.ProcessGroup | None = None,
    validation_loss: float | None = None,
    keeper: bool | None = None,
) -> Path:
    """Write a snapshot as a checkpoint and make it the newest one; every rank calls this.

    Args:
        save_dir: the folder that holds the checkpoints.
        snapshot: of this rank.
        group: ranks that save; default all. Beside a running training it must be one that nothing else uses.
        validation_loss: goes into the manifest.
        keeper: whether this rank looks after the folder on its disk; default rank 0.

    Raises:
        UserError: a rank could not write; raised on all ranks. Earlier checkpoints are untouched.
    """

    def write(folder: Path) -> Part:
        part = write_part(snapshot.tensors, folder, group=group)
        for name, content in snapshot.files.items():
            write_flushed(folder / name, content)
            part.files[name] = record_file(folder / name)
        return part

    return publish(Path(save_dir), folder_name(snapshot.iteration), write, group, validation_loss, keeper)


def write_part(
    tensors: dict[str, torch.Tensor],
    folder: Path,
    planner: DigestingPlanner | None = None,
    group: dist.ProcessGroup | None = None,
) -> Part:
    """Write this rank's parts of ``tensors`` and return what the manifest has to know of them."""
    digests = write_tensors(tensors, folder, planner, group)
    written = [*folder.glob(f"__{rank()}_*.distcp"), *([folder / ".metadata"] if rank() == 0 else [])]
    return Part(
        files={path.name: record_file(path) for path in written},
        digests=digests,
        tensors={name: describe(tensor) for name, tensor in tensors.items()},
    )


def save(
    save_dir: str | Path,
    iteration: int,
    *,
    model: nn.Module | RunState,
    optimizer: Optimizer | None,
    extra: dict[str, Any],
    rank_state: dict[str, Any],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save a checkpoint and make it the newest one; every rank calls this.

    The arguments are those of `take_snapshot` and `write_snapshot`.

    Raises:
        UserError: a rank could not write; raised on all ranks. Earlier checkpoints are untouched.
    """
    snapshot = run_together(
        f"saving {Path(save_dir) / folder_name(iteration)}",
        lambda: take_snapshot(iteration, model=model, optimizer=optimizer, extra=extra, rank_state=rank_state),
        group,
    )
    return write_snapshot(save_dir, snapshot, group)


def load(
    load_dir: str | Path,
    *,
    model: nn.Module | RunState,
    optimizer: Optimizer | None,
    strict: bool = True,
    step: int | None = None,
    finetune: bool = False,
    fallback: bool = False,
    check: Callable[[Path], list[str]] | None = None,
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
        fallback: take the newest good checkpoint before it when this one is damaged or missing.
        check: says whether the checkpoint at a path may be loaded: returns lines to warn with, or raises.
        group: ranks that load; default all.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it does not fit. Nothing was changed when a file is
            damaged or the checkpoint does not fit.
    """
    path, manifest, notes = _choose(load_dir, step, fallback, group)
    run = run_state(model, optimizer)

    def prepare() -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
        notes.extend(check(path) if check else [])
        metadata = read_index(path)
        saved = _weights(metadata)
        tensors, problems = _match(_wanted(run, saved), saved, run.weight_names())
        if problems and strict:
            raise UserError("\n".join([f"{path} does not fit the model.", *problems, _STRICT_HINT]))
        if finetune or path.name == RELEASE:
            return _WEIGHTS_ONLY, tensors, problems
        state = _read_state(path)
        if optimizer is not None:
            if state["optimizer_groups"] is None:
                raise UserError(f"{path} was saved without optimizer state; pass --no-load-optim or --finetune")
            run.check_groups(state["optimizer_groups"])
            notes.extend(changed_settings(run.optimizer_groups(), state["optimizer_groups"]))
            tensors |= run.allocate_optimizer(metadata)
        return state, tensors, problems

    state, tensors, problems = run_together(f"loading {load_dir}", prepare, group)
    run_together(f"reading {path}", lambda: read_tensors(tensors, path, group=group), group)
    if manifest:
        _compare(tensors, path, manifest, group)
    run.loaded()
    if optimizer is not None and state["optimizer_groups"] is not None:
        run.restore_groups(state["optimizer_groups"])

    rank_state = None
    if state["world_size"] == world_size():
        file = path / _rank_file(rank())
        rank_state = run_together(f"reading {path}", lambda: read_python_state(file), group)
    return LoadedCheckpoint(state["iteration"], dict(state["extra"]), rank_state, path, [*notes, *problems])


_WEIGHTS_ONLY: dict[str, Any] = {"iteration": 0, "extra": {}, "world_size": None, "optimizer_groups": None}
_STRICT_HINT = "Load it with the model it was saved from, or pass --load-strict false to take what fits."


def load_base(
    load_dir: str | Path, *, model: nn.Module | RunState, strict: bool = True, group: dist.ProcessGroup | None = None
) -> list[str]:
    """Load a full checkpoint's weights under the adapters of ``model``; every rank calls this.

    Returns:
        Lines about weights that did not match, when ``strict`` is off.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it does not fit.
    """
    path, _, notes = _choose(load_dir, None, fallback=False, group=group)
    run = run_state(model, None)

    def prepare() -> tuple[dict[str, torch.Tensor], list[str]]:
        tensors, problems = _match(run.weights("base"), _weights(read_index(path)), run.weight_names())
        if problems and strict:
            raise UserError("\n".join([f"--load-base-model {path} does not fit the model.", *problems, _STRICT_HINT]))
        return tensors, problems

    tensors, problems = run_together(f"loading {load_dir}", prepare, group)
    run_together(f"reading {path}", lambda: read_tensors(tensors, path, group=group), group)
    run.loaded()
    return [*notes, *problems]


def _choose(
    load_dir: str | Path, step: int | None, fallback: bool, group: dist.ProcessGroup | None
) -> tuple[Path, Manifest | None, list[str]]:
    """Return the checkpoint to load, its manifest, and what there is to say about the choice."""

    def search() -> tuple[list[str], list[str]] | UserError:
        try:
            found, refused = find_all(load_dir, step) if fallback else ([find(load_dir, step)], [])
        except UserError as error:
            return error  # the disk of another host may have it
        return [os.path.relpath(path, load_dir) for path in found], refused

    answers = gather(run_together(f"loading {load_dir}", search, group), group)
    answer = next((answer for answer in answers if not isinstance(answer, UserError)), answers[0])
    if isinstance(answer, UserError):
        raise answer
    candidates, refused = answer
    for name in candidates:
        path = Path(os.path.normpath(Path(load_dir) / name))
        condition = inspect(path, group, alone=False, share=complete(path, group))
        if condition.good:
            notes = [*refused, f"loading {path} instead"] if refused else []
            if condition.manifest is None:
                notes.append(f"{path} has no manifest: whether it still is what was saved cannot be verified")
            return path, condition.manifest, notes
        refused.append("\n".join([f"{path} is damaged and is not loaded:", listing(condition.problems)]))
    remedy = "There is no good one before it." if fallback else _FALLBACK_HINT
    raise UserError("\n".join([*refused, remedy]))


_FALLBACK_HINT = "Pass --load-fallback to take the newest good checkpoint before it, or --ckpt-step for a certain one."


def _compare(tensors: dict[str, torch.Tensor], path: Path, manifest: Manifest, group: dist.ProcessGroup | None) -> None:
    """Check that what lies on the ranks now is what was saved, where it was not cast on the way."""
    digests = manifest.digests
    uncast = {
        name: tensor
        for name, tensor in tensors.items()
        if name in digests and describe(tensor)[1] == manifest.tensors[name].dtype
    }
    if changed := changed_tensors(uncast, digests, group):
        raise UserError(
            f"{path}: its files are whole, but {len(changed)} tensors came out other than they were saved; this is an "
            f"error in mindspeed-mm or in this machine's memory:\n{listing(changed)}"
        )


def _weights(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {
        key.removeprefix(MODEL): entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(MODEL) and isinstance(entry, TensorStorageMetadata) and not key.endswith("_extra_state")
    }


def _wanted(run: RunState, saved: Iterable[str]) -> dict[tuple[str, ...], torch.Tensor]:
    """Return the model's tensors that a checkpoint should have: the adapters, if it has nothing but adapters."""
    adapters = set(run.weight_names("adapters"))
    return run.weights("adapters" if adapters and adapters.issuperset(saved) else "all")


def _match(
    wanted: dict[tuple[str, ...], torch.Tensor], saved: dict[str, TensorStorageMetadata], elsewhere: Collection[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Pair the model's tensors with the checkpoint's; return these by key, and what does not match.

    What the checkpoint holds and only other ranks want is none of what does not match: ``elsewhere`` names it.
    """
    tensors, missing, reshaped = {}, [], []
    known: set[str] = set(elsewhere)
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
    if not (path / STATE).is_file():
        raise UserError(
            f"{path} has no {STATE}, so another program wrote it; pass --finetune to start from its weights"
        )
    return read_python_state(path / STATE)


def _rank_file(index: int) -> str:
    return f"rank_{index}.pt"
