"""Which parts of which Hugging Face tensors the parameters of a Megatron model are, in any parallel layout.

    for name, boxes in pieces(model).items():
        for piece in boxes:
            piece.view(parameters[name]).copy_(hf_tensors[piece.hf_name][piece.block])

Loading, exporting, storing, comparing and recording weights, gradients and optimizer state all go by this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mindspeed_mm.distributed.piece import Piece
from mindspeed_mm.models.megatron.lora_layout import adapter_pieces
from mindspeed_mm.models.megatron.vocabulary import VocabularyShare

__all__ = ["Piece", "boxes", "hf_shapes", "pieces"]


def pieces(model: nn.Module) -> dict[str, list[Piece]]:
    """Return what every local parameter of a model, or of one pipeline chunk of it, consists of.

    Args:
        model: a ``VLMModel``, or a megatron-core ``GPTModel`` with the decoder of a causal language model. Wrappers
            that keep the model in ``module`` (DDP, Float16Module) are looked through.

    Returns:
        Local parameter name, relative to the unwrapped model, to its boxes. Together they cover it exactly, but for
        rows of the vocabulary that are padding; where all are, there is no box.

    Raises:
        KeyError: a parameter whose counterpart in the Hugging Face model is not known.
    """
    return {name: [box for box in boxes if 0 not in box.sizes] for name, boxes in _shares(model).items()}


def _shares(model: nn.Module) -> dict[str, list[Piece]]:
    """Return boxes that may be empty."""
    model = _unwrap(model)
    decoder: Any = getattr(model, "text_decoder", model)
    hf_decoder = "model" if decoder is model else model.blueprint.decoder_path
    names: dict[str, list[Piece]] = {}
    if decoder is not model:
        encoder: Any = getattr(model, "image_encoder", None)
        if encoder is not None:
            names.update(_encoder_shares(encoder, "image_encoder.", encoder.hf_name))
    path = "" if decoder is model else "text_decoder."
    names.update({path + name: boxes for name, boxes in _decoder_pieces(decoder, hf_decoder).items()})
    return names


def boxes(*chunks: nn.Module, adapters: bool = False) -> list[tuple[Piece, Tensor]]:
    """Return what this rank holds: every box with the view of the parameter it is in; for not sharded parameters.

    Args:
        *chunks: of this rank.
        adapters: those of adapters (LoRA), instead of those of the model.
    """
    found = []
    for chunk in chunks:
        layout, parameters = pieces(chunk), dict(_unwrap(chunk).named_parameters())
        found += [
            (piece, piece.view(parameters[name].detach()))
            for name, parts in layout.items()
            if (".adapter." in name) == adapters
            for piece in parts
        ]
    return found


def hf_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the Hugging Face names and whole shapes of what this rank holds, or parts of it."""
    return {piece.hf_name: piece.global_shape for boxes in _shares(model).values() for piece in boxes}


def _unwrap(model: Any) -> Any:
    while not hasattr(model, "text_decoder") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def _encoder_shares(module: nn.Module, path: str, hf_name: Any) -> dict[str, list[Piece]]:
    """Modules of Hugging Face, whole on every tensor-parallel rank but for the linear layers of the projector."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    split_along: dict[str, int] = {}
    for name, child in module.named_modules():
        if isinstance(child, ColumnParallelLinear):
            split_along |= {f"{name}.weight": 0, f"{name}.bias": 0}
        elif isinstance(child, RowParallelLinear):
            split_along[f"{name}.weight"] = 1
    found = {}
    for name, parameter in module.named_parameters():
        sizes, offsets, whole = tuple(parameter.shape), [0] * parameter.dim(), list(parameter.shape)
        dim = split_along.get(name)
        if dim is not None:
            offsets[dim], whole[dim] = rank * sizes[dim], ranks * sizes[dim]
        local = tuple(slice(0, size) for size in sizes)
        replica = dim is None and rank > 0
        found[path + name] = [Piece(hf_name(name), tuple(whole), tuple(offsets), sizes, local, replica)]
    return found


@dataclass(frozen=True)
class _Split:
    """A group of ranks that parameters are split over, and this rank's place in it."""

    rank: int
    size: int


