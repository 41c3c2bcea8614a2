"""Which modules become units of their own, and in which order they are wrapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from mindspeed_mm.errors import UserError


def no_split_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return ``{path: module}`` for the layers that Hugging Face models name in ``_no_split_modules``.

    Sub-models may name their own, so the names of all of them count. Call it before anything is wrapped:
    ``fully_shard`` changes the names of classes.
    """
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return {path: module for path, module in model.named_modules() if path and type(module).__name__ in names}


def post_order(module: nn.Module, seen: set[nn.Module] | None = None) -> Iterator[nn.Module]:
    """Yield every submodule once, children before their parent."""
    seen = set() if seen is None else seen
    if module not in seen:
        seen.add(module)
        for child in module.children():
            yield from post_order(child, seen)
        yield module


def wrap_order(model: nn.Module, units: Mapping[str, nn.Module], ignored: set[nn.Parameter]) -> list[list[nn.Module]]:
    """Return the units in an order in which ``fully_shard`` can take them, those that share parameters together.

    Raises:
        UserError: a parameter is shared by a unit and the rest of the model, or by units one of which contains
            other units. FSDP2 would fail on it only in the first forward.
    """
    paths = {module: path for path, module in units.items() if module is not model}
    users: dict[nn.Parameter, dict[nn.Module, str]] = {}

    def visit(module: nn.Module, path: str, unit: nn.Module) -> None:
        unit = module if module in paths else unit
        for name, param in module._parameters.items():
            if param is not None and param not in ignored:
                users.setdefault(param, {}).setdefault(unit, f"{path}{name}")
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{path}{name}.", unit)

    visit(model, "", model)
    group_of = {unit: [unit] for unit in paths}
    for sharing in users.values():
        if len(sharing) == 1:
            continue
        names = " and ".join(f"'{name}'" for name in sharing.values())
        if model in sharing:
            listed = ", ".join(f"'{paths[unit]}'" for unit in sharing if unit is not model)
            raise UserError(
                f"fsdp2 config, sub_modules_to_wrap: {names} are one tied parameter, but only {listed} is listed. "
                f"List the modules of both, or of neither."
            )
        for unit in sharing:
            if any(part in paths for part in unit.modules() if part is not unit):
                raise UserError(
                    f"fsdp2 config, sub_modules_to_wrap: {names} are one tied parameter, and '{paths[unit]}' contains "
                    f"other listed modules. List either it or the modules inside it."
                )
        merged = list(dict.fromkeys(member for unit in sharing for member in group_of[unit]))
        group_of.update(dict.fromkeys(merged, merged))
    order = [group_of[module] for module in post_order(model) if module in paths]
    unique = list({id(group): group for group in order}.values())
    # Modules that share parameters contain no other unit, so they may go before everything that contains them.
    return sorted(unique, key=lambda group: len(group) == 1)
