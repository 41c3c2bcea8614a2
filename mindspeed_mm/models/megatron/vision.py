"""Images to features and into the text, by the model's own Hugging Face code, on the first pipeline chunk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mindspeed_mm.distributed.meta import materialize, meta_init
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.megatron.blueprint import Blueprint
from mindspeed_mm.models.megatron.split_images import split_images
from mindspeed_mm.models.transformers.families import Family, family_of
from mindspeed_mm.models.transformers.vision_metadata import VisionMetadata


@dataclass(frozen=True)
class Merged:
    """What the text decoder is given.

    Attributes:
        embeddings: (B, S, H), those of images at their places.
        mask: (B, S) bool, where images are; None unless there are features.
        features: for each of the decoder's first layers (T, H), what is added there; None if nothing.
    """

    embeddings: Tensor
    mask: Tensor | None
    features: list[Tensor] | None


class _Captured(nn.Module):
    """Stands where the Hugging Face model has its text decoder, and keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, **arguments: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self.arguments = arguments
        return BaseModelOutputWithPast(last_hidden_state=arguments["inputs_embeds"])


class ImageEncoder(nn.Module):
    """The Hugging Face model without its text decoder: vision tower, projector, and how features enter the text.

    All tensor-parallel ranks hold the tower whole, and compute the same there or share the images.

    Attributes:
        encoder: the vision tower.
        projector: from its features to embeddings; None where the tower has that inside.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        config: Any,
        attention: Any = None,
        shared_by: dist.ProcessGroup | None = None,
    ) -> None:
        """Build it.

        Its values are random, from torch's global generator; undefined without ``config.perform_initialization``.

        Args:
            blueprint: the model.
            config: ``TransformerConfig`` of the text decoder, for dtype and tensor-parallel ranks.
            attention: ``attn_implementation`` as Transformers takes it; None: its choice.
            shared_by: the tensor-parallel ranks, if they are to share the images of a micro-batch.

        Raises:
            UserError: images are to be shared, and it is not known how this family takes them.
        """
        super().__init__()
        self._family = family_of(blueprint.config)
        self._paths: dict[str, str] = {}
        with nullcontext() if config.perform_initialization else meta_init():
            backbone = _without_decoder(blueprint, attention, config.params_dtype)
        materialize(backbone, torch.device("cpu"))
        # Not registered: the modules have one path each, through `encoder` and `projector`.
        self._unregistered = (backbone, f"{blueprint.backbone_path}.")
        self.encoder = self._take("encoder", "vision_encoder")
        self.projector = self._take("projector", "vision_projector")
        self._metadata = VisionMetadata(backbone)
        self._blank = self._family.dummy_image(blueprint.config) if self._family.dummy_image else None
        self._shares = shared_by is not None and dist.get_world_size(shared_by) > 1
        if self._shares:
            if self._blank is None:
                raise UserError(
                    f"model.json: enable_encoder_dp: it is not known how {type(blueprint.model).__name__} takes "
                    f"images, so that tensor-parallel ranks cannot share them. Remove the key."
                )
            split_images(self.encoder, self._blank, shared_by)
        elif config.tensor_model_parallel_size > 1:
            self._split_projector(config)

    def _split_projector(self, config: Any) -> None:
        """Let tensor-parallel ranks share it; where they share the images, each needs it whole for its own."""
        from mindspeed_mm.models.megatron.projector import split_projector

        backbone, prefix = self._unregistered
        for path in self._family.components["vision_projector"]:
            if _has(backbone, path.removeprefix(prefix)):
                split_projector(backbone.get_submodule(path.removeprefix(prefix)), config)

    def _take(self, name: str, component: str) -> nn.Module | None:
        backbone, prefix = self._unregistered
        path = next(p for p in self._family.components[component] if _has(backbone, p.removeprefix(prefix)))
        if any(path.startswith(f"{taken}.") for taken in self._paths.values()):
            return None
        self._paths[name] = path
        module: nn.Module = backbone.get_submodule(path.removeprefix(prefix))
        return module

    @property
    def family(self) -> Family:
        """What is known of the model's family."""
        return self._family

    @property
    def shares_images(self) -> bool:
        """Whether tensor-parallel ranks share the images of a micro-batch."""
        return self._shares

    def hf_name(self, name: str) -> str:
        """Return what a parameter or module in this one is called in the Hugging Face model."""
        child, _, rest = name.partition(".")
        return f"{self._paths[child]}.{rest}" if rest else self._paths[child]

    def forward(
        self, embed: Callable[[Tensor], Tensor], input_ids: Tensor, media: Mapping[str, Any], metadata: Any = None
    ) -> Merged:
        """Embed the text and put the images' features into it.

        Args:
            embed: from (B, S) tokens to (B, S, H).
            input_ids: (B, S).
            media: pixels and grids, as the Hugging Face model takes them.
            metadata: what the tower would compute from the grids, see ``VisionMetadata``.
        """
        backbone, _ = self._unregistered
        captured = backbone.language_model
        backbone.get_input_embeddings = lambda: embed
        with self._metadata.for_batch(None if self._shares else metadata, input_ids.device):
            backbone(input_ids=input_ids, **media)
        arguments, captured.arguments = captured.arguments, {}
        embeddings = arguments["inputs_embeds"]
        if all(media.get(key) is None for key in ("pixel_values", "pixel_values_videos")):
            embeddings = embeddings + self._nothing(embeddings)
        return Merged(embeddings, arguments.get("visual_pos_masks"), arguments.get("deepstack_visual_embeds"))

    def _nothing(self, embeddings: Tensor) -> Tensor | float:
        """Return zero, a function of all parameters that are trained.

        Gradients of all of them have to arrive in every micro-batch, or their reduction waits for them for ever.
        """
        if self._blank is None or not any(p.requires_grad for p in self.parameters()):
            return 0.0
        backbone, _ = self._unregistered
        blank = {k: v.to(embeddings.device) for k, v in self._blank.items()}
        leaves = [t for t in tree_leaves(backbone.get_image_features(**blank)) if isinstance(t, Tensor)]
        zero: Tensor = torch.stack([t.sum() for t in leaves if t.requires_grad]).sum() * 0
        return zero.to(embeddings.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Keep what is not a weight in its dtype, such as the frequencies of rotary angles."""
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.is_floating_point()
        ]
        result = super()._apply(fn, recurse)
        for module, name, buffer in kept:
            setattr(module, name, buffer.to(getattr(module, name).device))
        return result


def _without_decoder(blueprint: Blueprint, attention: Any, dtype: torch.dtype) -> Any:
    """Return the backbone with its text decoder replaced by what captures its arguments."""
    config = copy.deepcopy(blueprint.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
    if getattr(text, "layer_types", None):
        text.layer_types = []
    # The dtype here leaves what is not a weight in fp32, as `_apply` does.
    options = {"attn_implementation": attention, "dtype": dtype}
    backbone = type(blueprint.backbone)._from_config(config, **options)
    backbone.config = blueprint.config
    name = blueprint.decoder_path.removeprefix(f"{blueprint.backbone_path}.")
    setattr(backbone, name, _Captured())
    return backbone.train()


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
