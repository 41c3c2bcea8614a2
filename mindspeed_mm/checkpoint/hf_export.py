"""Write a model as a Hugging Face folder that ``from_pretrained`` loads bit for bit."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mindspeed_mm.checkpoint.coordination import rank, run_together
from mindspeed_mm.checkpoint.hf_folder import INDEX, ShardWriter
from mindspeed_mm.checkpoint.hf_layout import DiskLayout, native_class, skeleton
from mindspeed_mm.checkpoint.tensors import named_tensors
from mindspeed_mm.errors import UserError

MAX_SHARD_BYTES = 4 * 10**9
# Tokenizer, processor, chat template, generation settings and remote code; never weights.
_ASSET_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"})


def export_hf(
    hf_model: PreTrainedModel,
    folder: str | Path,
    assets_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a plain or sharded model as a Hugging Face folder; every rank calls this.

    Weights are gathered one at a time; rank 0 holds about two files' worth while it writes one.

    Args:
        hf_model: the model, with storage.
        folder: where to; weights in an existing folder are replaced when the new ones are complete.
        assets_from: the folder whose tokenizer, processor and generation files are copied.
        dtype: to write the parameters in; None keeps theirs. Buffers keep their own.
        max_shard_bytes: size of a safetensors file above which the next is begun.

    Raises:
        UserError: rank 0 could not write, or ``folder`` is ``assets_from``; raised on all ranks.
    """
    buffers = {name for name, _ in hf_model.named_buffers()}
    tied = hf_model.all_tied_weights_keys
    tensors = {}
    for names, tensor in named_tensors(hf_model).items():
        # The name Transformers keeps of a tied pair is the one that is not declared as a copy.
        tensors[next((name for name in names if name not in tied), names[0])] = tensor

    def gather(names: list[str]) -> dict[str, torch.Tensor]:
        full = {name: _full(tensors[name]) for name in names}
        if dtype is None:
            return full
        return {k: v if k in buffers or not v.is_floating_point() else v.to(dtype) for k, v in full.items()}

    bare = skeleton(type(hf_model), hf_model.config)
    if getattr(hf_model, "generation_config", None) is not None:  # models that generate nothing have none
        bare.generation_config = hf_model.generation_config
    return write_hf_folder(bare, tensors, gather, Path(folder).resolve(), assets_from, max_shard_bytes)


def check_target(folder: str | Path, assets_from: str | Path | None = None) -> None:
    """See now whether an export could be written later; every rank calls this.

    Raises:
        UserError: rank 0 cannot write there, or ``folder`` is ``assets_from``; raised on all ranks.
    """
    folder = Path(folder).resolve()

    def check() -> None:
        _refuse_original(folder, assets_from)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for place in [folder.parent, *([folder] if folder.exists() else [])]:
                with TemporaryFile(dir=place):
                    pass
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error}; export to another folder") from error

    run_together(f"exporting to {folder}", lambda: check() if rank() == 0 else None)


def write_hf_folder(
    bare: PreTrainedModel,
    names: Iterable[str],
    gather: Callable[[list[str]], dict[str, torch.Tensor]],
    folder: Path,
    assets_from: str | Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a Hugging Face folder from weights that ``gather`` gives for a few names at a time.

    Args:
        bare: the model's `skeleton`; gives config.json.
        names: module names of all weights to write.
        gather: returns full CPU tensors by name; called in the same order on all ranks.
        folder: where to.
        assets_from: see `export_hf`.
        max_shard_bytes: see `export_hf`.
    """
    staging = folder.with_name(folder.name + ".staging")
    first = rank() == 0
    run_together(f"exporting to {folder}", lambda: _prepare(folder, staging, assets_from) if first else None)
    layout = DiskLayout(bare)
    writer = ShardWriter(staging, max_shard_bytes)
    failure: Exception | None = None
    dtype = None
    for group in layout.groups(names):
        # A rank that left this loop early would leave the others waiting in the next gather.
        tensors = gather(group)
        if not first or failure is not None:
            continue
        dtype = dtype or next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
        try:
            for name, tensor in layout.convert(tensors).items():
                writer.add(name, tensor)
        except Exception as error:  # noqa: BLE001 - raised on all ranks below
            failure = error

    def finish() -> None:
        if failure is not None:
            raise failure
        writer.close()
        _copy_assets(assets_from, staging)
        _write_config(bare, staging, dtype)
        _replace(staging, folder)

    try:
        run_together(f"exporting to {folder}", lambda: finish() if first else None)
    finally:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def _full(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu()


def _prepare(folder: Path, staging: Path, assets_from: str | Path | None) -> None:
    if assets_from is not None and not Path(assets_from).is_dir():
        raise UserError(f"{assets_from}: no such folder to take tokenizer and processor files from")
    _refuse_original(folder, assets_from)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def _refuse_original(folder: Path, assets_from: str | Path | None) -> None:
    if assets_from is not None and folder.exists() and folder.samefile(assets_from):
        raise UserError(f"{folder} is also the folder of the original weights; export to another one")


def _write_config(bare: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
    config = copy.deepcopy(bare.config)
    config.architectures = [native_class(type(bare)).__name__]
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    config.save_pretrained(folder)
    if bare.can_generate() and not (folder / "generation_config.json").exists():
        bare.generation_config.save_pretrained(folder)


def _copy_assets(source: str | Path | None, folder: Path) -> None:
    if source is None:
        return
    for path in sorted(Path(source).iterdir()):
        if path.is_file() and path.suffix in _ASSET_SUFFIXES and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, folder / path.name)
    templates = Path(source) / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _replace(staging: Path, folder: Path) -> None:
    """Move the finished files to their place, and remove weights of an earlier export that would mix with them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    for path in staging.iterdir():
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
