"""Mixins that make a model class shardable by FSDP2 and initialisable after meta construction.

They need no ``__init__`` of their own, so they work behind any base class, in any order::

    class CustomModel(MultiModalModule, FSDP2Mixin, WeightInitMixin): ...
    class Adapted(SomeHuggingFaceModel, FSDP2Mixin, WeightInitMixin): ...

The functions below the classes are the single steps of the default strategy, for a ``_fully_shard`` or
``fully_shard`` of your own. Inside one they can be called without a model: they then act on the one being sharded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from mindspeed_mm import accelerator
from mindspeed_mm.configs.fsdp2 import Fsdp2Config, load_fsdp2_config
from mindspeed_mm.distributed.fsdp2 import Sharding
from mindspeed_mm.distributed.meta import initialize, materialize, module_init
from mindspeed_mm.distributed.patterns import parse_numbers, resolve, resolve_all

# The mixins are only ever part of a module, but must not put nn.Module in front of a class's other bases.
if TYPE_CHECKING:
    from torch.nn import Module as _Module
else:
    _Module = object


class FSDP2Mixin(_Module):
    """Sharding of a model by ``fsdp2_config.yaml``, with hooks for a strategy of its own.

    ``fully_shard`` calls ``_pre_fully_shard``, ``_fully_shard`` (the usual one to override) and
    ``_post_fully_shard``.

    Attributes:
        fsdp2_config: the typed yaml, set by ``_pre_fully_shard``.
        fsdp2_kwargs: keyword arguments for ``torch.distributed.fsdp.fully_shard``, set with it.
    """

    fsdp2_config: Fsdp2Config | None = None
    fsdp2_kwargs: dict[str, Any] | None = None

    def freeze(self, config: Any) -> None:
        """Switch gradients off where ``model.json`` says so; called before sharding. Nothing by default."""

    def post_meta_init(self) -> None:
        """Set what cannot be set while parameters are on the meta device; called once they have storage."""

    def fully_shard(
        self, process_group: dist.ProcessGroup | None = None, fsdp2_config_path: str | None = None, **kwargs: Any
    ) -> bool:
        """Shard this model in place and return True.

        Args:
            process_group: the data-parallel group; default all ranks.
            fsdp2_config_path: the yaml; without it every key has its default.
            **kwargs: handed on to ``_pre_fully_shard``.
        """
        # The trainer gives storage to meta parameters itself, once it knows where their values come from.
        caller_materializes = Sharding.depth() > 0 and type(self)._post_fully_shard is FSDP2Mixin._post_fully_shard
        sharding = Sharding(self, load_fsdp2_config(fsdp2_config_path), process_group)
        with sharding.active():
            self._pre_fully_shard(process_group, fsdp2_config_path, **kwargs)
            self._fully_shard(self.fsdp2_kwargs, self.fsdp2_config)
            sharding.finish()
            if not caller_materializes:
                self._post_fully_shard()
        return True

    def _pre_fully_shard(
        self, process_group: dist.ProcessGroup | None = None, fsdp2_config_path: str | None = None, **kwargs: Any
    ) -> None:
        """Set ``fsdp2_config`` and ``fsdp2_kwargs``."""
        Sharding.current().expose()

    def _fully_shard(self, fsdp2_kwargs: dict[str, Any] | None = None, fsdp2_config: Fsdp2Config | None = None) -> None:
        """Recompute, wrap and prefetch as the yaml says."""
        Sharding.current().apply()

    def _post_fully_shard(self) -> None:
        """Give meta parameters storage and random values."""
        offload = self.fsdp2_config is not None and self.fsdp2_config.offload_to_cpu
        shard_device = torch.device("cpu") if offload else None
        materialize(self, accelerator.device(), module_init(self), shard_device=shard_device)

    def to_empty_if_needed(self, *, device: torch.device | str, recurse: bool = True) -> nn.Module:
        """Give meta tensors undefined storage on ``device`` and move the real ones there with their values."""
        return self._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device), recurse=recurse)


class WeightInitMixin(_Module):
    """Random initial weights for models that bring no scheme of their own."""

    def _init_weights(self, module: nn.Module, std: float = 0.02) -> None:
        """Initialise the parameters that belong to ``module`` itself.

        Weights are drawn from N(0, ``std``) and biases are 0; norms start as the identity, the padding row of an
        embedding at 0. A module with a true ``_is_initialized`` is left alone.
        """
        if getattr(module, "_is_initialized", False):
            return
        if isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
            return
        is_norm = "norm" in type(module).__name__.lower()
        for name, param in module._parameters.items():
            if param is None:
                continue
            if "bias" in name:
                nn.init.zeros_(param)
            elif is_norm and "weight" in name:
                nn.init.ones_(param)
            else:
                nn.init.normal_(param, std=std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    def init_weights(self) -> None:
        """Initialise every submodule by ``_init_weights``, whatever the sharding, from ``torch.initial_seed()``."""
        initialize(self, module_init(self, by_parts=True))

    init_weights._each_part = True  # type: ignore[attr-defined]


def get_nested_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path."""
    return resolve(model, path)[0][1]


