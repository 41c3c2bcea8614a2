"""Offline conversion between Hugging Face folders and distributed checkpoints: one process, no accelerator.

Weights stream from one file to the other; neither direction holds the whole model. Starting a run from a Hugging
Face folder and exporting one at its end need no conversion; this is for those who want the files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from transformers import AutoConfig, PreTrainedModel

from mindspeed_mm.checkpoint.adapters import ADAPTER_CONFIG
from mindspeed_mm.checkpoint.hf_export import write_hf_folder
from mindspeed_mm.checkpoint.hf_folder import FileTensor, open_weights
from mindspeed_mm.checkpoint.hf_import import check_import
from mindspeed_mm.checkpoint.hf_layout import ImportStep, plan_import, skeleton
from mindspeed_mm.checkpoint.integrity import check_whole
from mindspeed_mm.checkpoint.optimizer_state import PREFIX
from mindspeed_mm.checkpoint.publish import RELEASE, find, publish, publish_copy
from mindspeed_mm.checkpoint.store import MODEL, write_part
from mindspeed_mm.checkpoint.tensor_files import DigestingPlanner, TensorReader
from mindspeed_mm.checkpoint.tensors import listing, named_tensors
from mindspeed_mm.errors import UserError

# TransformersModel keeps the Hugging Face model in its attribute `model`.
_PREFIX = MODEL + "model."


def hf_to_dcp(hf_dir: str | Path, dcp_dir: str | Path, trust_remote_code: bool = False) -> Path:
    """Write a Hugging Face folder's weights as ``<dcp_dir>/release``, ready for ``--load <dcp_dir>``.

    Names and layouts are the training model's, dtypes those on disk; tied weights are written once.

    Raises:
        UserError: ``hf_dir`` is not a model folder, or its weights do not fit its config.
    """
    with open_model(Path(hf_dir), trust_remote_code) as weights:
        tensors = {_PREFIX + name: tensor for name, tensor in weights.on_meta().items()}
        planner = _StreamingPlanner(weights)
        return publish(Path(dcp_dir), RELEASE, lambda folder: write_part(tensors, folder, planner))


def copy_checkpoint(source_dir: str | Path, target_dir: str | Path) -> Path:
    """Copy the newest checkpoint of a folder into another, and make it the newest one there.

    Raises:
        UserError: there is no checkpoint, it is damaged, or ``target_dir`` has one of that name.
    """
    source = find(source_dir)
    check_whole(source)
    return publish_copy(source, Path(target_dir))


def dcp_to_hf(
    load_dir: str | Path,
    save_dir: str | Path,
    model_assets_dir: str | Path,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    averaged: bool = False,
) -> Path:
    """Write a checkpoint's weights as a Hugging Face folder.

    Args:
        load_dir: a checkpoint folder (``iter_0000100``, ``release``) or its parent with the tracker file.
        save_dir: where to.
        model_assets_dir: the original Hugging Face folder; gives config.json, tokenizer and processor files.
        dtype: to write the parameters in; None keeps the checkpoint's.
        trust_remote_code: whether Python files of ``model_assets_dir`` may run.
        averaged: take the moving average of the weights that ``fused_ema_adamw`` keeps; frozen weights have none
            and are taken as they are.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it does not hold the weights of that model.
    """
    path = find(load_dir)
    if (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path} holds adapters (LoRA): use mindspeed-mm convert lora-merge --adapter {path}")
    check_whole(path)
    reader = TensorReader(path)
    saved = {k: v for k, v in reader.metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    bare = model_skeleton(Path(model_assets_dir), trust_remote_code)
    weights = named_tensors(bare)
    # A bare Hugging Face model has no wrapper's `model.` before its names.
    found = {prefix: sum(prefix + names[0] in saved for names in weights) for prefix in (_PREFIX, MODEL)}
    prefix = max(found, key=lambda p: found[p])
    keys = {names[0]: prefix + name for names in weights for name in reversed(names) if prefix + name in saved}
    if missing := [names[0] for names in weights if names[0] not in keys]:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(weights)} weights of the model in {model_assets_dir}:\n"
            f"{listing(missing)}\nPass the folder of the model that was trained as --model-assets-dir."
        )
    reshaped = [
        f"{names[0]}: checkpoint {tuple(saved[keys[names[0]]].size)}, config {tuple(tensor.shape)}"
        for names, tensor in weights.items()
        if saved[keys[names[0]]].size != tensor.shape
    ]
    if reshaped:
        raise UserError(f"{path} has weights of other shapes than {model_assets_dir}:\n{listing(reshaped)}")
    if averaged:
        keys = _averages(keys, {names[0]: names for names in weights}, prefix, saved, path)
    buffers = {name for name, _ in bare.named_buffers()}

    def gather(names: list[str]) -> dict[str, torch.Tensor]:
        tensors = {}
        for name in names:
            stored = saved[keys[name]]
            wanted = dtype if dtype and stored.properties.dtype.is_floating_point and name not in buffers else None
            tensors[keys[name]] = torch.empty(stored.size, dtype=wanted or stored.properties.dtype)
        reader.read(tensors)
        return {name: tensors[keys[name]] for name in names}

    return write_hf_folder(bare, keys, gather, Path(save_dir).resolve(), model_assets_dir)


def _averages(
    keys: dict[str, str], aliases: dict[str, tuple[str, ...]], prefix: str, saved: Collection[str], path: Path
) -> dict[str, str]:
    """Return ``keys`` with those of the averages where the checkpoint holds one."""

    def key(name: str) -> str | None:
        candidates = (f"{PREFIX}{prefix.removeprefix(MODEL)}{alias}.ema" for alias in aliases[name])
        return next((candidate for candidate in candidates if candidate in saved), None)

    found = {name: average for name in keys if (average := key(name))}
    if not found:
        raise UserError(
            f"{path} holds no averaged weights: the run was not trained with --optimizer-selection fused_ema_adamw, or "
            "it was saved with --no-save-optim. Convert the weights themselves."
        )
    return {**keys, **found}


def model_skeleton(hf_dir: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model that a folder's config.json describes, on meta.

    Raises:
        UserError: there is no usable config.json, or it names a class that Transformers does not have.
    """
    if not (hf_dir / "config.json").is_file():
        raise UserError(f"{hf_dir}: no config.json; pass a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(hf_dir, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Transformers' validation errors have no common base class.
        raise UserError(f"{hf_dir / 'config.json'}: {' '.join(str(error).split())}") from error
    name = (config.architectures or [None])[0]
    remote = next((v for v in (getattr(config, "auto_map", None) or {}).values() if str(v).endswith(f".{name}")), None)
    if remote and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return skeleton(get_class_from_dynamic_module(remote, str(hf_dir)), config)
    model_class = getattr(transformers, str(name), None)
    if model_class is None:
        fix = "pass --trust-remote-code if you trust its Python files" if remote else "check the key"
        raise UserError(f"{hf_dir / 'config.json'}: architectures: Transformers has no class {name!r}; {fix}")
    return skeleton(model_class, config)


class ModelFolder:
    """The weights of a Hugging Face folder by the model's names, tied ones once, each read when asked for.

    Attributes:
        bare: the model's `skeleton`.
    """

    def __init__(
        self, bare: PreTrainedModel, stored: dict[str, FileTensor], source: dict[str, tuple[str, ImportStep]]
    ) -> None:
        self.bare = bare
        self._stored = stored
        self._source = source
        self._at_hand: dict[str, torch.Tensor] = {}

    def on_meta(self) -> dict[str, torch.Tensor]:
        """Return all weights, on meta, in the dtypes on disk."""
        return {key: step.outputs[name] for key, (name, step) in self._source.items()}

    def read(self, key: str) -> torch.Tensor:
        """Return one weight, for once; what a step gives besides it is kept until asked for."""
        name, step = self._source[key]
        if name not in self._at_hand:
            self._at_hand.update(step.run(self.bare, self._stored))
        return self._at_hand.pop(name)


@contextmanager
def open_model(hf_dir: Path, trust_remote_code: bool = False) -> Iterator[ModelFolder]:
    """Open a Hugging Face folder to read its model's weights.

    Raises:
        UserError: ``hf_dir`` is not a model folder, or its weights do not fit its config.
    """
    bare = model_skeleton(hf_dir, trust_remote_code)
    shapes = {names: tensor.shape for names, tensor in named_tensors(bare).items()}
    with open_weights(hf_dir) as stored:
        plan = plan_import(bare, stored, [name for names in shapes for name in names])
        if problems := check_import(plan, shapes):
            raise UserError("\n".join([f"{hf_dir}: the weights do not fit its config.json.", *problems]))
        owner = {name: step for step in plan.steps for name in step.outputs}
        source = {names[0]: next(name for name in names if name in owner) for names in shapes}
        yield ModelFolder(bare, stored, {key: (name, owner[name]) for key, name in source.items()})


class _StreamingPlanner(DigestingPlanner):
    """Plans a save from tensors on meta and reads each weight when the writer asks for it."""

    def __init__(self, weights: ModelFolder) -> None:
        super().__init__()
        self._weights = weights

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """Return the weight."""
        return self._weights.read(index.fqn.removeprefix(_PREFIX))
