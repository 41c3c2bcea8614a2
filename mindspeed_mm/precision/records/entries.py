"""What a record is made of: keys, samples, kept calls, and all that one rank notes of one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mindspeed_mm.precision.records.sketch import Sketch

PHASES = (
    "data",
    "weights",
    "forward",
    "loss",
    "backward",
    "grad_local",
    "grad_reduced",
    "grad_clipped",
    "optimizer",
)
"""In causal order."""


@dataclass(frozen=True)
class Key:
    """What a sketch is of.

    Attributes:
        phase: one of :data:`PHASES`.
        site: path of a module or parameter in the Hugging Face model, whatever wraps it; empty for the model itself.
        what: ``input.0``, ``output.0``, ``grad_input.0``, ``grad_output.0``, ``parameter``, ``gradient``, ``exp_avg``,
            ``update``, ``logits`` and so on. Inputs count as in the signature of ``forward``; of a module that is
            called again in a micro-batch, the second call's end in ``@1``.
    """

    phase: str
    site: str
    what: str

    def __str__(self) -> str:
        """Return it in one line."""
        return f"{self.phase} {self.site or 'the model'} {self.what}"


@dataclass(frozen=True)
class SampleFingerprint:
    """What one sample of a global batch holds.

    Attributes:
        id: hash of its ``input_ids`` without padding, in hexadecimal: the same in every framework. Without
            ``input_ids``, of all its fields.
        fields: hash of each field, padding left out, integers alike whatever their width.
        position: its place in the order of samples, all ranks together; None where nobody knows.
        name: what the data set calls it, ``train.jsonl:17``.
        tokens: its ``input_ids``, without padding.
    """

    id: str
    fields: dict[str, str]
    position: int | None = None
    name: str | None = None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call of a module whose tensors were kept.

    Attributes:
        args, kwargs: what ``forward`` got; what is neither tensor, container nor plain value is None.
        output: what it returned; an HF output object as a dict.
        tensors: all tensors of the call under the names they have in keys: ``input.0``, ``output.0``, and the gradients
            ``grad_output.0``, ``grad_input.0`` on the scale of the loss of the global batch.
        rank, micro_batch, index: where and when; ``index`` counts the module's calls in the micro-batch.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    tensors: dict[str, Tensor]
    rank: int = 0
    micro_batch: int = 0
    index: int = 0


@dataclass
class RankStep:
    """What one rank writes of one step.

    Attributes:
        entries: in the order of first execution, micro-batches added up.
        scalars: value and how ranks combine: ``sum``, ``same`` (rank 0 speaks), ``copy`` (another rank speaks).
        samples: of this rank; empty on a rank whose batch another rank has too.
        groups: of the optimizer: ``class``, ``names`` and the settings of each.
        tree: class of each module by path, in the order of ``named_modules``.
        notes: what a reader of the record should know.
        tensors: kept parts, with their ``(offset, size)`` in each dimension, None for all, and the full shape; of one
            key there may be several.
        calls: kept calls by site.
        stages: of what modules made, the number of their part of a pipeline, in the order of the forward pass; what is
            not named here is of the first.
    """

    entries: dict[Key, Sketch] = field(default_factory=dict)
    scalars: dict[str, tuple[float, str]] = field(default_factory=dict)
    samples: list[SampleFingerprint] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    tree: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tensors: list[tuple[Key, Tensor, tuple[tuple[int, int], ...] | None, tuple[int, ...]]] = field(default_factory=list)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    stages: dict[Key, int] = field(default_factory=dict)
