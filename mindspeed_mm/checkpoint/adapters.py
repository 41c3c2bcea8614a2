"""Adapters (LoRA) as the folders that peft reads and writes.

A checkpoint of a LoRA run is such a folder too: ``PeftModel.from_pretrained(base, "ckpt/iter_0000100")``.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.distributed.tensor import DTensor

from mindspeed_mm.checkpoint.coordination import rank, run_together
from mindspeed_mm.checkpoint.hf_boxes import Boxes, Senders
from mindspeed_mm.checkpoint.python_state import write_flushed
from mindspeed_mm.checkpoint.tensors import adapted_layers, named_tensors
from mindspeed_mm.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Names in peft's files start with its wrappers' attributes, and leave the adapter's own name out.
ADAPTER_PREFIX = "base_model.model."
ADAPTER_NAME = "default"
# What the saved weights mean nothing without, and the flag that sets it.
_SETTINGS = {
    "r": "--lora-r",
    "lora_alpha": "--lora-alpha",
    "target_modules": "--lora-target-modules",
    "target_parameters": "--lora-target-parameters",
}


def boxed_adapter_files(config: Any, boxes: Boxes) -> dict[str, bytes]:
    """Return the two files in which peft finds adapters that are spread over ranks: on rank 0, else none.

    Every rank calls this.

    Args:
        config: peft's configuration, as it is written.
        boxes: what this rank holds of the adapters.
    """
    senders = Senders(boxes)
    found = {name: senders.gather(name) for name in senders.names}
    return _files(config, {name: tensor for name, tensor in found.items() if tensor is not None})


def adapter_files(model: nn.Module) -> dict[str, bytes]:
    """Return the same for a plain model or one that FSDP2 shards.

    Every rank calls this.
    """
    tensors: dict[str, torch.Tensor] = {}
    for (name, *_), tensor in named_tensors(model, "adapters").items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            tensors[name] = full.cpu().contiguous()
    return _files(adapter_config(model), tensors)


def _files(config: Any, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    if rank() != 0:
        return {}
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        settings = (Path(folder) / ADAPTER_CONFIG).read_bytes()
    on_disk = {ADAPTER_PREFIX + name_on_disk(name): tensor for name, tensor in tensors.items()}
    return {ADAPTER_CONFIG: settings, ADAPTER_WEIGHTS: save(on_disk, metadata={"format": "pt"})}


def export_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of a plain or sharded model as a folder for ``PeftModel.from_pretrained``.

    Every rank calls this.

    Raises:
        UserError: rank 0 could not write; raised on all ranks.
    """
    return write_adapter(adapter_files(model), folder)


def write_adapter(files: dict[str, bytes], folder: str | Path) -> Path:
    """Write the files that rank 0 has into ``folder``; every rank calls this.

    Raises:
        UserError: rank 0 could not write; raised on all ranks.
    """
    folder = Path(folder)

    def write() -> None:
        for name, content in files.items():
            folder.mkdir(parents=True, exist_ok=True)
            write_flushed(folder / name, content)

    run_together(f"exporting to {folder}", write)
    return folder


def name_on_disk(name: str) -> str:
    """Return what peft's files call the tensor ``name`` of an adapter, without their prefix."""
    return name.removesuffix(f".{ADAPTER_NAME}.weight") + ".weight"


def adapter_config(model: nn.Module) -> Any:
    """Return peft's configuration of the adapters in ``model``, as it is written; None without adapters."""
    configs = getattr(model, "peft_config", None)
    if not configs or not adapted_layers(model):
        return None
    return written_config(configs[ADAPTER_NAME], model)


def written_config(config: Any, model: nn.Module) -> Any:
    """Return peft's configuration of adapters for ``model`` as it is written."""
    config = copy.copy(config)
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    if hasattr(model, "config"):
        classes = type(model).__mro__
        known = next((c for c in classes if c.__module__.startswith("transformers.")), classes[0])
        config.auto_mapping = {"base_model_class": known.__name__, "parent_library": known.__module__}
    return config


def check_adapters(checkpoint: Path, ours: Any) -> list[str]:
    """Check that a checkpoint's adapters are those of this run.

    Args:
        checkpoint: its folder.
        ours: peft's configuration of this run's adapters, as it is written; None without adapters.

    Returns:
        Lines to warn with.

    Raises:
        UserError: only one of the two has adapters, they differ, or the checkpoint has nothing but adapters and the
            weights under them are not known.
    """
    saved = _read_config(checkpoint) if (checkpoint / ADAPTER_CONFIG).is_file() else None
    if ours is None and saved is None:
        return []
    if ours is None:
        raise UserError(
            f"{checkpoint} holds adapters (LoRA), and this run has none. Pass the --lora flags of the run that saved "
            "it, or make a full model of it first: mindspeed-mm convert lora-merge."
        )
    if saved is None:
        raise UserError(
            f"{checkpoint} holds no adapters. To train adapters on its weights, pass it as --load-base-model instead "
            "of --load."
        )
    differences = [
        f"  {flag}: saved {_shown(saved.get(key))}, this run {_shown(getattr(ours, key, None))}"
        for key, flag in _SETTINGS.items()
        if _shown(saved.get(key)) != _shown(getattr(ours, key, None))
    ]
    if differences:
        raise UserError("\n".join([f"{checkpoint} holds other adapters than this run trains:", *differences]))
    was, base = saved.get("base_model_name_or_path"), ours.base_model_name_or_path
    if was and not base:
        raise UserError(
            f"{checkpoint} holds adapters alone, without the weights under them. Pass --load-base-model; they were "
            f"trained on {was}."
        )
    moved = was and Path(was).resolve() != Path(str(base)).resolve()
    return [f"{checkpoint}: its adapters were trained on {was}, and are now put on {base}"] if moved else []


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / ADAPTER_CONFIG).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / ADAPTER_CONFIG} cannot be read: {error}; pass --ckpt-step for another checkpoint"
        ) from error


def _shown(value: Any) -> str:
    return " ".join(sorted(value)) if isinstance(value, list | tuple | set) else str(value or "nothing")
