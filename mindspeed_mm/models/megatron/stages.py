"""Which layers each pipeline stage, or each virtual chunk of it, holds."""

from __future__ import annotations

from typing import Any

from mindspeed_mm.errors import UserError


def layers_of_chunks(layers: int, stages: int, chunks: int = 1, written: Any = None) -> list[list[range]]:
    """Return ``[stage][chunk]``, the layers there, counted from 0.

    A microbatch passes chunk 0 of all stages, then chunk 1 of all stages, and so on.

    Args:
        layers: of the whole model.
        stages: pipeline-parallel size.
        chunks: virtual pipeline size.
        written: ``pipeline_num_layers`` of model.json: the number of layers of each stage, or for each chunk a list
            with that of each stage; None divides evenly.

    Raises:
        UserError: the layers cannot be divided like that.
    """
    key = "model.json: text_decoder.pipeline_num_layers"
    if written is None:
        if layers % (stages * chunks):
            parts = f"{stages} pipeline stages" + (f" x {chunks} virtual chunks" if chunks > 1 else "")
            raise UserError(
                f"text_decoder has {layers} layers, which {parts} (--pipeline-model-parallel-size) do not divide. Set "
                f"{key}, the number of layers of each stage, or change the flag."
            )
        counts = [[layers // (stages * chunks)] * stages for _ in range(chunks)]
    else:
        counts = written if written and isinstance(written[0], list) else [written]
        if len(counts) != chunks or any(len(row) != stages for row in counts):
            raise UserError(
                f"{key} is {written}, but there are {stages} pipeline stages (--pipeline-model-parallel-size) of "
                f"{chunks} chunk(s): write {_shape(stages, chunks)}."
            )
        if sum(map(sum, counts)) != layers:
            raise UserError(
                f"{key} is {written}, {sum(map(sum, counts))} layers in all, but text_decoder has {layers}."
            )
    found: list[list[range]] = [[] for _ in range(stages)]
    begin = 0
    for row in counts:
        for stage, count in enumerate(row):
            found[stage].append(range(begin, begin + count))
            begin += count
    return found


def _shape(stages: int, chunks: int) -> str:
    return f"{chunks} lists of {stages} numbers" if chunks > 1 else f"a list of {stages} numbers"
