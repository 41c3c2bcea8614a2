"""Which parts of the adapters of a Hugging Face model the adapter of a megatron-core layer is."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_mm.distributed.piece import Piece


def adapter_pieces(matrix: str, weight: Sequence[Piece], shape: Sequence[int], copy: bool) -> list[Piece]:
    """Return the boxes of an adapter's parameter, which follow from those of the weight it is added to.

    A has the weight's columns, and r rows for each Hugging Face layer that is fused; B has the weight's rows.

    Args:
        matrix: ``lora_A`` or ``lora_B``.
        weight: boxes of the weight.
        shape: of the parameter here.
        copy: whether another rank has the same, if the parameter is not split over tensor-parallel ranks.
    """
    layers = list(dict.fromkeys(piece.hf_name for piece in weight))
    columns_are_split = weight[0].sizes[1] < weight[0].global_shape[1]
    if matrix == "lora_B":
        rank = shape[1]
        return [
            Piece(
                _name(box.hf_name, matrix),
                (box.global_shape[0], rank),
                (box.offsets[0], 0),
                (box.sizes[0], rank),
                (box.local[0], slice(0, rank)),
                replica=copy and columns_are_split,
            )
            for box in weight
        ]
    rank, columns = shape[0] // len(layers), weight[0]
    return [
        Piece(
            _name(layer, matrix),
            (rank, columns.global_shape[1]),
            (0, columns.offsets[1]),
            (rank, columns.sizes[1]),
            (slice(number * rank, (number + 1) * rank), columns.local[1]),
            replica=copy and not columns_are_split,
        )
        for number, layer in enumerate(layers)
    ]


def _name(weight: str, matrix: str) -> str:
    return f"{weight.removesuffix('.weight')}.{matrix}.default.weight"
