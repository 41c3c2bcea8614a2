"""The model of ``pretrain_vlm.py``: a Hugging Face vision tower before a Megatron text decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_mm import accelerator
from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.distributed.meta import is_meta_init
from mindspeed_mm.distributed.sequence_split import SequenceSplit
from mindspeed_mm.distributed.state import print_rank_0
from mindspeed_mm.errors import UserError
from mindspeed_mm.losses import IGNORE, REDUCTIONS, logits_bytes, shift_labels, sum_by_sample
from mindspeed_mm.losses.chunked import LARGE_LOGITS
from mindspeed_mm.models.common.lookup import lookup
from mindspeed_mm.models.common.module import MultiModalModule
from mindspeed_mm.models.megatron import deepstack
from mindspeed_mm.models.megatron.balance import router_losses
from mindspeed_mm.models.megatron.blueprint import read_blueprint
from mindspeed_mm.models.megatron.config import chosen_fields, transformer_config
from mindspeed_mm.models.megatron.idle import idle_keys
from mindspeed_mm.models.megatron.inputs import PaddingCheck, coordinates, gather_alike, real_images
from mindspeed_mm.models.megatron.layout import hf_shapes
from mindspeed_mm.models.megatron.positions import Positions
from mindspeed_mm.models.megatron.stages import layers_of_chunks
from mindspeed_mm.models.megatron.vision import ImageEncoder
from mindspeed_mm.models.megatron.vocabulary import DIVISOR
from mindspeed_mm.models.transformers.attention import attention_implementation
from mindspeed_mm.models.transformers.base_model import FSDP2Mixin


class VLMModel(MultiModalModule, FSDP2Mixin):
    """One pipeline chunk of a vision language model, or all of it, with random weights.

    The layout is that of megatron-core's parallel state, which has to be initialized.

    Attributes:
        image_encoder: :class:`~mindspeed_mm.models.megatron.vision.ImageEncoder` on the first chunk, else None.
        text_decoder: :class:`~mindspeed_mm.models.megatron.decoder.TextDecoder`, a megatron-core ``GPTModel``.
        config: the ``TransformerConfig`` of the text decoder.
        blueprint: the Hugging Face model that it computes the same as.
        router_losses: :class:`~mindspeed_mm.models.megatron.balance.RouterLosses` if model.json asks for them.
        weights_source: the Hugging Face folder whose weights are to be read into it; None for random ones.
        split: which positions of the newest micro-batch this rank computes.
    """

    def __init__(
        self,
        config: ModelConfig,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> None:
        """Build from model.json.

        Args:
            config: model.json.
            pre_process: whether this is the first chunk, default ``config.pre_process``.
            post_process: whether this is the last chunk, default ``config.post_process``.
            vp_stage: number of this chunk in its stage; None: the one megatron-core's parallel state is at.

        Raises:
            UserError: model.json is incomplete or contradicts its Hugging Face folder, megatron-core cannot compute
                this model, or the layout does not fit it.
        """
        if is_meta_init():
            raise UserError(
                "--init-model-with-meta-device: VLMModel is built on the host, each rank its own part; remove the flag."
            )
        accelerator.prepare_megatron_layers()
        from megatron.core import parallel_state
        from megatron.core.enums import ModelType

        from mindspeed_mm.models.megatron.decoder import TextDecoder

        self.pre_process = config.pre_process if pre_process is None else pre_process
        self.post_process = config.post_process if post_process is None else post_process
        self.blueprint = read_blueprint(config)
        if self.pre_process and (idle := idle_keys(config)):
            print_rank_0(f"model.json: these keys have no effect here: {', '.join(idle)}")
        self._engine = engine = accelerator.has_transformer_engine() and not (
            config.text_decoder and config.text_decoder.use_te is False
        )
        super().__init__(transformer_config(config, self.blueprint, transformer_engine=engine))
        self.router_losses = router_losses(config, chosen_fields(config), self.config)
        self.model_type = ModelType.encoder_or_decoder  # read by megatron-core's schedules
        self.vp_stage = parallel_state.get_virtual_pipeline_model_parallel_rank() if vp_stage is None else vp_stage

        written = lookup(config, "text_decoder.pipeline_num_layers")
        stages = self.config.pipeline_model_parallel_size
        chunks = self.config.virtual_pipeline_model_parallel_size or 1
        division = layers_of_chunks(self.config.num_layers, stages, chunks, written)
        deepstack.check_first_chunk(self.blueprint.deepstack, division[0][0])
        layers = division[parallel_state.get_pipeline_model_parallel_rank()][self.vp_stage or 0]

        self.image_encoder = None
        if self.pre_process and self.blueprint.backbone_path:
            self.image_encoder = ImageEncoder(
                self.blueprint,
                self.config,
                attention_implementation(config, self.blueprint.config),
                parallel_state.get_tensor_model_parallel_group() if config.enable_encoder_dp else None,
            )
        self.text_decoder = TextDecoder(
            self.config,
            self.blueprint,
            layers,
            self.pre_process,
            self.post_process,
            self.vp_stage,
            engine,
            config.megatron.get(DIVISOR, 1),
        )
        if self.router_losses is not None:
            self.router_losses.watch(self.text_decoder.decoder.layers)
        deepstack.add_features(self.text_decoder.decoder.layers[: self.blueprint.deepstack] if self.pre_process else [])
        self._check(layers)
        self._positions = Positions(self.blueprint)
        self._check_padding = PaddingCheck()
        self.split: SequenceSplit | None = None
        self._loss = config.loss_cfg
        self._freezes = config
        self.freeze()
        self.weights_source = None if config.random_init else config.init_from_hf_path

    def _check(self, layers: range) -> None:
        """Compare what was built with what the Hugging Face model has."""
        built, theirs = hf_shapes(self), dict(self.blueprint.model.named_parameters())
        wanted = {
            name: tuple(theirs[name].shape)
            for name in self.blueprint.names(self.pre_process, self.post_process, layers)
        }
        if built != wanted:
            wrong = sorted(name for name in built.keys() | wanted.keys() if built.get(name) != wanted.get(name))
            lines = [f"  {name}: Hugging Face {wanted.get(name)}, Megatron {built.get(name)}" for name in wrong[:8]]
            raise UserError(
                "\n".join([f"{type(self.blueprint.model).__name__} cannot be built of megatron-core's layers:", *lines])
            )

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Whether input and output embeddings are tied and trained; megatron-core then adds up their gradients."""
        weight = self.shared_embedding_or_output_weight()
        tied = bool(self.text_decoder.share_embeddings_and_output_weights)
        return tied and (weight is None or weight.requires_grad)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return this chunk's copy of the tied embedding."""
        weight: Tensor | None = self.text_decoder.shared_embedding_or_output_weight()
        return weight

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the previous pipeline chunk, (S, B, H), or a list of them alone."""
        self.text_decoder.set_input_tensor(input_tensor)

    def freeze(
        self,
        config: Any = None,
        *,
        freeze_image_encoder: bool | None = None,
        freeze_image_projection: bool | None = None,
        freeze_audio_encoder: bool = True,
    ) -> None:
        """Say what is trained; called with model.json's choice when the model is built.

        Args:
            config: unused.
            freeze_image_encoder: default ``image_encoder.vision_encoder.freeze``, and True without it.
            freeze_image_projection: default ``image_encoder.vision_projector.freeze``, and False without it.
            freeze_audio_encoder: unused, there is none.
        """
        frozen = {
            "vision_encoder": _first(
                freeze_image_encoder, lookup(self._freezes, "image_encoder.vision_encoder.freeze"), True
            ),
            "vision_projector": _first(
                freeze_image_projection, lookup(self._freezes, "image_encoder.vision_projector.freeze"), False
            ),
        }
        if self.image_encoder is not None:
            for name, parameter in self.image_encoder.named_parameters():
                component = self.image_encoder.family.component_of(self.image_encoder.hf_name(name))
                parameter.requires_grad = not frozen[component or "vision_projector"]
        self.text_decoder.requires_grad_(not lookup(self._freezes, "text_decoder.freeze", False))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inference_params: Any = None,
        decoder_input: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        extra_block_kwargs: Any = None,
        cache_position: Any = None,
        rope_deltas: Any = None,
        image_flags: Tensor | None = None,
        transfer: Any = None,
        *,
        vision_metadata: dict[str, dict[str, Any]] | None = None,
        cu_seqlens: Tensor | None = None,
        **media: Any,
    ) -> Any:
        """Run this chunk on a micro-batch, the same on all chunks.

        Args:
            input_ids: (B, S) tokens; padding may be at the end only.
            pixel_values: of all images, as the Hugging Face model takes them; used on the first chunk.
            image_grid_thw: (images, 3), for families that have it.
            attention_mask: (B, S), 0 for padding.
            labels: (B, S), the token ids that are targets and negative elsewhere; shifted here.
            inference_params: unused, like the others of the documented signature that are not described.
            decoder_input: (B, S, H), in the place of the embedded and merged input.
            position_ids: (B, S), (3, B, S), or (4, B, S) with those of the text before the three axes; None: as the
                Hugging Face model computes them.
            packed_seq_params: of packed sequences.
            extra_block_kwargs: unused.
            cache_position: unused.
            rope_deltas: unused.
            image_flags: (images,) or (images, 1), 0 for images that only fill up.
            transfer: unused.
            vision_metadata: what the tower would compute from the grids.
            cu_seqlens: (N + 1,) where the N samples of a packed row lie.
            **media: what else the Hugging Face model takes, videos for example; None is left out.

        Returns:
            The hidden states (S, B, H) unless this is the last chunk. There, ``loss_dict`` and ``logits`` (B, S, V),
            this rank's words of the vocabulary and of the positions (see
            :class:`~mindspeed_mm.distributed.sequence_split.SequenceSplit`), None where they are computed in chunks.
            ``loss_dict`` holds ``loss``, a scalar reduced as ``loss_cfg.loss_type`` says; ``loss_mask``, (B, S) bool;
            and for ``per_token_loss``, where ``loss`` is a sum, ``token_nums``, int64 scalar; for ``per_sample_loss``,
            where it is a mean, ``sample_nums``, int64 scalar, the samples it is the mean of. Under context
            parallelism the mean of the ranks' ``loss`` is that of the whole sequences, or where it is a sum their sum,
            and ``loss_mask`` is of all positions. Without labels, ``loss`` None and ``logits``.
        """
        media.update(pixel_values=real_images(pixel_values, image_flags), image_grid_thw=image_grid_thw)
        media = {key: value for key, value in media.items() if value is not None}
        self._check_padding(attention_mask)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, media)
        position_ids = coordinates(position_ids)
        features = None
        if self.pre_process and decoder_input is None:
            decoder_input, features = self._embed(input_ids, {**media, "position_ids": position_ids}, vision_metadata)
        split = self.split = self._split(input_ids, cu_seqlens)
        hidden = self.text_decoder(
            None if decoder_input is None else split.take(decoder_input, 1).transpose(0, 1).contiguous(),
            split.take(position_ids, -1),
            attention_mask=self._packed(split),
            packed_seq_params=self._with_routers(
                packed_seq_params, split, _real_tokens(input_ids, attention_mask), labels
            ),
            features=None if features is None else split.take(features, 1),
        )
        if not self.post_process:
            return hidden
        if labels is None:
            return {"loss": None, "logits": self._by_sample(self.text_decoder.logits(hidden), input_ids)}
        return self._with_loss(hidden, labels, cu_seqlens, split)

    def _split(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> SequenceSplit:
        """Return which positions of the micro-batch this rank computes."""
        from megatron.core import parallel_state

        split = SequenceSplit(
            input_ids.shape[1],
            cu_seqlens,
            size=parallel_state.get_context_parallel_world_size(),
            rank=parallel_state.get_context_parallel_rank(),
            divisor=self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1,
        )
        if self.config.num_moe_experts is not None and self.config.moe_token_dispatcher_type == "allgather":
            gather_alike(split, len(input_ids))
        return split

    def _with_routers(
        self, packed_seq_params: Any, split: SequenceSplit, counted: Tensor, labels: Tensor | None
    ) -> Any:
        """Let the routers know which tokens count and for how much, where they have a loss."""
        if self.router_losses is None:
            return packed_seq_params
        weight: Tensor | int = 1
        if self._loss.loss_type == "per_sample_loss":
            samples = len(counted) if split.local_cu_seqlens is None else len(split.local_cu_seqlens) - 1
            weight = samples * self.config.context_parallel_size  # each of these ranks counts all of them
        elif self._loss.loss_type == "per_token_loss":
            if labels is None:
                raise UserError(
                    "the router loss needs 'labels' of every stage's batch under --calculate-per-token-loss"
                )
            weight = (shift_labels(labels) != IGNORE).sum()
        here = split.take(counted, 1, False).t()
        if self.config.sequence_parallel:
            here = here.chunk(self.config.tensor_model_parallel_size)[self.text_decoder.vocabulary.rank]
        return self.router_losses.begin(weight, here, counted.sum(), packed_seq_params)

    def _packed(self, split: SequenceSplit) -> Tensor | None:
        """Return where packed samples begin, for our attention to keep them apart; None if nothing is packed.

        It goes where a mask would. megatron-core's own ``PackedSeqParams`` would make its attention take the angles
        for those of one sample, and 0.12 does so whatever the format.
        """
        if split.cu_seqlens is not None and self._engine:
            raise UserError(
                "packing: TransformerEngine's layers would let the samples of a packed row see each other; set "
                "text_decoder.use_te to false in model.json, or packing to false in data.json"
            )
        return split.cu_seqlens

    def _embed(self, input_ids: Tensor, media: dict[str, Any], metadata: Any) -> tuple[Tensor, Tensor | None]:
        if self.image_encoder is None:
            return self.text_decoder.embed(input_ids), None
        merged = self.image_encoder(self.text_decoder.embed, input_ids, media, metadata)
        if not merged.features:
            return merged.embeddings, None
        return merged.embeddings, deepstack.spread(merged.features, merged.mask)

    def _with_loss(
        self, hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, split: SequenceSplit
    ) -> dict[str, Any]:
        from mindspeed_mm.models.megatron.loss import losses_in_chunks, losses_of_logits

        targets = shift_labels(labels)
        mask = targets != IGNORE
        counts = sum_by_sample(mask, cu_seqlens)
        targets = split.take(targets, 1, IGNORE)
        mode, share = self._loss.compute_mode, self.text_decoder.vocabulary
        if mode == "chunk" or (mode == "auto" and logits_bytes(targets.numel(), share.rows) > LARGE_LOGITS):
            logits = None
            losses = losses_in_chunks(self.text_decoder, hidden, targets.t(), self._loss.chunk_size)
        else:
            logits = self.text_decoder.logits(hidden)
            losses = losses_of_logits(logits, targets.t(), share.first)
        bounds = split.local_cu_seqlens
        sums = sum_by_sample(losses.t(), None if bounds is None else bounds.to(losses.device))
        result = {"loss": REDUCTIONS[self._loss.loss_type](sums, counts), "loss_mask": mask}
        if self._loss.loss_type == "per_token_loss":
            result["token_nums"] = (targets != IGNORE).sum()
        else:
            result["loss"] = result["loss"] * self.config.context_parallel_size
        if self._loss.loss_type == "per_sample_loss":
            result["sample_nums"] = counts.new_full((), len(counts))
        return {"loss_dict": result, "logits": None if logits is None else self._by_sample(logits, labels)}

    def _by_sample(self, logits: Tensor, whole: Tensor) -> Tensor:
        """Put the batch first, and leave out the positions that were added, where these are the last ones."""
        logits = logits.transpose(0, 1)
        return logits if self.config.context_parallel_size > 1 else logits[:, : whole.shape[1]]


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return (B, S) bool, False for padding."""
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask.bool()


def _first(*values: bool | None) -> bool:
    return bool(next(value for value in values if value is not None))
