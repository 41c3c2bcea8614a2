"""Which modules of a Hugging Face model the modules of a pipeline chunk stand for.

A module stands for the one that owns exactly the same weights, by the pieces of its own. A fused linear layer stands
for several: the rows of each one's weight are columns of its output. What weights do not tell is named here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.distributed.piece import Piece

Read = Callable[[Any], Sequence[Tensor | None]]

_DECODER, _ENCODER = "text_decoder", "image_encoder"


@dataclass(frozen=True)
class Share:
    """What a tensor that goes into or out of a module here is of one of a Hugging Face module.

    Attributes:
        site: path of that module.
        what: ``input.0``, ``output.0`` and so on, as that module's own would be called.
        columns: of the last dimension here that belong to it; None: all.
        offset: where these begin in the whole one's last dimension.
        width: of the whole one's last dimension; None: they are all of it.
        has_gradient: the gradient here is that of this module alone.
    """

    site: str
    what: str
    columns: slice | None = None
    offset: int = 0
    width: int | None = None
    has_gradient: bool = True


@dataclass(frozen=True)
class ChunkSite:
    """A module of a chunk, outside of the vision tower.

    Attributes:
        path: in the chunk.
        module: the module.
        whole: it computes all positions of the samples, on every rank; otherwise this rank's own.
        inputs: shares of the first tensor that it is given.
        outputs: shares of what it returns.
        read: from what it returns to the tensors of ``outputs``, one for each, or one for all.
        is_head: it returns the logits.
    """

    path: str
    module: nn.Module
    whole: bool
    inputs: tuple[Share, ...]
    outputs: tuple[Share, ...]
    read: Read
    is_head: bool = False

    @property
    def name(self) -> str:
        """What tells it apart."""
        return self.path


def chunk_sites(chunk: Any, layout: Mapping[str, Sequence[Piece]]) -> Iterator[ChunkSite]:
    """Yield the modules of a chunk of a ``VLMModel`` that stand for others, without those of the vision tower.

    Experts are left out: what they are given is tokens of several ranks.

    Args:
        chunk: not wrapped.
        layout: pieces of its parameters.
    """
    model = chunk.blueprint.model
    yield from _named(chunk)
    theirs = _by_weights(model)
    taken: set[str] = set()
    for path, module in reversed(list(chunk.named_modules())):  # inner ones first
        if not path.startswith(f"{_DECODER}.") or path == f"{_DECODER}.output_layer":
            continue
        own = _pieces_below(layout, path)
        if not own or all(len(piece.sizes) > len(piece.local) for piece in own):
            continue
        whole = path.startswith(f"{_DECODER}.embedding")
        site = theirs.get(frozenset(piece.hf_name for piece in own))
        if site is not None and site not in taken:
            taken.add(site)
            inputs: tuple[Share, ...] = (Share(site, "input.0"),)
            outputs: tuple[Share, ...] = (Share(site, "output.0"),)
            read: Read = _first
            if hasattr(module, "routing"):
                # Of what it returns, only the weights of the chosen experts are the same.
                outputs, read = (Share(site, "output.1", has_gradient=False),), _weights_of(module)
            if linear := _of_linear(layout.get(f"{path}.weight", ()), model):
                inputs, outputs = linear
            yield ChunkSite(path, module, whole, inputs, outputs, read)
        elif site is None and (linear := _of_linear(layout.get(f"{path}.weight", ()), model)):
            yield ChunkSite(path, module, whole, *linear, _first)


def rotary_frequencies(chunk: Any) -> dict[str, Tensor]:
    """Return the frequencies of the text decoder's rotary angles, by the name of the Hugging Face model's buffer."""
    rotary: Any = getattr(getattr(chunk, _DECODER, None), "rotary_pos_emb", None)
    if not hasattr(chunk, "blueprint") or not hasattr(rotary, "inv_freq"):
        return {}
    return {f"{chunk.blueprint.decoder_path}.rotary_emb.inv_freq": rotary.inv_freq}


def _named(chunk: Any) -> Iterator[ChunkSite]:
    """Yield what cannot be told by its weights."""
    blueprint, decoder = chunk.blueprint, chunk.text_decoder
    if getattr(chunk, _ENCODER, None) is not None:
        ids = _input(blueprint.backbone, blueprint.backbone_path, "input_ids")
        yield ChunkSite(_ENCODER, chunk.image_encoder, True, (ids,), (), _nothing)
    path = blueprint.decoder_path
    inputs = (_input(blueprint.decoder, path, "inputs_embeds"),) if chunk.pre_process else ()
    outputs = (Share(path, "output.last_hidden_state"),) if chunk.post_process else ()
    if inputs or outputs:
        yield ChunkSite(_DECODER, decoder, False, inputs, outputs, _first)
    if chunk.pre_process:  # every stage makes the angles, that model once
        yield _angles(chunk)
    if chunk.post_process:
        head = _path_of(blueprint.model, blueprint.model.get_output_embeddings())
        share = decoder.vocabulary
        logits = Share(head, "output.0", slice(0, share.held), min(share.first, share.words), share.words)
        given = (Share(head, "input.0"),)
        yield ChunkSite(f"{_DECODER}.output_layer", decoder.output_layer, False, given, (logits,), _first, is_head=True)


def _angles(chunk: Any) -> ChunkSite:
    """Return the rotary angles, of which that model hands on cosine and sine."""
    dtype, path = chunk.config.params_dtype, f"{chunk.blueprint.decoder_path}.rotary_emb"
    return ChunkSite(
        f"{_DECODER}.rotary_pos_emb",
        chunk.text_decoder.rotary_pos_emb,
        False,
        (),
        tuple(Share(path, f"output.{number}", has_gradient=False) for number in range(2)),
        lambda output: (output.squeeze(2).cos().to(dtype), output.squeeze(2).sin().to(dtype)),
    )


def _input(module: nn.Module, path: str, name: str) -> Share:
    """Return the argument of a Hugging Face module under the number it has in a record."""
    return Share(path, f"input.{list(inspect.signature(module.forward).parameters).index(name)}")


def _by_weights(model: nn.Module) -> dict[frozenset[str], str]:
    """Return the module of each set of parameters, the outermost; tied ones by their first name."""
    first: dict[int, str] = {}
    owned: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        path = name
        while path := path.rpartition(".")[0]:
            owned.setdefault(path, set()).add(known)
    found: dict[frozenset[str], str] = {}
    for path, module in model.named_modules():
        if path in owned and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found.setdefault(frozenset(owned[path]), path)
    return found


def _pieces_below(layout: Mapping[str, Sequence[Piece]], path: str) -> list[Piece]:
    """Return the pieces of the parameters below a module, adapters left out."""
    return [
        piece
        for name, boxes in layout.items()
        if name.startswith(f"{path}.") and ".adapter." not in name
        for piece in boxes
    ]


def _of_linear(weight: Sequence[Piece], model: nn.Module) -> tuple[tuple[Share, ...], tuple[Share, ...]] | None:
    """Return the inputs and outputs of the linear layers that a weight is of; None if it is none of a linear layer."""
    owners = list(dict.fromkeys(piece.hf_name.rpartition(".")[0] for piece in weight))
    if not owners or not all(isinstance(model.get_submodule(owner), nn.Linear) for owner in owners):
        return None
    columns = weight[0]
    inputs = tuple(
        Share(owner, "input.0", None, columns.offsets[1], columns.global_shape[1], has_gradient=len(owners) == 1)
        for owner in owners
    )
    outputs = tuple(
        Share(piece.hf_name.rpartition(".")[0], "output.0", piece.local[0], piece.offsets[0], piece.global_shape[0])
        for piece in weight
    )
    return inputs, outputs


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(path for path, other in model.named_modules() if other is module)


def _first(output: Any) -> Sequence[Tensor | None]:
    """Return the one tensor of a module that returns it, perhaps with a bias or the like beside it."""
    return (output[0] if isinstance(output, tuple) else output,)


def _nothing(output: Any) -> Sequence[Tensor | None]:
    return ()


def _weights_of(router: Any) -> Read:
    """Return what gives the weights of the experts of each token, the largest first, (S, B, k)."""

    def read(output: Any) -> Sequence[Tensor | None]:
        probabilities = output[0].detach()
        return (torch.topk(probabilities, router.topk, dim=-1).values,)

    return read
