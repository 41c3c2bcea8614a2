"""How Transformers' weights on disk relate to a model's own: renamed, split or fused.

Names and layouts on disk often differ from the module's (Qwen2.5-VL, InternVL: all names; GLM-4.5V: one tensor
for each expert on disk, one fused tensor in the module). Transformers holds the rules and the operations; this
module applies them key by key, so that nobody needs the whole model in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


class Stored(Protocol):
    """A tensor that is somewhere else until it is read."""

    @property
    def meta(self) -> torch.Tensor:
        """A tensor on meta with the shape and dtype of the stored one."""

    def read(self, block: tuple[slice, ...] = ()) -> torch.Tensor:
        """Return the tensor, or a block of it."""


def native_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class that Transformers knows a model by.

    That is the nearest base class defined in Transformers itself (an adapter's parent), else the class without
    what ``fully_shard`` put around it. Conversion rules and config.json go by this class's name.
    """
    classes = [c for c in model_class.__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, FSDPModule)]
    own = [c for c in classes if c.__module__.startswith("transformers.models.")]
    return (own or classes)[0]


def skeleton(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Return a model on meta, of the class Transformers knows, to ask for names, shapes and conversion rules."""
    with torch.device("meta"):
        return native_class(model_class)._from_config(copy.deepcopy(config), attn_implementation="eager")


@dataclass(frozen=True)
class ImportStep:
    """How one or more module weights come from tensors on disk.

    Attributes:
        sources: (pattern that matched, name on disk) of the tensors it reads, in order.
        target: the first module weight it gives.
        converter: Transformers' operation, or None when the weight is just renamed.
        outputs: what the step gives, on meta, by module name.
    """

    sources: list[tuple[str, str]]
    target: str
    converter: WeightConverter | None
    outputs: dict[str, torch.Tensor]

    @property
    def by_rows(self) -> bool:
        """Whether one row (expert) of what the step gives needs the same row of each source and no other.

        With a merge, which comes first, each source is a row.
        """
        operations = self.converter.operations if self.converter else []
        return len(self.outputs) == 1 and all(
            (isinstance(op, MergeModulelist) and op.dim == 0 and i == 0)
            or (isinstance(op, Concatenate) and op.dim > 0)
            or (isinstance(op, Transpose) and 0 not in (op.dim0, op.dim1))
            for i, op in enumerate(operations)
        )

    def run(
        self, model: PreTrainedModel, stored: Mapping[str, Stored], rows: slice | None = None
    ) -> dict[str, torch.Tensor]:
        """Read the sources and return the module weights, on the CPU, in the dtype on disk.

        Args:
            model: a `skeleton`.
            stored: the tensors on disk by name.
            rows: give only these, and read no more; for a step `by_rows`.
        """
        if rows is None:
            return _convert(self, model, {key: stored[key].read for _, key in self.sources})
        if not isinstance(self.converter.operations[0], MergeModulelist):  # type: ignore[union-attr]
            return _convert(self, model, {key: partial(stored[key].read, (rows,)) for _, key in self.sources})
        parts: dict[str, list[tuple[str, str]]] = {}
        for pattern, key in self.sources:
            parts.setdefault(pattern, []).append((pattern, key))
        own = replace(self, sources=[source for part in parts.values() for source in part[rows]])
        return own.run(model, stored)


@dataclass(frozen=True)
class ImportPlan:
    """How a model's weights come from what is stored.

    Attributes:
        steps: what to read and convert.
        unexpected: stored names that fit nowhere.
        broken: module weights whose parts on disk do not fit together, each with the reason.
    """

    steps: list[ImportStep]
    unexpected: list[str]
    broken: dict[str, str]


def plan_import(model: PreTrainedModel, stored: Mapping[str, Stored], wanted: Iterable[str]) -> ImportPlan:
    """Find out how to turn what is stored into a model's weights, by running every conversion on meta.

    Args:
        model: a `skeleton`.
        stored: the tensors on disk by name.
        wanted: the model's names of parameters and persistent buffers.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted = dict.fromkeys(wanted, True)
    prefix = model.base_model_prefix

    sources: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    unexpected = []
    # The natural order puts expert 2 before expert 10.
    for key in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if target not in wanted:
            # A rule may fire on a name that already is the module's.
            target, pattern = rename_source_key(key, [], [], prefix, wanted)
        if target not in wanted or (pattern is None and (target, False) in sources):
            unexpected.append(key)
        else:
            sources.setdefault((target, pattern is not None), []).append((pattern or key, key))

    plan = ImportPlan([], [key for key in unexpected if not _ignorable(model, key)], {})
    for (target, converted), keys in sources.items():
        step = ImportStep(keys, target, by_pattern[keys[0][0]] if converted else None, {})
        try:
            step.outputs.update(_convert(step, model, {key: _meta_of(stored[key]) for _, key in keys}))
        except (RuntimeError, ValueError) as error:
            # An expert is missing, say.
            plan.broken[target] = f"{len(keys)} tensors on disk, {error}"
        else:
            plan.steps.append(replace(step, converter=None) if _changes_nothing(step, stored) else step)
    return plan


def _changes_nothing(step: ImportStep, stored: Mapping[str, Stored]) -> bool:
    """Whether a weight that would be transposed lies there as the module has it."""
    operations = step.converter.operations if step.converter else []
    return (
        [type(op) for op in operations] == [Transpose]
        and operations[0].check_dims
        and step.outputs.keys() == {step.target}
        and stored[step.sources[0][1]].meta.shape == step.outputs[step.target].shape
    )


def _meta_of(tensor: Stored) -> Any:
    return lambda: tensor.meta


def _convert(step: ImportStep, model: PreTrainedModel, read: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if step.converter is None:
        return {step.target: read[step.sources[0][1]]()}
    converter = copy.deepcopy(step.converter)
    for pattern, key in step.sources:
        converter.add_tensor(step.target, key, pattern, read[key])
    converted = converter.convert(step.target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _ignorable(model: PreTrainedModel, key: str) -> bool:
    """Return whether a stored tensor is one that Transformers knows the model has no use for."""
    report: Any = SimpleNamespace(missing_keys=set(), unexpected_keys={key})
    model._adjust_missing_and_unexpected_keys(report)
    return not report.unexpected_keys


class DiskLayout:
    """The reverse of `plan_import`: module weights to names and layouts on disk.

    Args:
        model: a `skeleton`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # As Transformers does: a rule that strips a prefix cannot tell whether there was one.
        rules: list[Any] = [
            r for r in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(r, PrefixChange)
        ]
        self._model: Any = model
        # Spares `revert_weight_conversion` looking them up for every weight.
        self._model._weight_conversions = rules
        converters = [rule for rule in reversed(rules) if isinstance(rule, WeightConverter)]
        self._converters: list[Any] = [rule.reverse_transform() for rule in converters]

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Return the module names in groups that have to be converted together, most of them one name."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(rename_source_key(name, [], self._converters)[0], []).append(name)
        return list(groups.values())

    def convert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return one group's tensors under their names and in their layout on disk."""
        return revert_weight_conversion(self._model, tensors)
