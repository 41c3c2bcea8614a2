"""Tiny Hugging Face folders with random weights everywhere, and what ranks do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mindspeed_mm.checkpoint.hf_export import export_hf
from mindspeed_mm.checkpoint.hf_folder import FileTensor
from mindspeed_mm.checkpoint.hf_import import load_hf_weights
from tests.models.tiny import tiny_config


class Adapter(transformers.InternVLForConditionalGeneration):
    """An adapter as users write them: a subclass outside Transformers."""


def model_class(family: str) -> Any:
    """Return the Transformers class of a tiny family; ``adapter`` is InternVL's through `Adapter`."""
    return Adapter if family == "adapter" else getattr(transformers, config_of(family, False).architectures[0])


def config_of(family: str, tie: bool) -> Any:
    """Return a tiny config with a vocabulary that 2 does not divide."""
    config = tiny_config("internvl" if family == "adapter" else family, tie)
    config.get_text_config().vocab_size = 321
    return config


def write_folder(folder: Path, family: str, tie: bool, max_shard_size: str = "5GB") -> dict[str, torch.Tensor]:
    """Write a folder with Transformers' own ``save_pretrained`` and return what ``from_pretrained`` reads back."""
    config = config_of(family, tie)
    native = getattr(transformers, config.architectures[0])
    model = native._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return read_back(folder, native)


def read_back(folder: Path, native: Any) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer that ``from_pretrained`` gives."""
    model, report = native.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return tensors_of(model)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers, gathered."""
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {k: v.full_tensor().detach() if isinstance(v, DTensor) else v.detach() for k, v in named.items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Return the names under which two models differ in any bit."""
    return [k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])]


def keys_on_disk(folder: Path) -> set[str]:
    """Return the tensor names in a folder's safetensors files."""
    return {key for file in folder.glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118


def sharded_from_meta(family: str, tie: bool) -> Any:
    """Return a model built on meta, sharded over all ranks, and given storage full of NaN."""
    with init_empty_weights(include_buffers=False):
        model = model_class(family)._from_config(config_of(family, tie), dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model._apply(lambda t: torch.full_like(t, torch.nan, device="cpu") if t.is_meta else t)
    return model


def import_and_export(source: Path, target: Path, cases: list[tuple[str, bool]]) -> list[dict[str, torch.Tensor]]:
    """For each family: read its folder into a sharded model, write a folder from it, return the full tensors."""
    results = []
    for family, tie in cases:
        model = sharded_from_meta(family, tie)
        name = f"{family}-{tie}"
        assert load_hf_weights(model, source / name) == []
        export_hf(model, target / name, assets_from=source / name, max_shard_bytes=40_000)
        results.append(tensors_of(model))
    return results if dist.get_rank() == 0 else []


def imported(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """Return the full tensors of a sharded model that a folder was read into."""
    model = sharded_from_meta(family, False)
    load_hf_weights(model, folder)
    return tensors_of(model)


def elements_read(folder: Path, family: str) -> tuple[int, int]:
    """Return how many elements this rank read, and how many it keeps."""
    model = sharded_from_meta(family, False)
    count = 0
    read = FileTensor._read

    def counting(self: FileTensor, *where: Any) -> torch.Tensor:
        nonlocal count
        tensor = read(self, *where)
        count += tensor.numel()
        return tensor

    FileTensor._read = counting  # type: ignore[method-assign]
    try:
        load_hf_weights(model, folder)
    finally:
        FileTensor._read = read  # type: ignore[method-assign]
    kept = [t.to_local() if isinstance(t, DTensor) else t for t in model.state_dict().values()]
    return count, sum(tensor.numel() for tensor in kept)


def failing_export(folder: Path, family: str) -> str:
    """Export to a place that rank 0 cannot write and return the error every rank sees."""
    from mindspeed_mm.errors import UserError

    try:
        export_hf(sharded_from_meta(family, False), folder)
    except UserError as error:
        return str(error)
    return ""