def expand_wildcard_pattern(model: nn.Module, path: str) -> list[str]:
    """Return the module paths that a pattern with ``{*}`` stands for."""
    return [found for found, _ in resolve(model, path)]


def expand_range_pattern(path: str) -> list[str]:
    """Return the paths that a pattern with numbers in braces stands for, without looking at a model."""
    group = re.search(r"\{([^{}*]*)\}", path)
    if group is None:
        return [path]
    tails = expand_range_pattern(path[group.end() :])
    return [f"{path[: group.start()]}{number}{tail}" for number in parse_numbers(path, group[1]) for tail in tails]


def get_submodules_by_path(model: nn.Module, config: Iterable[str] | None) -> list[nn.Module]:
    """Return the modules that a list of patterns names, without repeats."""
    return list(resolve_all(model, config, "modules").values())


def initialize_fsdp2_config(
    fsdp2_config_path: str | None, module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> tuple[Fsdp2Config, dict[str, Any]]:
    """Return the typed yaml and the keyword arguments it means for ``torch.distributed.fsdp.fully_shard``."""
    sharding = Sharding(module, load_fsdp2_config(fsdp2_config_path), process_group)
    return sharding.config, sharding.kwargs


def get_ignored_params(module: nn.Module, device_mesh: Any, fsdp2_config: Fsdp2Config) -> set[nn.Parameter]:
    """Return the parameters of ``ignored_modules``."""
    ignored = resolve_all(module, fsdp2_config.ignored_modules, "ignored_modules")
    return {param for part in ignored.values() for param in part.parameters()}


def set_recompute_modules_to_wrap(
    module: nn.Module | None = None, config: Fsdp2Config | Iterable[str] | None = None, use_reentrant: bool = True
) -> None:
    """Recompute the activations of ``recompute_modules``, or of the modules that a list of patterns names.

    ``use_reentrant`` is accepted and has no effect: see ``mindspeed_mm.distributed.recompute``.
    """
    _sharding(module, config, "recompute_modules").recompute()


def set_fullyshard_modules_to_wrap(
    module: nn.Module | None = None, config: Fsdp2Config | Iterable[str] | None = None, **fsdp2_kwargs: Any
) -> None:
    """Wrap ``sub_modules_to_wrap``, or the modules that a list of patterns names, and then the root."""
    sharding = _sharding(module, config, "sub_modules_to_wrap")
    if fsdp2_kwargs:
        sharding.kwargs = fsdp2_kwargs
    sharding.wrap()


def set_modules_to_prefetch(*args: Any) -> None:
    """Set prefetching: ``(num_to_forward_prefetch, num_to_backward_prefetch)``, or ``(module, config)`` before them."""
    module, config = args[:2] if isinstance(args[0], nn.Module) else (None, None)
    forward, backward = args[-2:]
    _sharding(module, config, "sub_modules_to_wrap").prefetch(forward, backward)


def _sharding(module: nn.Module | None, config: Fsdp2Config | Iterable[str] | None, key: str) -> Sharding:
    if module is None:
        return Sharding.current()
    current = Sharding.current() if Sharding.depth() else None
    if current and module is current.module and config is current.config:
        return current
    if not isinstance(config, Fsdp2Config):
        base = current.config if current else Fsdp2Config()
        config = base.model_copy(update={key: None if config is None else list(config)})
    sharding = Sharding(module, config, current.group if current else None)
    if current:
        sharding.kwargs = current.kwargs
    return sharding
