"""Where a part of a local parameter lies in a tensor with a Hugging Face name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A rectangular box that a local parameter and a named whole tensor share.

    A parameter of a Megatron model is one or more of them, whatever its layout (tensor, pipeline, expert parallel):
    ``linear_qkv`` is rows of the query, key and value weights, an expert's matrix is one slice of all experts'.
    Weights come in, go out and are stored box by box under the names of the whole.

    Attributes:
        hf_name: parameter name in the Hugging Face model, as ``named_parameters()`` has it.
        global_shape: of that whole parameter.
        offsets: where the box begins in it.
        sizes: of the box, one for each dimension of the whole.
        local: the same box in the local parameter, a slice for each dimension of that. It may have fewer
            dimensions than the whole, which then is 1 long in the others.
        replica: whether another rank of the tensor-, pipeline- or expert-parallel groups holds this box as well and
            is the one that counts and writes it. Copies over data-parallel ranks are not told here.
    """

    hf_name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local: tuple[slice, ...]
    replica: bool

    @property
    def block(self) -> tuple[slice, ...]:
        """The box in the whole tensor, a slice for each dimension."""
        return tuple(slice(at, at + size) for at, size in zip(self.offsets, self.sizes, strict=True))

    def view(self, local_parameter: Tensor) -> Tensor:
        """Return the box of a local parameter, or of a gradient or optimizer state of its shape, as a view of it."""
        return local_parameter[self.local].view(self.sizes)
