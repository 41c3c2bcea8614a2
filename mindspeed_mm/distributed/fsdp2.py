"""Sharding by PyTorch FSDP2 as ``fsdp2_config.yaml`` describes it.

The order matters and is fixed here: recompute is put on the modules first, then every listed module is wrapped by
``fully_shard`` from the leaves up, the root last, and then prefetching and the gradient reduction are set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from mindspeed_mm import accelerator
from mindspeed_mm.configs.fsdp2 import Fsdp2Config, load_fsdp2_config
from mindspeed_mm.distributed.frozen import choose_policies
from mindspeed_mm.distributed.patterns import resolve_all, summarise
from mindspeed_mm.distributed.recompute import recompute
from mindspeed_mm.distributed.reduction import sum_gradients
from mindspeed_mm.distributed.shard_plan import ShardPlan, describe
from mindspeed_mm.distributed.units import no_split_modules, post_order, wrap_order
from mindspeed_mm.distributed.unshardable import lay_out_in_order, refuse_mixed_units, scalars
from mindspeed_mm.errors import UserError

_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DEFAULTS_OF_MISSING_FEATURES = {
    "moe_modules": None,
    "reshard_local_experts": True,
    "align_fsdp_param_groups": False,
}


def apply_fsdp2(module: nn.Module, config: Fsdp2Config, process_group: dist.ProcessGroup | None = None) -> ShardPlan:
    """Shard ``module`` in place as ``config`` says; paths in the config start at ``module``.

    Args:
        module: any module, with real or meta parameters, some of them frozen or tied.
        config: the typed ``fsdp2_config.yaml``.
        process_group: the data-parallel group; default all ranks.

    Raises:
        UserError: a value of the config does not fit the model or the world.
    """
    sharding = Sharding(module, config, process_group)
    sharding.apply()
    return sharding.finish()


def prepare_model(
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    fsdp2_config_path: str | None = None,
    *,
    param_dtype: str | None = None,
) -> ShardPlan:
    """Shard ``model`` the way it wants to be sharded: by its own override if it has one, else by ``apply_fsdp2``.

    The override is the first of these methods the model has: ``fully_shard(process_group, fsdp2_config_path, **kw)``,
    ``fully_shard()``, ``_fully_shard(fsdp2_kwargs, fsdp2_config)``. The last two find ``self.fsdp2_config`` and
    ``self.fsdp2_kwargs`` set. One that returns something falsy and wrapped nothing has declined.

    Args:
        model: with real or meta parameters.
        process_group: the data-parallel group; default all ranks.
        fsdp2_config_path: the yaml; without it every key has its default.
        param_dtype: ``bf16`` computes in bfloat16 on fp32 parameters where the yaml does not choose (``--bf16``).
    """
    sharding = Sharding(model, _with_dtype(load_fsdp2_config(fsdp2_config_path), param_dtype), process_group)
    sharding.keep_masters()
    lay_out_in_order(model)
    with sharding.active():
        if callable(method := getattr(model, "fully_shard", None)):
            if "fsdp2_config_path" in (names := _parameter_names(method)) or "**" in names:
                done = method(process_group=process_group, fsdp2_config_path=fsdp2_config_path)
            else:
                sharding.expose()
                done = method()
        elif callable(method := getattr(model, "_fully_shard", None)):
            sharding.expose()
            done = method(sharding.kwargs, sharding.config)
        else:
            done = False
        if not done and not any(isinstance(m, FSDPModule) for m in model.modules()):
            sharding.apply()
    return sharding.finish()


class Sharding:
    """One module on its way from plain to sharded.

    ``apply()`` is the whole default flow. A model with a strategy of its own calls the steps it wants, between
    ``active()`` and ``finish()``.

    Attributes:
        kwargs: what ``fully_shard`` is called with: ``mesh``, ``mp_policy``, ``reshard_after_forward``,
            ``offload_policy`` and ``ignored_params``.
        notes: lines for the plan.
    """

    _stack: list[Sharding] = []  # noqa: RUF012 - deliberately shared: it holds what is being sharded right now

    def __init__(self, module: nn.Module, config: Fsdp2Config, process_group: dist.ProcessGroup | None = None) -> None:
        self.module = module
        # A model may pass the work on to a part of itself, which reads the yaml again.
        self.config: Fsdp2Config = _with_dtype(config, self._stack[-1].config.param_dtype if self._stack else None)
        self.group = process_group if process_group is not None else dist.distributed_c10d._get_default_group()
        # What is noted there belongs to the same plan.
        self.notes: list[str] = self._stack[-1].notes if self._stack else []
        self._leader: dict[nn.Module, nn.Module] = {}
        for key, default in _DEFAULTS_OF_MISSING_FEATURES.items():
            if (value := getattr(config, key)) not in (default, []):
                raise UserError(f"fsdp2 config, {key}: {value!r} is not available yet on this road; leave the key out.")

    @classmethod
    def current(cls) -> Sharding:
        """The module being sharded right now, for helpers that are called without one."""
        if not cls._stack:
            raise UserError("This helper was called without a module, and no model is being sharded right now.")
        return cls._stack[-1]

    @classmethod
    def depth(cls) -> int:
        """How many models hand the work of sharding down at this moment; 0 outside of any."""
        return len(cls._stack)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the current one."""
        self._stack.append(self)
        try:
            yield
        finally:
            self._stack.pop()

    def expose(self) -> None:
        """Set ``fsdp2_config`` and ``fsdp2_kwargs`` on the module, where overrides read them."""
        model: Any = self.module
        model.fsdp2_config, model.fsdp2_kwargs = self.config, self.kwargs

    def keep_masters(self) -> None:
        """Make parameters that were built in 16 bits fp32 where FSDP casts them for computing.

        The optimizer then updates fp32 values with fp32 moments: a 16-bit weight loses every update that is smaller
        than about 1/256 of it.
        """
        low = [p for p in self.module.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
        if not low:
            return
        built = f"{sum(p.numel() for p in low):,} parameters were built in {str(low[0].dtype).removeprefix('torch.')}"
        if self.config.param_dtype in ("bf16", "fp16"):
            for parameter in low:
                parameter.data = parameter.data.float()
            self.notes.append(f"{built}: they are kept and updated in fp32, and cast for computing")
        else:
            self.notes.append(f"{built} and are updated in it, which loses small updates; --bf16 keeps them in fp32")

    def apply(self) -> None:
        """The default flow."""
        self.recompute()
        self.wrap()
        self.prefetch(self.config.num_to_forward_prefetch, self.config.num_to_backward_prefetch)

    def recompute(self) -> None:
        """Recompute the activations of ``recompute_modules``."""
        modules = self._runnable("recompute_modules")
        if self.config.recompute_keep and not modules:
            raise UserError(
                "fsdp2 config, recompute_keep: nothing is recomputed; list recompute_modules, or remove it."
            )
        for module in modules.values():
            recompute(module, self.config.recompute_keep)
        if modules and self.config.use_reentrant and "use_reentrant" in self.config.model_fields_set:
            self.notes.append(
                "use_reentrant: true runs as false: same gradients, and none are lost where no input needs a gradient"
            )

    def wrap(self) -> None:
        """Give each of ``sub_modules_to_wrap`` to ``fully_shard``, from the leaves up, and the root last."""
        ignored = {part for module in self.ignored_modules.values() for part in module.modules()}
        kwargs = dict(self.kwargs)
        if self.config.sub_modules_to_wrap is None:
            units = {p: m for p, m in no_split_modules(self.module).items() if m not in ignored}
            found = ", ".join(f"{pattern} ({len(paths)})" for pattern, paths in summarise(units).items())
            wrapped = f"wrapped its _no_split_modules, {found}" if units else "it names no _no_split_modules: root only"
            self.notes.append(f"sub_modules_to_wrap is left out, {type(self.module).__name__} decides: {wrapped}")
        else:
            units = self._runnable("sub_modules_to_wrap")
            if both := [path for path, module in units.items() if module in ignored]:
                raise UserError(
                    f"fsdp2 config: '{both[0]}' is in sub_modules_to_wrap and inside ignored_modules; take one out."
                )
        if (dtype := kwargs["mp_policy"].param_dtype) is not None and self.config.cast_forward_inputs:
            for module in self.ignored_modules.values():
                _compute_in_own_dtype(module, dtype)
        for path, module in self._replicated(units).items():
            units = {p: m for p, m in units.items() if not f"{p}.".startswith(f"{path}.")}
            kwargs["ignored_params"] = kwargs.get("ignored_params", set()) | set(module.parameters())
        # Only the model's own output is cast: layers in between keep handing on the compute dtype.
        inner = {**kwargs, "mp_policy": replace(kwargs["mp_policy"], output_dtype=None)}
        for group in wrap_order(self.module, units, kwargs.get("ignored_params", set())):
            fully_shard(group if len(group) > 1 else group[0], **inner)
            self._leader.update(dict.fromkeys(group, group[0]))
            if len(group) > 1:
                together = ", ".join(path for path, module in units.items() if module in group)
                self.notes.append(f"wrapped as one unit, because they share a parameter: {together}")
        fully_shard(self.module, **kwargs)

    def prefetch(self, forward: int, backward: int) -> None:
        """Let each wrapped module gather the parameters of the next ``forward`` ones, ``backward`` ones in backward.

        The order is that of registration, which is the order of execution in all usual models. FSDP2 by itself
        gathers none ahead in forward and one in backward, in the order that the forward really took, so 0 and 1
        leave the backward to it.
        """
        if forward:
            for unit, following in self._each_with_next(self.module.modules(), forward):
                unit.set_modules_to_forward_prefetch(following)
        if backward > 1:
            for unit, following in self._each_with_next(reversed(list(post_order(self.module))), backward):
                unit.set_modules_to_backward_prefetch(following)

    def finish(self) -> ShardPlan:
        """Let everything that was wrapped sum gradients over the ranks, place the rest, and say what was done."""
        refuse_mixed_units(self.module)
        sum_gradients(self.module)
        device = accelerator.device()
        self.module._apply(lambda t: t if isinstance(t, DTensor) or t.is_meta else t.to(device))
        return describe(
            self.module,
            shard_device=torch.device("cpu") if self.config.offload_to_cpu else device,
            mesh=self._mesh_in_words,
            notes=self.notes,
        )

    @cached_property
    def ignored_modules(self) -> dict[str, nn.Module]:
        """The modules kept out of FSDP: whole on every rank, their gradients left to the engine."""
        return resolve_all(self.module, self.config.ignored_modules, "ignored_modules")

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of ``fully_shard``."""
        kwargs: dict[str, Any] = {
            "mesh": self._mesh(),
            "mp_policy": self._mp_policy(),
            "reshard_after_forward": self._reshard_after_forward(),
            "offload_policy": self._offload_policy(),
        }
        ignored = {param for module in self.ignored_modules.values() for param in module.parameters()}
        if ignored := ignored | scalars(self.module):
            kwargs["ignored_params"] = ignored
        return kwargs

    @cached_property
    def _shard_size(self) -> int:
        world, size = dist.get_world_size(self.group), self.config.sharding_size
        if not isinstance(size, int):
            size = world if size == "auto" else 1
        if size < 1 or world % size:
            raise UserError(
                f"fsdp2 config, sharding_size: {size} does not divide the {world} data-parallel ranks; "
                f"use auto (= {world}) or a divisor of {world}."
            )
        return size

    def _mesh(self) -> DeviceMesh:
        world = dist.get_world_size(self.group)
        if self._shard_size == world:
            return DeviceMesh.from_group(self.group, accelerator.device_type(), mesh_dim_names=("shard",))
        # On this road the data-parallel group is the whole world, so every rank builds the same groups here.
        ranks = torch.tensor(dist.get_process_group_ranks(self.group)).view(-1, self._shard_size)
        return DeviceMesh(accelerator.device_type(), ranks, mesh_dim_names=("replicate", "shard"))

    @property
    def _mesh_in_words(self) -> str:
        world = dist.get_world_size(self.group)
        return f"{world} rank(s) = {world // self._shard_size} replica(s) x {self._shard_size} shard(s)"

    def _mp_policy(self) -> MixedPrecisionPolicy:
        config = self.config
        reduce_dtype = config.reduce_dtype
        if reduce_dtype is None and config.param_dtype in ("bf16", "fp16"):
            # FSDP2 also accumulates unreduced micro-batches in this dtype; in 16 bits that loses gradient.
            reduce_dtype = "fp32"
            self.notes.append("reduce_dtype is left out: gradients are accumulated and reduced in fp32")
        return MixedPrecisionPolicy(
            param_dtype=_DTYPES[config.param_dtype],
            reduce_dtype=_DTYPES[reduce_dtype],
            output_dtype=_DTYPES[config.output_dtype],
            cast_forward_inputs=config.cast_forward_inputs,
        )

    def _reshard_after_forward(self) -> bool | int:
        value = self.config.reshard_after_forward
        if not isinstance(value, bool) and (value < 1 or self._shard_size % value):
            raise UserError(
                f"fsdp2 config, reshard_after_forward: {value} does not divide the shard size {self._shard_size}; "
                f"use true, false or a divisor of it."
            )
        return value

    def _offload_policy(self) -> OffloadPolicy:
        if not self.config.offload_to_cpu:
            return OffloadPolicy()
        if accelerator.is_cpu():
            if self.config.pin_memory:
                self.notes.append("pin_memory: true has no use on a host without accelerator and is left out")
            return CPUOffloadPolicy(pin_memory=False)
        if "cpu:" not in (backends := dist.get_backend_config(self.group)):
            raise UserError(
                f"fsdp2 config, offload_to_cpu: true also needs a backend for tensors on the host, found only "
                f"{backends}; pass --distributed-backend {backends},cpu:gloo."
            )
        return CPUOffloadPolicy(pin_memory=self.config.pin_memory)

    def _replicated(self, units: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The frozen towers that are best left whole on every rank; what becomes of the others is noted."""
        offloads = isinstance(self.kwargs.get("offload_policy"), CPUOffloadPolicy)
        replicated, lines = choose_policies(
            self.module,
            units,
            self.kwargs.get("ignored_params", set()),
            listed=self.config.sub_modules_to_wrap is not None,
            replicate_up_to=-1 if offloads else self.config.replicate_frozen_mib * 2**20,
            dtype=self.kwargs["mp_policy"].param_dtype,
        )
        self.notes += lines
        return replicated

    def _runnable(self, key: str) -> dict[str, nn.Module]:
        """Resolve the patterns of ``key`` to modules whose ``forward`` is called, so that hooks on it run."""
        modules = resolve_all(self.module, getattr(self.config, key), key)
        for path, module in modules.items():
            if type(module).forward is nn.Module.forward:
                raise UserError(
                    f"fsdp2 config, {key}: '{path}' is a {type(module).__name__}, which has no forward of its own; "
                    f"write '{path}.{{*}}' for the modules in it."
                )
        return modules

    def _each_with_next(self, order: Iterable[nn.Module], n: int) -> Iterator[tuple[FSDPModule, list[FSDPModule]]]:
        # Modules wrapped together are one unit; the first of them speaks for all.
        units: dict[Any, None] = {}
        for module in order:
            if isinstance(module, FSDPModule) and module is not self.module:
                units.setdefault(self._leader.get(module, module))
        leaders = list(units)
        for i, unit in enumerate(leaders):
            yield unit, leaders[i + 1 : i + 1 + n]


def _compute_in_own_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Let an ignored module, whose parameters nobody casts, work between neighbours that compute in ``dtype``."""
    own = next((param.dtype for param in module.parameters() if param.is_floating_point()), None)
    if own is None or own == dtype:
        return

    def cast(values: Any, to: torch.dtype) -> Any:
        return tree_map(lambda x: x.to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, values)

    module.register_forward_pre_hook(lambda _, args, kwargs: cast((args, kwargs), own), with_kwargs=True)
    module.register_forward_hook(lambda _, args, output: cast(output, dtype))


def _with_dtype(config: Fsdp2Config, param_dtype: str | None) -> Fsdp2Config:
    if config.param_dtype is not None or param_dtype is None:
        return config
    return config.model_copy(update={"param_dtype": param_dtype})


def _parameter_names(method: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(method).parameters.values()
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}
