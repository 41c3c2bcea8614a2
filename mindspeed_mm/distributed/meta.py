"""Meta initialisation: build a model without memory for its parameters, shard it, then give each rank its shard.

Only parameters are built on the meta device. Buffers (rotary frequencies, position ids, masks) are computed for
real in the constructor and only moved afterwards, because nothing could compute them again in general.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils.weak import WeakIdKeyDictionary

from mindspeed_mm.errors import UserError

_building: ContextVar[bool] = ContextVar("meta_init", default=False)


@contextmanager
def meta_init() -> Iterator[None]:
    """Put every parameter that is registered inside the context on the meta device.

    Unlike with ``accelerate.init_empty_weights``, a parameter registered under two names stays one parameter, and
    weights that ``from_pretrained`` loads inside the context (a frozen text encoder, say) stay real.
    """
    register = nn.Module.register_parameter
    meta_of: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        is_loaded = getattr(param, "_is_hf_initialized", False)
        if param is not None and not param.is_meta and not is_loaded:
            if param not in meta_of:
                meta_of[param] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
                meta_of[param].__dict__.update(param.__dict__)
            param = meta_of[param]
        register(module, name, param)

    token = _building.set(True)
    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
        _building.reset(token)


def is_meta_init() -> bool:
    """Whether the caller runs inside ``meta_init()``."""
    return _building.get()


def materialize(
    module: nn.Module,
    device: torch.device,
    init: Callable[[nn.Module], None] | None = None,
    seed: int | None = None,
    *,
    shard_device: torch.device | None = None,
) -> list[str]:
    """Give every meta parameter of ``module`` real storage and, if asked, its initial values.

    Ties are kept, and what is already real (buffers above all) stays as it is. Every submodule's
    ``post_meta_init()`` is called at the end. A module without meta parameters is left alone.

    Args:
        module: plain or already sharded by ``fully_shard``.
        device: where the parameters go.
        init: sets the parameters of one submodule; ``module_init(module)`` is the usual one. ``None`` leaves the
            values undefined, for weights that are read from a checkpoint next.
        seed: see ``initialize``.
        shard_device: where the sharded ones go if not to ``device``: the host, for ``offload_to_cpu``.

    Returns:
        Names of the parameters that were on the meta device.

    Raises:
        UserError: a buffer is on the meta device, so that its values cannot be known.
    """
    names = [name for name, param in module.named_parameters() if param.is_meta]
    if not names:
        return []
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise UserError(
                f"Buffer '{name}' of {type(module).__name__} was computed from a parameter, which has no value under "
                f"--init-model-with-meta-device. Register it from constants, or leave the flag out."
            )

    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        return torch.empty_like(tensor, device=(shard_device or device) if isinstance(tensor, DTensor) else device)

    ties = _ties(module)
    module._apply(allocate)
    for (first, first_name), *others in ties:
        for other, name in others:
            other._parameters[name] = first._parameters[first_name]
    if init is not None:
        initialize(module, init, seed, names)
    for submodule in module.modules():
        if callable(hook := getattr(submodule, "post_meta_init", None)):
            hook()
    return names


@torch.no_grad()
def initialize(
    module: nn.Module,
    init: Callable[[nn.Module], None],
    seed: int | None = None,
    names: Iterable[str] | None = None,
) -> None:
    """Set parameters to initial values that depend on ``seed`` and the path of their module alone.

    World size, mesh and wrapping make no difference, and the ranks do not communicate: each computes the full
    tensors of one wrapped unit at a time on the host, from a generator seeded anew for each submodule, and keeps
    its shard of them. The global random state is left as it was.

    Args:
        module: plain or sharded, with storage.
        init: called for every submodule that has parameters to set, children first, with full host tensors in
            place of them. It may also set parameters of its children inside the same wrapped unit.
        seed: the same on all ranks; default ``torch.initial_seed()``.
        names: the parameters to set, default all.
    """
    chosen = None if names is None else set(names)
    wanted = {id(param) for name, param in module.named_parameters() if chosen is None or name in chosen}
    todo = {m: path for path, m in module.named_modules() if any(id(param) in wanted for param in m.parameters())}
    seed = torch.initial_seed() if seed is None else seed
    with torch.random.fork_rng(devices=[]):
        for scope in _scopes(module):
            with _full_tensors(scope, wanted):
                for submodule in (m for m in scope if m in todo):
                    torch.default_generator.manual_seed(seed_of(seed, todo[submodule]))
                    init(submodule)


def seed_of(seed: int, path: str) -> int:
    """Return the seed of the generator that draws the parameters of the module at ``path``."""
    return zlib.crc32(f"{seed} {path}".encode())


def module_init(module: nn.Module, by_parts: bool = False) -> Callable[[nn.Module], None]:
    """Return the function that initialises one submodule of ``module``, for ``initialize``.

    A submodule belongs to the nearest module, itself or above it, that knows how its parts start: one whose class
    overrides ``init_weights()`` (called once for all its parts) or has ``_init_weights(submodule)``, as Hugging Face
    models and ``WeightInitMixin`` do. Below none of these, its own ``reset_parameters()`` is used.

    Args:
        module: the model.
        by_parts: do not call an ``init_weights()`` of ``module`` itself, for use inside one.

    Raises:
        UserError: by the returned function, for parameters that none of these covers.
    """
    owners: dict[nn.Module, Any] = {}

    def is_whole(submodule: nn.Module) -> bool:
        return _has_own_init_weights(submodule) and not (by_parts and submodule is module)

    def assign(submodule: nn.Module, owner: nn.Module | None) -> None:
        covered = owner is not None and is_whole(owner)
        if not covered and (is_whole(submodule) or hasattr(submodule, "_init_weights")):
            owner = submodule
        owners.setdefault(submodule, owner)
        for child in submodule.children():
            assign(child, owner)

    def init(submodule: Any) -> None:
        owner = owners[submodule]
        if owner is not None and is_whole(owner):
            if owner is submodule:
                owner.init_weights()
        elif owner is not None:
            owner._init_weights(submodule)
        elif hasattr(submodule, "reset_parameters"):
            submodule.reset_parameters()
        elif any(param is not None for param in submodule._parameters.values()):
            raise UserError(
                f"{type(submodule).__name__} was built on the meta device and nothing says how its parameters start. "
                f"Derive the model from WeightInitMixin, give it init_weights(), or leave out "
                f"--init-model-with-meta-device."
            )

    assign(module, None)
    return init


def _has_own_init_weights(module: nn.Module) -> bool:
    """Whether the class brings an ``init_weights()`` other than those that only call ``_init_weights`` on each part."""
    method = getattr(type(module), "init_weights", None)
    return callable(method) and not (hasattr(method, "_each_part") or method.__module__.startswith("transformers."))


def _ties(module: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for submodule in module.modules():
        for name, param in submodule._parameters.items():
            if param is not None:
                places.setdefault(id(param), []).append((submodule, name))
    return [group for group in places.values() if len(group) > 1]


def _scopes(module: nn.Module) -> list[list[nn.Module]]:
    """Split the submodules, children first, into parts that are initialised one after the other.

    A part is an outermost wrapped unit, or a module that initialises itself as a whole; the rest comes last.
    """
    parts: list[list[nn.Module]] = []
    rest: list[nn.Module] = []
    seen: set[nn.Module] = set()

    def visit(submodule: nn.Module, part: list[nn.Module]) -> None:
        if submodule in seen:
            return
        seen.add(submodule)
        is_unit = submodule is not module and isinstance(submodule, FSDPModule)
        if part is rest and (is_unit or _has_own_init_weights(submodule)):
            part = []
            parts.append(part)
        for child in submodule.children():
            visit(child, part)
        part.append(submodule)

    visit(module, rest)
    return [*parts, rest]


@contextmanager
def _full_tensors(scope: list[nn.Module], wanted: set[int]) -> Iterator[None]:
    """Put full host tensors in place of the wanted parameters of ``scope``; keep this rank's shard of them at exit."""
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    full: dict[int, nn.Parameter] = {}
    for module in scope:
        for name, param in module._parameters.items():
            if param is not None and id(param) in wanted:
                places.append((module, name, param))
                tensor = torch.empty(param.shape, dtype=param.dtype)
                full.setdefault(id(param), nn.Parameter(tensor, requires_grad=param.requires_grad))
                module._parameters[name] = full[id(param)]
    try:
        yield
    finally:
        for module, name, param in places:
            module._parameters[name] = param
            local = param.to_local() if isinstance(param, DTensor) else param
            local.copy_(_local_part(full[id(param)], param))


def _local_part(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the part of ``full`` that this rank holds of ``like``; no communication."""
    if isinstance(like, DTensor):
        for dim, placement in enumerate(like.placements):
            if isinstance(placement, Shard):
                chunks = full.chunk(like.device_mesh.size(dim), placement.dim)
                rank = like.device_mesh.get_local_rank(dim)
                # An uneven dimension can leave the last ranks without a chunk.
                full = chunks[rank] if rank < len(chunks) else full.narrow(placement.dim, 0, 0)
    return full
