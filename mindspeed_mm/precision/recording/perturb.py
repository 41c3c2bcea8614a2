"""``--precision-perturb``: rounding noise in the output of every leaf module, to measure what noise alone can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map


class Perturbation:
    """Moves the outputs of leaf modules by up to half a unit in the last place, and the gradients that come back too.

    A tensor's own dtype decides how large that is. Runs that differ in the seed alone are what two correct
    implementations of the same model are to each other: ``mindspeed-mm precision band`` measures how far they part.

    Args:
        seed: of the noise; its own generator, so that dropout draws what it would draw without.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._handles: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        """Begin. Hooks that are to see the noise have to be registered later."""
        self._handles += [module.register_forward_hook(self._hook) for module in leaves(model)]

    def detach(self) -> None:
        """End."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __call__(self, value: Any) -> Any:
        """Return the value, its floating tensors moved."""
        return tree_map(lambda item: self._moved(item) if isinstance(item, Tensor) else item, value)

    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self(output)

    def _moved(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel() or isinstance(tensor, DTensor):
            return tensor
        noise = torch.rand(tensor.shape, generator=self._generator(tensor.device), device=tensor.device)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        relative = (noise.to(wide.dtype) - 0.5) * torch.finfo(tensor.dtype).eps
        return (wide + wide * relative).to(tensor.dtype)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def leaves(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that contain no other."""
    modules: Iterable[nn.Module] = model.modules()
    yield from (module for module in modules if next(module.children(), None) is None)