@dataclass(frozen=True)
class _Layer:
    """What the rules below have to know."""

    config: Any
    prefix: str  # of the layer, or of the decoder, in the HF model
    tensor: _Split
    experts: _Split  # which experts are here
    expert_tensor: _Split  # how each of them is split

    def box(
        self,
        hf_name: str,
        shape: tuple[int, ...],
        dim: int = 0,
        split: _Split | None = None,
        at: int = 0,
        lead: tuple[int, int] | None = None,
    ) -> Piece:
        """Return this rank's share of a whole tensor, all of it where ``split`` is None.

        Args:
            hf_name: below ``prefix``.
            shape: of the whole tensor without the dimension that counts experts.
            dim: along which it is split.
            split: the ranks it is split over.
            at: where the share begins along ``dim`` in the local parameter.
            lead: (expert, number of experts), where the whole tensor holds all of them.
        """
        length = shape[dim] // (split.size if split else 1)
        offsets = [0] * len(shape)
        offsets[dim] = split.rank * length if split else 0
        sizes = [*shape[:dim], length, *shape[dim + 1 :]]
        local = [slice(0, size) for size in sizes]
        local[dim] = slice(at, at + length)
        first, all_of_them, one = ([lead[0]], [lead[1]], [1]) if lead else ([], [], [])
        return Piece(
            f"{self.prefix}.{hf_name}",
            (*all_of_them, *shape),
            (*first, *offsets),
            (*one, *sizes),
            tuple(local),
            replica=split is None and self.tensor.rank > 0,
        )

    def query_key_value(self, kind: str) -> Iterator[Piece]:
        """Fused by groups: the queries that share a key, that key, its value; then the next group."""
        config = self.config
        queries, groups = config.num_attention_heads // config.num_query_groups, config.num_query_groups
        mine, head = groups // self.tensor.size, config.kv_channels
        tail = (config.hidden_size,) if kind == "weight" else ()
        for place in range(mine):
            at = place * (queries + 2) * head
            for name, heads in (("q", queries), ("k", 1), ("v", 1)):
                rows = heads * head
                begin = (self.tensor.rank * mine + place) * rows
                yield Piece(
                    f"{self.prefix}.self_attn.{name}_proj.{kind}",
                    (groups * rows, *tail),
                    (begin, *(0 for _ in tail)),
                    (rows, *tail),
                    (slice(at, at + rows), *(slice(0, size) for size in tail)),
                    replica=False,
                )
                at += rows

    def gate_and_up(self) -> Iterator[Piece]:
        """The two halves of a gated MLP's first matrix; each rank has its share of one above that of the other."""
        shape = (self.config.ffn_hidden_size, self.config.hidden_size)
        yield self.box("mlp.gate_proj.weight", shape, split=self.tensor)
        yield self.box("mlp.up_proj.weight", shape, split=self.tensor, at=shape[0] // self.tensor.size)

    def expert_gate_and_up(self, local_expert: int) -> Iterator[Piece]:
        """As ``gate_and_up``; the HF model has both halves and all experts in one tensor."""
        width, split = self.config.moe_ffn_hidden_size, self.expert_tensor
        share, expert, count = width // split.size, self._expert(local_expert), self.config.num_moe_experts
        for half in range(2):
            yield Piece(
                f"{self.prefix}.mlp.experts.gate_up_proj",
                (count, 2 * width, self.config.hidden_size),
                (expert, half * width + split.rank * share, 0),
                (1, share, self.config.hidden_size),
                (slice(half * share, (half + 1) * share), slice(0, self.config.hidden_size)),
                replica=False,
            )

    def expert_down(self, local_expert: int) -> Iterator[Piece]:
        shape = (self.config.hidden_size, self.config.moe_ffn_hidden_size)
        lead = (self._expert(local_expert), self.config.num_moe_experts)
        yield self.box("mlp.experts.down_proj", shape, dim=1, split=self.expert_tensor, lead=lead)

    def _expert(self, local_expert: int) -> int:
        return self.experts.rank * (self.config.num_moe_experts // self.experts.size) + local_expert

    def pieces_of(self, name: str) -> list[Piece]:
        """Return the boxes of a layer's parameter.

        Raises:
            KeyError: it is not known.
        """
        config, width = self.config, self.config.hidden_size
        heads = config.num_attention_heads * config.kv_channels
        if name in _NORMS:
            return [self.box(_NORMS[name], (width,))]
        if name in _HEAD_NORMS:
            return [self.box(_HEAD_NORMS[name], (config.kv_channels,))]
        if name.startswith("self_attention.linear_qkv."):
            return list(self.query_key_value(name.rpartition(".")[2]))
        if name == "self_attention.linear_proj.weight":
            return [self.box("self_attn.o_proj.weight", (width, heads), dim=1, split=self.tensor)]
        if name == "mlp.linear_fc1.weight":
            return list(self.gate_and_up())
        if name == "mlp.linear_fc2.weight":
            return [self.box("mlp.down_proj.weight", (width, config.ffn_hidden_size), dim=1, split=self.tensor)]
        if name == "mlp.router.weight":
            return [self.box("mlp.gate.weight", (config.num_moe_experts, width))]
        if match := _EXPERT.fullmatch(name):
            of_first = match["matrix"] == "1"
            local_expert = int(match["one"] or match["grouped"])
            return list((self.expert_gate_and_up if of_first else self.expert_down)(local_expert))
        raise KeyError(name)


# With TransformerEngine, a norm is part of the linear layer behind it.
_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
_HEAD_NORMS = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
# A list of experts, or TransformerEngine's grouped layers with a weight for each.
_EXPERT = re.compile(
    r"mlp\.experts\.(local_experts\.(?P<one>\d+)\.)?linear_fc(?P<matrix>[12])\.weight(?P<grouped>\d+)?"
)


def _decoder_pieces(decoder: Any, hf_prefix: str) -> dict[str, list[Piece]]:
    from megatron.core import parallel_state as ps

    tensor = _Split(ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size())
    experts = _Split(ps.get_expert_model_parallel_rank(), ps.get_expert_model_parallel_world_size())
    expert_tensor = _Split(ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size())

    def at(prefix: str) -> _Layer:
        return _Layer(decoder.config, prefix, tensor, experts, expert_tensor)

    width = decoder.config.hidden_size
    # A GPTModel that is no TextDecoder has no padding.
    share = getattr(decoder, "vocabulary", None) or VocabularyShare(
        decoder.vocab_size, decoder.vocab_size // tensor.size, tensor.rank
    )
    embedding = Piece(
        f"{hf_prefix}.embed_tokens.weight",
        (share.words, width),
        (share.first, 0),
        (share.held, width),
        (slice(0, share.held), slice(0, width)),
        replica=False,
    )
    outside = {
        "embedding.word_embeddings.weight": embedding,
        "decoder.final_layernorm.weight": at(hf_prefix).box("norm.weight", (width,)),
        "output_layer.weight": _head(decoder, embedding),
    }
    found: dict[str, list[Piece]] = {}
    for name, parameter in decoder.named_parameters():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        try:
            if match:
                number = decoder.decoder.layers[int(match[1])].layer_number - 1  # of the whole model
                linear, _, matrix = match[2].partition(".adapter.")
                boxes = at(f"{hf_prefix}.layers.{number}").pieces_of(f"{linear}.weight" if matrix else linear)
                found[name] = adapter_pieces(matrix, boxes, parameter.shape, tensor.rank > 0) if matrix else boxes
            else:
                found[name] = [outside[name]]
        except KeyError:
            raise KeyError(f"{name}: it is not known which Hugging Face parameter this is") from None
    return found


def _head(decoder: Any, embedding: Piece) -> Piece:
    """The output layer is a copy of the embedding where they are tied but on different pipeline stages."""
    if decoder.share_embeddings_and_output_weights:
        return Piece(**{**vars(embedding), "replica": not decoder.pre_process})
    return Piece(**{**vars(embedding), "hf_name": "lm_head.weight"})
