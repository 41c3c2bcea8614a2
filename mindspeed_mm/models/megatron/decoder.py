"""The text decoder: megatron-core's ``GPTModel`` with layers, numbers and angles of our choice.

This imports megatron-core; import it inside functions only.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor

from mindspeed_mm.models.megatron.blueprint import Blueprint
from mindspeed_mm.models.megatron.rotary import RotaryAngles
from mindspeed_mm.models.megatron.specs import decoder_spec
from mindspeed_mm.models.megatron.vocabulary import VocabularyShare, rows_of_each


class TextDecoder(GPTModel):
    """Embeddings to hidden states, and hidden states to logits; what is between the two is up to the caller.

    ``embedding``, ``decoder`` and ``output_layer`` are megatron-core's, ``rotary_pos_emb`` is
    :class:`~mindspeed_mm.models.megatron.rotary.RotaryAngles`.

    Args:
        config: ``TransformerConfig``.
        blueprint: the model.
        layers: of this pipeline chunk, counted from 0 in the whole model.
        pre_process: whether this chunk has the embedding.
        post_process: whether this chunk has the output layer.
        vp_stage: number of this chunk in its stage; None without virtual pipeline stages.
        transformer_engine: whether to use Transformer Engine's layers.
        vocabulary_divisor: what the rows of the vocabulary on each tensor-parallel rank are a multiple of.

    Attributes:
        vocabulary: this rank's share of it.
    """

    def __init__(
        self,
        config: Any,
        blueprint: Blueprint,
        layers: range,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        transformer_engine: bool,
        vocabulary_divisor: int = 1,
    ) -> None:
        ranks = config.tensor_model_parallel_size
        share = VocabularyShare(
            blueprint.text.vocab_size,
            rows_of_each(blueprint.text.vocab_size, ranks, vocabulary_divisor),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        options: dict[str, Any] = {}
        if "vp_stage" in inspect.signature(GPTModel).parameters:
            options["vp_stage"] = vp_stage
        elif vp_stage is not None:
            parallel_state.set_virtual_pipeline_model_parallel_rank(vp_stage)
        super().__init__(
            config=config,
            transformer_layer_spec=decoder_spec(config, [blueprint.has_experts[i] for i in layers], transformer_engine),
            vocab_size=share.rows * ranks,
            max_sequence_length=blueprint.text.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=blueprint.config.tie_word_embeddings,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            **options,
        )
        self.vocabulary = share
        self._clear_padding()
        for number, layer in enumerate(self.decoder.layers, layers.start + 1):
            _set_number(layer, number)
        self.rotary_pos_emb = RotaryAngles(type(blueprint.decoder.rotary_emb)(config=blueprint.text))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of (B, S) tokens, (B, S, H), on every tensor-parallel rank the whole."""
        return self.embedding(input_ids, None).transpose(0, 1)

    def forward(
        self,
        embeddings: Tensor | None,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states behind this chunk's layers, and behind the norm if it is the last chunk.

        Args:
            embeddings: (S, B, H) on the first chunk, None on the others: they have been given the previous chunk's
                output by ``set_input_tensor``.
            position_ids: (B, S) or (3, B, S).
            attention_mask: see :class:`~mindspeed_mm.models.megatron.attention.CoreAttention`.
            packed_seq_params: of packed sequences.
            features: what :func:`~mindspeed_mm.models.megatron.deepstack.add_features` adds, (N, S, B, H).

        Returns:
            (S, B, H); under sequence parallelism this rank's part of the sequence.
        """
        if embeddings is not None and self.config.recompute_granularity == "full" and torch.is_grad_enabled():
            # Recomputed layers have a gradient only if what goes into them has one: here it may all be frozen.
            embeddings = embeddings if embeddings.requires_grad else embeddings.detach().requires_grad_()
        if self.config.sequence_parallel:
            embeddings = None if embeddings is None else scatter_to_sequence_parallel_region(embeddings)
            if features is not None:
                features = scatter_to_sequence_parallel_region(features.transpose(0, 1).contiguous()).transpose(0, 1)
        hidden: Tensor = self.decoder(
            hidden_states=embeddings,
            attention_mask=attention_mask,
            context=features,
            rotary_pos_emb=self.rotary_pos_emb(position_ids),
            packed_seq_params=packed_seq_params,
        )
        return hidden

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return (S, B, V), under tensor parallelism the words that this rank has of the vocabulary."""
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits: Tensor = self.output_layer(hidden_states, weight=tied)[0]
        return logits if self.vocabulary.held == self.vocabulary.rows else logits[..., : self.vocabulary.held]

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """Set the rows that are no words to zero, and say of how many words the tensors are."""
        embedding = self.embedding.word_embeddings if self.pre_process else None
        for module in (embedding, getattr(self, "output_layer", None)):
            if module is not None and module.weight is not None:
                module.weight[self.vocabulary.held :].zero_()
                module.weight.words = self.vocabulary.words


def _set_number(layer: Any, number: int) -> None:
    """Tell a layer its place in the whole model, counted from 1; megatron-core's own count knows even stages only."""
    layer.layer_number = layer.self_attention.layer_number = number
    if hasattr(layer.mlp, "set_layer_number"):
        layer.mlp.set_layer_number(number)
