"""Which tensors differ between two places that hold weights: checkpoints, DCP folders, Hugging Face folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mindspeed_mm.checkpoint import manifest
from mindspeed_mm.checkpoint.convert import model_skeleton
from mindspeed_mm.checkpoint.hf_folder import open_weights
from mindspeed_mm.checkpoint.hf_layout import plan_import
from mindspeed_mm.checkpoint.megatron_folder import is_megatron_folder, read_megatron
from mindspeed_mm.checkpoint.publish import find, is_hf_folder
from mindspeed_mm.checkpoint.store import MODEL
from mindspeed_mm.checkpoint.tensor_files import TensorReader
from mindspeed_mm.checkpoint.tensors import named_tensors
from mindspeed_mm.errors import UserError


@dataclass(frozen=True)
class Entry:
    """A stored tensor: its full shape, its dtype, how to read it, and its digest if that is known."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    digest: str | None = None


@dataclass(frozen=True)
class Difference:
    """How a tensor differs.

    Attributes:
        name: of the tensor.
        reason: why the values cannot be compared (only in one place, another shape), else empty.
        max_abs: largest absolute difference of an element.
        relative_l2: L2 norm of the difference over that of the first tensor.
    """

    name: str
    reason: str = ""
    max_abs: float = math.nan
    relative_l2: float = math.nan


@contextmanager
def open_tensors(folder: Path) -> Iterator[tuple[Path, dict[str, Entry], bool]]:
    """Open what holds tensors: a checkpoint, a run's folder, a DCP folder, a Hugging Face folder, one of Megatron.

    Gives the folder that is read, its tensors by name, and whether they are a Hugging Face model's, whose names have
    no ``model.model.`` before them.

    Raises:
        UserError: the folder holds none of these.
    """
    with ExitStack() as stack:
        if is_hf_folder(folder):
            bare = model_skeleton(folder)
            stored = stack.enter_context(open_weights(folder))
            first_name = {name: names[0] for names in named_tensors(bare) for name in names}
            entries: dict[str, Entry] = {}
            plan = plan_import(bare, stored, first_name)
            for key in plan.unexpected:
                entries[key] = Entry(tuple(stored[key].meta.shape), stored[key].meta.dtype, stored[key].read)
            for step in plan.steps:
                for name, tensor in step.outputs.items():

                    def read(step=step, name=name) -> torch.Tensor:  # type: ignore[no-untyped-def]
                        return step.run(bare, stored)[name]

                    entries[first_name[name]] = Entry(tuple(tensor.shape), tensor.dtype, read)
            yield folder, entries, True
        elif is_megatron_folder(folder):
            path, weights, state = read_megatron(folder)
            tensors = {**{MODEL + name: tensor for name, tensor in weights.items()}, **state}
            yield path, {name: _in_memory(tensor) for name, tensor in tensors.items()}, False
        else:
            path = find(folder)
            yield path, _checkpoint_entries(path), False


def _in_memory(tensor: torch.Tensor) -> Entry:
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _checkpoint_entries(path: Path) -> dict[str, Entry]:
    known = manifest.read(path)
    reader = TensorReader(path)
    entries = {}
    for name, stored in reader.metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):

            def read(name=name, stored=stored) -> torch.Tensor:  # type: ignore[no-untyped-def]
                tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
                reader.read({name: tensor})
                return tensor

            digest = known.tensors[name].digest if known and name in known.tensors else None
            entries[name] = Entry(tuple(stored.size), stored.properties.dtype, read, digest)
    return entries


def differences(a: Path, b: Path, *, weights_only: bool = False) -> tuple[int, list[Difference]]:
    """Compare two places, tensor by tensor.

    With a Hugging Face folder on one side, only weights are compared.

    Returns:
        The number of tensors compared or found in one place only, and what differs.

    Raises:
        UserError: a folder holds no tensors, or they have no names in common.
    """
    with open_tensors(a) as (_, first, first_is_hf), open_tensors(b) as (_, second, second_is_hf):
        if first_is_hf != second_is_hf:
            hf, other = (first, second) if first_is_hf else (second, first)
            prefix = max((MODEL + "model.", MODEL), key=lambda prefix: sum(prefix + name in other for name in hf))
            renamed = {prefix + name: entry for name, entry in hf.items()}
            first, second = (renamed, second) if first_is_hf else (first, renamed)
            weights_only = True
        if weights_only and not (first_is_hf and second_is_hf):
            first, second = ({k: v for k, v in x.items() if k.startswith(MODEL)} for x in (first, second))
        if first.keys().isdisjoint(second):
            raise UserError(
                f"{a} and {b} have no tensor name in common: {_one_of(first)} here, {_one_of(second)} there"
            )
        names = sorted(first.keys() | second.keys())
        found = [_compare(name, first.get(name), second.get(name), a, b) for name in names]
        return len(names), [difference for difference in found if difference is not None]


def _one_of(entries: dict[str, Entry]) -> str:
    return next(iter(sorted(entries)), "nothing")


def _compare(name: str, a: Entry | None, b: Entry | None, in_a: Path, in_b: Path) -> Difference | None:
    if a is None or b is None:
        return Difference(name, f"only in {in_b if a is None else in_a}")
    if a.shape != b.shape:
        return Difference(name, f"shape {a.shape} and {b.shape}")
    if a.dtype == b.dtype and a.digest is not None and a.digest == b.digest:
        return None
    x, y = a.read(), b.read()
    if a.dtype == b.dtype and torch.equal(_bits(x), _bits(y)):
        return None
    wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
    x, y = x.to(wide), y.to(wide)
    gap, size = (x - y).abs(), x.norm().item()
    distance = gap.norm().item()
    relative = distance / size if size else math.inf if distance else 0.0
    max_abs = gap.max().item() if gap.numel() else 0.0
    # Equal values in another dtype are a difference too: they need not train alike.
    return Difference(name, "" if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}", max_abs, relative)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
