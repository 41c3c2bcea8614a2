"""The model of ``pretrain_transformers.py``: an unmodified Hugging Face model, and the loss around it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mindspeed_mm.distributed.fsdp2 import prepare_model
from mindspeed_mm.distributed.meta import is_meta_init
from mindspeed_mm.distributed.state import print_rank_0, warn_rank_0
from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.losses import (
    IGNORE,
    REDUCTIONS,
    cross_entropy_sums,
    head_returns_loss_sums,
    shift_labels,
)
from mindspeed_mm.models.common.lookup import lookup
from mindspeed_mm.models.common.modelzoo import ModelHub
from mindspeed_mm.models.common.module import MultiModalModule
from mindspeed_mm.models.transformers.attention import attention_implementation
from mindspeed_mm.models.transformers.base_model import FSDP2Mixin
from mindspeed_mm.models.transformers.blank_image import BlankImage
from mindspeed_mm.models.transformers.families import family_of, has_vision
from mindspeed_mm.models.transformers.freeze import freeze_components, frozen_line
from mindspeed_mm.models.transformers.weight_layout import share_weight_layout

_COMPUTE_MODES = ("default", "chunk")


class TransformersModel(MultiModalModule):
    """An HF model named by model.json, its components frozen as asked, returning the training loss.

    Attributes:
        model: the HF model, fp32; parameter names in checkpoints start with ``model.``.
        transformer_config: its HF config.
        hf_path: the HF folder.
        weights_source: the HF folder whose weights have to be read in after sharding, because the parameters
            were built on the meta device; None when they are already there, or random on purpose.
    """

    def __init__(self, config: Any) -> None:
        """Build from model.json.

        Weights come from ``init_from_hf_path``; with ``random_init`` they are random instead, drawn from torch's
        global generator, which must be seeded alike on all ranks. Under ``--init-model-with-meta-device`` they
        come later.

        Raises:
            UserError: the folder, the class or the weights cannot be found or do not fit together, or a key has
                a value that is not known.
        """
        super().__init__(config)
        self.hf_path = _hf_folder(config)
        self._read_loss_config(config)
        self.transformer_config = _load_hf_config(self.hf_path, config)
        model_cls: Any = ModelHub.build(config, self.transformer_config)
        if hasattr(model_cls, "overwrite_transformer_config"):
            self.transformer_config = model_cls.overwrite_transformer_config(self.transformer_config)

        options = {
            "dtype": torch.float32,
            "attn_implementation": attention_implementation(config, self.transformer_config),
        }
        random_init = bool(lookup(config, "random_init", False))
        self.weights_source = self.hf_path if is_meta_init() and not random_init else None
        if random_init or is_meta_init():
            self.model = model_cls._from_config(self.transformer_config, **options)
        else:
            self.model = _from_pretrained(model_cls, self.hf_path, self.transformer_config, config, options)
        self.model.train()

        family = family_of(self.transformer_config)
        own_freeze = getattr(model_cls, "freeze", None)
        if own_freeze not in (None, FSDP2Mixin.freeze):
            self.model.freeze(config)
        else:
            freeze_components(self.model, family, config)
        if line := frozen_line(self.model):
            print_rank_0(line)
        self._blank_image = BlankImage(self.model, family, self.transformer_config) if family.dummy_image else None
        if has_vision(self.transformer_config) and self._blank_image is None and _is_one_of_several_ranks():
            warn_rank_0(
                f"{model_cls.__name__} has a vision tower but no entry in FAMILIES (mindspeed_mm/models/transformers/"
                f"families.py): every micro-batch of every rank needs an image, or the ranks fall out of step."
            )
        self._accepts = set(inspect.signature(self.model.forward).parameters)

    def _read_loss_config(self, config: Any) -> None:
        self._reduction = lookup(config, "loss_cfg.loss_type", "default")
        _check_choice("loss_cfg.loss_type", self._reduction, REDUCTIONS)
        mode = lookup(config, "loss_cfg.compute_mode", "default")
        _check_choice("loss_cfg.compute_mode", mode, _COMPUTE_MODES)
        self._chunk_size = lookup(config, "loss_cfg.chunk_size", 1024) if mode == "chunk" else None
        self._aux_coefficient = float(lookup(config, "loss_cfg.router_aux_loss_coef", 0.0))

    def fully_shard(self, process_group: dist.ProcessGroup, fsdp2_config_path: str, **kwargs: Any) -> Any:
        """Shard the HF model, whose own override counts; paths in the yaml start inside it."""
        return prepare_model(self.model, process_group, fsdp2_config_path)

    def forward(self, input_ids: Tensor, *, labels: Tensor | None = None, **batch: Any) -> dict[str, Tensor]:
        """Return the loss of one micro-batch.

        Args:
            input_ids: (B, S) tokens.
            labels: (B, S), the token ids that are targets and -100 elsewhere. They are shifted here, and never
                passed to HF.
            **batch: whatever else the HF model takes; None is left out.

        Returns:
            ``loss``, a scalar, reduced as ``loss_cfg.loss_type`` says; ``loss_mask``, (B, S) bool, the positions
            that predict a target; for ``per_token_loss``, where ``loss`` is a sum, ``token_nums``, int64 scalar;
            with a router loss, ``aux_loss``, scalar, which times its coefficient is already part of ``loss``.
        """
        if labels is None:
            raise UserError("the batch has no 'labels': the dataset or get_batch must provide them for training.")
        batch = {key: value for key, value in batch.items() if value is not None}
        self._add_token_types(input_ids, batch)
        if self._aux_coefficient > 0:
            batch["output_router_logits"] = True
        targets = shift_labels(labels)
        mask = targets != IGNORE
        counts = mask.sum(dim=1)
        with self._blank_image.for_batch(batch) if self._blank_image else nullcontext():
            outputs, sums = self._run(input_ids, targets, batch)
        result = {"loss": REDUCTIONS[self._reduction](sums, counts), "loss_mask": mask}
        if self._reduction == "per_token_loss":
            result["token_nums"] = counts.sum()
        if self._aux_coefficient > 0:
            self._add_router_loss(result, getattr(outputs, "aux_loss", None))
        return result

    def generate(self, input_ids: Tensor, *, max_new_tokens: int, stop: Sequence[int], **batch: Any) -> Tensor:
        """Continue a prompt greedily; all ranks call this with the same arguments.

        Args:
            input_ids: (1, S) tokens.
            max_new_tokens: how many at most.
            stop: token ids that end an answer, beside those of the model's own generation settings.
            **batch: whatever else the HF model takes.

        Returns:
            The new tokens, (N,).
        """
        self._add_token_types(input_ids, batch)
        own = self.model.generation_config.eos_token_id
        ends = {*stop, *(own if isinstance(own, list) else [own])} - {None}
        if isinstance(self.model, FSDPModule):
            self.model.unshard()  # some models look at the images before they call their own forward
        output = self.model.generate(
            input_ids=input_ids,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=min(ends),
            synced_gpus=_is_one_of_several_ranks(),
            **batch,
        )
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        return output[0, input_ids.shape[1] :]

    def _run(self, input_ids: Tensor, targets: Tensor, batch: dict[str, Any]) -> tuple[Any, Tensor]:
        """Return the HF outputs and the summed cross entropy of each sample, (B,)."""
        if self._chunk_size is None:
            outputs = self.model(input_ids=input_ids, use_cache=False, **batch)
            return outputs, cross_entropy_sums(outputs.logits, targets)
        with head_returns_loss_sums(self.model.get_output_embeddings(), targets, self._chunk_size) as head:
            outputs = self.model(input_ids=input_ids, use_cache=False, **batch)
        if outputs.logits is not head.sums:
            raise UserError(
                f"model.json: loss_cfg.compute_mode: 'chunk' needs a model that returns what its output head returns, "
                f"but {type(self.model).__name__} changes it. Use 'default'. "
                f"(If output_dtype is set in the fsdp2 yaml, leaving it out may be enough.)"
            )
        return outputs, outputs.logits

    def _add_token_types(self, input_ids: Tensor, batch: dict[str, Any]) -> None:
        """Say which tokens are images (1) and videos (2), for models that derive positions from it."""
        has_grid = "image_grid_thw" in batch or "video_grid_thw" in batch
        has_positions = "mm_token_type_ids" in batch or "position_ids" in batch
        if has_grid and not has_positions and "mm_token_type_ids" in self._accepts:
            image, video = self.transformer_config.image_token_id, self.transformer_config.video_token_id
            batch["mm_token_type_ids"] = (input_ids == image).int() + 2 * (input_ids == video).int()

    def _add_router_loss(self, result: dict[str, Tensor], aux_loss: Tensor | None) -> None:
        if aux_loss is None:
            raise UserError(
                f"model.json: loss_cfg.router_aux_loss_coef: {type(self.model).__name__} has no router loss. "
                f"Remove the key or set it to 0."
            )
        if torch.is_grad_enabled() and not aux_loss.requires_grad and result["loss"].requires_grad:
            raise UserError(
                "loss_cfg.router_aux_loss_coef has no effect: the router loss lost its gradient in recomputed layers. "
                "Set use_reentrant: false in the fsdp2 yaml."
            )
        # A summed loss is divided by the number of tokens later: then this becomes their weighted mean.
        weight = result.get("token_nums", 1)
        result["loss"] = result["loss"] + self._aux_coefficient * weight * aux_loss
        result["aux_loss"] = aux_loss.detach()


def _is_one_of_several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _check_choice(key: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise UserError(
            f"model.json: {key}: '{value}' is not known.{did_you_mean(str(value), choices)} Use {', '.join(choices)}."
        )


def _hf_folder(config: Any) -> str:
    path = lookup(config, "init_from_hf_path")
    if not path:
        raise UserError("model.json: init_from_hf_path is missing: the folder with the model's config.json.")
    if not (Path(path) / "config.json").is_file():
        what = "has no config.json" if Path(path).is_dir() else "is not a folder"
        raise UserError(
            f"model.json: init_from_hf_path: '{path}' {what}. Download the model first "
            f"(hf download <name> --local-dir {path}) or correct the path."
        )
    return str(path)


def _load_hf_config(folder: str, config: Any) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=bool(lookup(config, "trust_remote_code", False)))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"model.json: init_from_hf_path: {folder}/config.json cannot be read: {error}") from error


def _from_pretrained(model_cls: Any, folder: str, hf_config: Any, config: Any, options: dict[str, Any]) -> Any:
    """Return the model with the folder's weights, all of them, in fp32 on the host."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for each rank, and unreadable in a log file
    share_weight_layout(model_cls)
    try:
        model, report = model_cls.from_pretrained(folder, config=hf_config, output_loading_info=True, **options)
    except OSError as error:
        raise UserError(
            f"model.json: init_from_hf_path: '{folder}' has no weights that can be read: {error} "
            f"Set random_init: true to train from random weights."
        ) from error
    wrong = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    lines = [f"{kind.replace('_', ' ')}: {_shorten(names)}" for kind, names in wrong.items() if names]
    if lines and lookup(config, "load_strict", True):
        raise UserError(
            f"the weights in {folder} do not fit {model_cls.__name__}: {'; '.join(lines)}. "
            f"Use the folder of this architecture, or --load-strict false to keep random values for what is missing."
        )
    for line in lines:
        print_rank_0(f"{folder}: {line}")
    return model


def _shorten(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
