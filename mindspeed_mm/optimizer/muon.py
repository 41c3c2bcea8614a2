"""Muon for weight matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Optimizer

from mindspeed_mm.errors import UserError

# Output layers by the names that Transformers and Megatron give them.
_HEADS = frozenset({"lm_head", "output_layer", "score", "classifier"})


def muon_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters that Muon is meant for: two-dimensional, no embedding and no output layer.

    Embeddings are the weights of ``nn.Embedding`` and parameters with ``embed`` in their own name; output layers are
    what a Hugging Face model calls its output embeddings, and modules with one of the usual names.
    """
    others: set[int] = set()
    for name, module in model.named_modules():
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in _HEADS:
            others.update(id(p) for p in module.parameters(recurse=False))
        if isinstance(head, nn.Module):
            others.update(id(p) for p in head.parameters())
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim == 2 and id(p) not in others and "embed" not in name.rpartition(".")[2]
    ]


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al., 2024) on some groups and AdamW on the others; one list of groups, one state.

    For a matrix ``W`` of shape (A, B) with gradient ``G``::

        M = momentum * M + (1 - momentum) * G
        O = NewtonSchulz(momentum * M + (1 - momentum) * G)       (torch.optim.Muon's, in bfloat16)
        W = (1 - lr * weight_decay) * W - lr * rms * sqrt(max(A, B)) * O

    The last factor gives updates the root mean square ``rms`` that AdamW's have, so that both share a learning rate
    (Liu et al., 2025, "Muon is Scalable for LLM Training"). The iteration needs the whole matrix: what FSDP has
    sharded is gathered for it, one matrix at a time, in bfloat16; all ranks then compute the same.

    Args:
        matrices: groups of two-dimensional parameters, each with its ``lr`` and ``weight_decay``.
        others: the same for AdamW; may be empty.
        momentum: of Muon.
        ns_steps: Newton-Schulz iterations.
        rms: size of Muon's update.
        adam: further arguments of AdamW.

    Raises:
        UserError: this version of torch has no Muon.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        *,
        momentum: float,
        ns_steps: int,
        rms: float,
        **adam: Any,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"--optimizer muon: torch {torch.__version__} has no Muon; install torch 2.9 or later.")
        if not matrices:
            raise UserError("--optimizer muon: no trainable parameter is a weight matrix; use --optimizer adam.")
        mine = [{**group, "momentum": momentum, "ns_steps": ns_steps, "rms": rms} for group in matrices]
        self._adamw = AdamW(others, **adam) if others else None
        # Where `found_inf` is 1 everything is left as it is, on the device; torch's AdamW can do that if it is fused.
        self._step_supports_amp_scaling = self._adamw is None or bool(adam.get("fused"))
        # AdamW goes on with the same dicts: what the schedule or a checkpoint writes reaches it.
        super().__init__([*mine, *(self._adamw.param_groups if self._adamw else [])], {})
        if self._adamw:
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        found_inf = getattr(self, "found_inf", None)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "rms" in group:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrix(parameter, group, found_inf)
        if self._adamw:
            self._adamw.found_inf = found_inf
            self._adamw.step()
        return loss

    def _step_matrix(self, parameter: nn.Parameter, group: dict[str, Any], found_inf: Tensor | None) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        weight, grad, average = (local(t) for t in (parameter, parameter.grad, state["momentum_buffer"]))
        moved = average.lerp(grad, 1 - group["momentum"])
        direction = _orthogonalised(grad.lerp(moved, group["momentum"]), parameter, group["ns_steps"])
        updated = weight * (1 - group["lr"] * group["weight_decay"])
        updated.add_(direction, alpha=-group["lr"] * (group["rms"] * math.sqrt(max(parameter.shape))))
        for old, new in ((average, moved), (weight, updated)):
            old.copy_(new if found_inf is None else torch.where(found_inf.bool(), old, new))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, without copying. Elementwise work on it is that on the whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _orthogonalised(part: Tensor, parameter: nn.Parameter, ns_steps: int) -> Tensor:
    """Return this rank's part of the orthogonalised matrix, in bfloat16, from this rank's ``part`` of the matrix."""
    part = part.bfloat16()  # as the iteration does first of all; half the bytes to gather
    if not isinstance(parameter, DTensor):
        return _newton_schulz(part, ns_steps)
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    whole = _newton_schulz(sharded.full_tensor(), ns_steps)
    # Every rank has the whole result, so that taking a part of it needs no communication.
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements).to_local()


def _newton_schulz(matrix: Tensor, ns_steps: int) -> Tensor:
    """Return torch's Newton-Schulz iteration of ``matrix``, (A, B), in bfloat16.

    Its only public form is a step of torch.optim.Muon. One from zero, of size 1, without momentum and decay is the
    negative of it exactly; torch scales steps of tall matrices, so it gets the transpose of these.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    scratch = nn.Parameter(torch.zeros_like(matrix.T if tall else matrix))
    scratch.grad = matrix.T if tall else matrix
    torch.optim.Muon([scratch], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, ns_steps=ns_steps).step()
    result = -scratch.detach()
    return result.T if tall else result
