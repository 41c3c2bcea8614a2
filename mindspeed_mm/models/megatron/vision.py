"""Images to features and into the text, by the model's own Hugging Face code, on the first pipeline chunk."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mindspeed_mm.distributed.meta import materialize, meta_init
from mindspeed_mm.distributed.state import host_group
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.megatron.blueprint import Blueprint
from mindspeed_mm.models.megatron.split_images import split_images
from mindspeed_mm.models.transformers.blank_image import add_nothing
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
        missing = self._missing_calls(media)
        with self._metadata.for_batch(None if self._shares else metadata, input_ids.device):
            backbone(input_ids=input_ids, **media)
        arguments, captured.arguments = captured.arguments, {}
        embeddings = arguments["inputs_embeds"]
        for _ in range(missing):
            embeddings = self._add_blank(embeddings)
        return Merged(embeddings, arguments.get("visual_pos_masks"), arguments.get("deepstack_visual_embeds"))

    def _missing_calls(self, media: Mapping[str, Any]) -> int:
        """Return how often the tower has to be called beside what is in the batch; all ranks ask before they call it.

        Gradients of what is trained have to arrive in every micro-batch, or their reduction waits for them for ever.
        Under FSDP2 every call gathers, of frozen parameters too: all ranks have to call it equally often.
        """
        if self._blank is None or not (self._gathers or any(p.requires_grad for p in self.parameters())):
            return 0
        calls = sum(media.get(key) is not None for key in ("pixel_values", "pixel_values_videos"))
        most = torch.tensor(max(calls, 1))
        if self._gathers and "pixel_values_videos" in inspect.signature(self._unregistered[0].forward).parameters:
            # Only the hosts know what is in a batch, and they agree without waiting for their devices.
            dist.all_reduce(most, dist.ReduceOp.MAX, group=host_group("blank images"))
        return int(most) - calls

    def _add_blank(self, embeddings: Tensor) -> Tensor:
        """Add nothing, as a function of all parameters."""
        assert self._blank is not None
        blank = {key: value.to(embeddings.device) for key, value in self._blank.items()}
        return add_nothing(embeddings, self._unregistered[0].get_image_features(**blank))

    @cached_property
    def _gathers(self) -> bool:
        """Whether FSDP2 shards parts of it; known from the first batch on."""
        return dist.get_world_size() > 1 and any(isinstance(module, FSDPModule) for module in self.modules())

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
