"""The model of ``pretrain_transformers.py``: an unmodified Hugging Face model, and the loss around it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mindspeed_mm.configs.fsdp2 import load_fsdp2_config
from mindspeed_mm.distributed.fsdp2 import prepare_model
from mindspeed_mm.distributed.meta import is_meta_init
from mindspeed_mm.distributed.recompute import recomputes
from mindspeed_mm.distributed.state import print_rank_0, warn_rank_0
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.lookup import lookup
from mindspeed_mm.models.common.modelzoo import ModelHub
from mindspeed_mm.models.common.module import MultiModalModule
from mindspeed_mm.models.common.strict_forward import leave_out_what_it_does_not_take
from mindspeed_mm.models.transformers.attention import attention_implementation
from mindspeed_mm.models.transformers.base_model import FSDP2Mixin
from mindspeed_mm.models.transformers.blank_audio import BlankAudio
from mindspeed_mm.models.transformers.blank_image import BlankImage
from mindspeed_mm.models.transformers.families import family_of, has_audio, has_vision
from mindspeed_mm.models.transformers.freeze import freeze_components
from mindspeed_mm.models.transformers.language_loss import LanguageModelLoss
from mindspeed_mm.models.transformers.packed_attention import PackedAttention
from mindspeed_mm.models.transformers.vision_metadata import VisionMetadata
from mindspeed_mm.models.transformers.weight_layout import share_weight_layout


class TransformersModel(MultiModalModule):
    """An HF model named by model.json, its components frozen as asked, returning the training loss.

    Attributes:
        model: the HF model, fp32; parameter names in checkpoints start with ``model.``.
        transformer_config: its HF config.
        hf_path: the HF folder.
        pretrained_from: the HF folder if the weights come from it, now or later; None for random ones.
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
        self._loss = LanguageModelLoss(config)
        self.transformer_config = _load_hf_config(self.hf_path, config)
        model_cls: Any = ModelHub.build(config, self.transformer_config)
        if hasattr(model_cls, "overwrite_transformer_config"):
            self.transformer_config = model_cls.overwrite_transformer_config(self.transformer_config)

        options = {
            "dtype": torch.float32,
            "attn_implementation": attention_implementation(config, self.transformer_config),
        }
        random_init = bool(lookup(config, "random_init", False))
        self.pretrained_from = None if random_init else self.hf_path
        self.weights_source = self.pretrained_from if is_meta_init() else None
        if random_init or is_meta_init():
            self.model = model_cls._from_config(self.transformer_config, **options)
        else:
            self.model = _from_pretrained(model_cls, self.hf_path, self.transformer_config, config, options)
        self.model.train()
        leave_out_what_it_does_not_take(self.model)
        self._loss.attach(self.model)

        family = family_of(self.transformer_config)
        own_freeze = getattr(model_cls, "freeze", None)
        if own_freeze not in (None, FSDP2Mixin.freeze):
            self.model.freeze(config)
        else:
            freeze_components(self.model, family, config)
        self._blank_image = BlankImage(self.model, family, self.transformer_config) if family.dummy_image else None
        self._blank_audio = BlankAudio(self.model, family, self.transformer_config) if family.dummy_audio else None
        for tower, thing, there, blank in (
            ("a vision tower", "an image", has_vision, self._blank_image),
            ("an audio tower", "audio", has_audio, self._blank_audio),
        ):
            if there(self.transformer_config) and blank is None and _is_one_of_several_ranks():
                warn_rank_0(
                    f"{model_cls.__name__} has {tower} but no entry for it in FAMILIES (mindspeed_mm/models/"
                    f"transformers/families.py): every micro-batch of every rank needs {thing}, or the ranks fall out "
                    "of step."
                )
        self._packed_attention = PackedAttention(self.model)
        self._vision_metadata = VisionMetadata(self.model)
        self._accepts = set(inspect.signature(self.model.forward).parameters)

    def fully_shard(self, process_group: dist.ProcessGroup, fsdp2_config_path: str, **kwargs: Any) -> Any:
        """Shard the HF model, whose own override counts; paths in the yaml start inside it."""
        self._loss.output_is_cast(load_fsdp2_config(fsdp2_config_path).output_dtype)
        plan = prepare_model(self.model, process_group, fsdp2_config_path)
        _refuse_recompute_around(self._packed_attention.decoder, self.model)
        return plan

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        vision_metadata: dict[str, dict[str, Any]] | None = None,
        **batch: Any,
    ) -> dict[str, Tensor]:
        """Return the loss of one micro-batch.

        Args:
            input_ids: (B, S) tokens.
            labels: (B, S), the token ids that are targets and -100 elsewhere. They are shifted here, and never
                passed to HF.
            cu_seqlens: (N + 1,) int32, where the N samples of a packed row begin and the last one ends (B = 1); the
                first label of each sample must be -100, and ``position_ids`` start anew with each.
            max_seqlen: with ``cu_seqlens``, the length of the longest sample, or of the padding.
            vision_metadata: for ``image`` and ``video``, what the vision tower would compute from the grids.
            **batch: whatever else the HF model takes; None is left out.

        Returns:
            ``loss``, a scalar, reduced as ``loss_cfg.loss_type`` says; ``loss_mask``, (B, S) bool, the positions
            that predict a target; for ``per_token_loss``, where ``loss`` is a sum, ``token_nums``, int64 scalar;
            for ``per_sample_loss``, where it is a mean, ``sample_nums``, int64 scalar, the samples it is the mean of;
            with a router loss, ``aux_loss``, scalar: times its coefficient, and times ``token_nums`` where ``loss``
            is a sum, it is already part of ``loss``.
        """
        if labels is None:
            raise UserError("the batch has no 'labels': the dataset or get_batch must provide them for training.")
        batch = {key: value for key, value in batch.items() if value is not None}
        self._add_token_types(input_ids, batch)
        with ExitStack() as around:
            for blank in (self._blank_image, self._blank_audio):
                if blank:
                    around.enter_context(blank.for_batch(batch))
            around.enter_context(self._packed_attention.for_batch(cu_seqlens, max_seqlen))
            around.enter_context(self._vision_metadata.for_batch(vision_metadata, input_ids.device))
            return self._loss(self.model, {"input_ids": input_ids, **batch}, labels, cu_seqlens)

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

    def _add_token_types(self, input_ids: Tensor, batch: dict[str, Any]) -> None:
        """Say which tokens are images (1) and videos (2), for models that derive positions from it."""
        has_grid = "image_grid_thw" in batch or "video_grid_thw" in batch
        has_positions = "mm_token_type_ids" in batch or "position_ids" in batch
        if has_grid and not has_positions and "mm_token_type_ids" in self._accepts:
            image, video = self.transformer_config.image_token_id, self.transformer_config.video_token_id
            batch["mm_token_type_ids"] = (input_ids == image).int() + 2 * (input_ids == video).int()


def _refuse_recompute_around(decoder: nn.Module | None, model: nn.Module) -> None:
    """What a batch brings for the decoder (packed samples, blank images) is handed to it from outside, in forward."""
    for path, module in model.named_modules():
        if recomputes(module) and module is not decoder and decoder in set(module.modules()):
            inner = next(name for name, part in model.named_modules() if part is decoder)
            raise UserError(
                f"fsdp2 config, recompute_modules: '{path}' is around the text decoder, '{inner}', and to recompute "
                f"all of a model saves no memory. List the layers instead, such as '{inner}.layers.{{*}}'."
            )


def _is_one_of_several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


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
        model, report = model_cls.from_pretrained(
            folder, config=hf_config, output_loading_info=True, use_safetensors=True, **options
        )
    except OSError as error:
        raise UserError(
            f"model.json: init_from_hf_path: '{folder}' has no weights that can be read: {error} Only safetensors "
            "files are: pytorch_model.bin is a pickle, which may run code. Set random_init: true to train from random "
            "weights."
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
