"""Adapters (LoRA) added to the weights they were trained on, in one process, streamed from file to file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from mindspeed_mm.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_NAME, ADAPTER_PREFIX, ADAPTER_WEIGHTS, name_on_disk
from mindspeed_mm.checkpoint.convert import model_skeleton, open_model
from mindspeed_mm.checkpoint.hf_export import write_hf_folder
from mindspeed_mm.checkpoint.integrity import check_whole
from mindspeed_mm.checkpoint.publish import TRACKER, find, is_checkpoint
from mindspeed_mm.checkpoint.tensors import adapted_layers, listing, named_tensors
from mindspeed_mm.errors import UserError
from mindspeed_mm.extras import import_extra

_FACTORS = (".lora_A.weight", ".lora_B.weight")


def lora_merge(
    hf_dir: str | Path,
    adapter: str | Path,
    save_dir: str | Path,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Add adapters to the weights they were trained on, and write the result as a Hugging Face folder.

    Weights stream from one file to the other; peft itself merges each.

    Args:
        hf_dir: the Hugging Face folder of the weights under the adapters.
        adapter: a folder with adapter_config.json, a checkpoint of a LoRA run, or the folder of its checkpoints.
        save_dir: where to.
        dtype: to write the parameters in; None keeps that of ``hf_dir``.
        trust_remote_code: whether Python files of ``hf_dir`` may run.

    Raises:
        UserError: one of the folders is not what it should be, or they do not fit together.
    """
    peft = import_extra("peft", "lora", "lora-merge")
    hf_dir, adapter = Path(hf_dir), Path(adapter)
    if (adapter / TRACKER).is_file():
        adapter = find(adapter)
    if not (adapter / ADAPTER_CONFIG).is_file() or not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{adapter}: no adapters there: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} are needed")
    if is_checkpoint(adapter):
        check_whole(adapter)
    saved = {key.removeprefix(ADAPTER_PREFIX): value for key, value in load_file(adapter / ADAPTER_WEIGHTS).items()}
    if other := [name for name in saved if not name.endswith(_FACTORS)]:
        raise UserError(f"{adapter} has more than plain LoRA, use peft's merge_and_unload:\n{listing(other)}")

    adapted = model_skeleton(hf_dir, trust_remote_code)
    try:
        peft.inject_adapter_in_model(
            peft.LoraConfig.from_pretrained(str(adapter)), adapted, ADAPTER_NAME, low_cpu_mem_usage=True
        )
    except ValueError as error:
        raise UserError(f"{adapter} does not fit the model in {hf_dir}: {error}") from error
    expected = {name_on_disk(name): tensor for (name, *_), tensor in named_tensors(adapted, "adapters").items()}
    wrong = [
        f"{name}: saved {_shape(saved.get(name))}, model {_shape(expected.get(name))}"
        for name in sorted(expected.keys() | saved.keys())
        if _shape(saved.get(name)) != _shape(expected.get(name))
    ]
    if wrong:
        raise UserError(f"{adapter} does not fit the model in {hf_dir}; these differ\n{listing(wrong)}")
    layers = _by_weight(adapted)

    with open_model(hf_dir, trust_remote_code) as weights:
        if lost := layers.keys() - weights.on_meta().keys():
            raise UserError(
                f"{adapter} adapts weights that are tied to others, which cannot be merged:\n{listing(lost)}"
            )

        def gather(group: list[str]) -> dict[str, torch.Tensor]:
            tensors = {}
            for name in group:
                tensor = weights.read(name)
                for path, layer in layers.get(name, ()):
                    tensor = _merge(layer, name, tensor, {k: saved[f"{path}.{k}.weight"] for k in ("lora_A", "lora_B")})
                tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            return tensors

        return write_hf_folder(weights.bare, weights.on_meta(), gather, Path(save_dir).resolve(), hf_dir)


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))


def _by_weight(adapted: nn.Module) -> dict[str, list[tuple[str, Any]]]:
    """Return the adapted layers, with their paths, by the name that the weight under them has without adapters."""
    layers: dict[str, list[tuple[str, Any]]] = {}
    for path, layer in adapted_layers(adapted).items():
        plain = path.replace(".base_layer", "")
        layers.setdefault(f"{plain}.{getattr(layer, 'parameter_name', 'weight')}", []).append((path, layer))
    return layers


@torch.no_grad()
def _merge(layer: Any, name: str, weight: torch.Tensor, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Let peft add one adapter to one weight, and take everything out of the layer again."""
    for key, factor in factors.items():
        getattr(layer, key)[ADAPTER_NAME].weight = nn.Parameter(factor, requires_grad=False)
    holder, attribute = layer.get_base_layer(), name.rpartition(".")[2]
    setattr(holder, attribute, nn.Parameter(weight, requires_grad=False))
    layer.merge()
    merged = getattr(holder, attribute).detach()
    setattr(holder, attribute, nn.Parameter(merged.to("meta"), requires_grad=False))
    for key in factors:
        getattr(layer, key)[ADAPTER_NAME].to("meta")
    return merged
