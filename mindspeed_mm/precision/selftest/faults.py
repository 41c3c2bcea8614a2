"""``precision selftest``: known faults in a tiny model, and whether the answers are the right ones on this machine."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.precision.comparing.band import Band
from mindspeed_mm.precision.comparing.compare import compare
from mindspeed_mm.precision.finding import Finding
from mindspeed_mm.precision.records.record import Record
from mindspeed_mm.precision.selftest.model import MICRO_BATCH_SIZE, MICRO_BATCHES, Recipe, TinyVLM, train

_BATCH = MICRO_BATCHES * MICRO_BATCH_SIZE
_LAYERS = r"language_model\.layers"


@dataclass(frozen=True)
class Fault:
    """A change of the recipe, and the answer: a phase, a pattern of the site, a step; None for no finding."""

    recipe: dict[str, Any]
    answer: tuple[str, str, int] | None


@dataclass(frozen=True)
class Result:
    """What became of one fault."""

    name: str
    expected: tuple[str, str, int] | None
    found: Finding | None

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one."""
        if self.expected is None or self.found is None:
            return self.expected is None and self.found is None
        phase, site, step = self.expected
        return (self.found.phase, self.found.step) == (phase, step) and bool(re.fullmatch(site, self.found.site))


def _layer(index: int) -> Callable[[TinyVLM], Any]:
    return lambda model: model.language_model.layers[index]


def _eps(model: TinyVLM) -> None:
    _layer(0)(model).input_layernorm.eps = 1e-5


def _rope(model: TinyVLM) -> None:
    rotary = model.language_model.rotary_emb
    exact = rotary.forward

    def forward(positions: Tensor) -> tuple[Tensor, Tensor]:
        kept, rotary.inv_freq = rotary.inv_freq, rotary.inv_freq.bfloat16().float()
        try:
            return exact(positions)
        finally:
            rotary.inv_freq = kept

    rotary.forward = forward  # type: ignore[method-assign]


def _mask(model: TinyVLM) -> None:
    _layer(1)(model).self_attn.diagonal = 1


def _embedding(model: TinyVLM) -> None:
    embed = model.language_model.embed_tokens
    embed.forward = lambda ids: F.embedding(ids, embed.weight.bfloat16()).float()


def _heads(model: TinyVLM) -> None:
    q = _layer(1)(model).self_attn.q_proj
    order = torch.arange(len(q.weight)).view(4, -1)[[1, 0, 2, 3]].flatten()
    with torch.no_grad():
        q.weight.copy_(q.weight[order].clone())
        q.bias.copy_(q.bias[order].clone())


class HalfSiLU(torch.autograd.Function):
    """SiLU with one of the two terms of its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.sigmoid(ctx.saved_tensors[0])


def _activation(model: TinyVLM) -> None:
    _layer(1)(model).mlp.act.forward = HalfSiLU.apply


def _images(model: TinyVLM) -> None:
    model.language_model.flipped = True


def _eager(model: TinyVLM) -> None:
    for layer in model.language_model.layers:
        layer.self_attn.eager = True


def _mean(logits: Tensor, targets: Tensor, tokens: int) -> Tensor:
    return F.cross_entropy(logits, targets) / MICRO_BATCHES


def _swapped(first: int, second: int) -> list[int]:
    order = list(range(64))
    order[first], order[second] = order[second], order[first]
    return order


FAULTS: dict[str, Fault] = {
    "norm eps": Fault({"change": _eps}, ("forward", rf"{_LAYERS}\.0\.input_layernorm", 0)),
    "weight decay of biases and norms": Fault({"decays": lambda p: True}, ("optimizer", "update.*", 0)),
    "rope in bf16": Fault({"change": _rope}, ("forward", r"language_model\.rotary_emb", 0)),
    "mean of micro-batch means": Fault({"loss": _mean}, ("loss", "loss", 0)),
    "causal mask off by one": Fault({"change": _mask}, ("forward", rf"{_LAYERS}\.1\.self_attn", 0)),
    "stale sampler": Fault({"order": _swapped(_BATCH, 2 * _BATCH)}, ("data", "samples", 1)),
    "embedding in bf16": Fault({"change": _embedding}, ("forward", r"language_model\.embed_tokens", 0)),
    "permuted heads in a checkpoint": Fault({"change": _heads}, ("weights", rf"{_LAYERS}\.1\.self_attn\.q_proj", 0)),
    "beta2": Fault({"betas": (0.9, 0.999)}, ("optimizer", "exp_avg_sq.*", 0)),
    "clipping by a partial norm": Fault({"norm_of": lambda name: "visual" in name}, ("grad_clipped", "", 0)),
    "backward of the activation": Fault({"change": _activation}, ("backward", rf"{_LAYERS}\.1\.mlp\.act", 0)),
    "images in reversed order": Fault({"change": _images}, ("forward", "language_model", 0)),
    "nothing: the same run again": Fault({}, None),
    "nothing: another attention kernel": Fault({"change": _eager}, None),
    "nothing: samples of a batch reordered": Fault({"order": _swapped(0, _BATCH - 1)}, None),
    "nothing: rounding noise": Fault({"noise": 77}, None),
}


def selftest(bf16: bool = False, names: str = "") -> Iterator[Result]:
    """Make the reference, its band and one run for each fault, and yield what was found.

    Args:
        bf16: compute under autocast.
        names: only faults that have this in their name.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield from _selftest(Path(folder), Recipe(bf16=bf16), names)
    finally:
        torch.set_num_threads(threads)


def _selftest(root: Path, plain: Recipe, names: str) -> Iterator[Result]:
    def record(name: str, **changes: Any) -> Record:
        train(root / name, replace(plain, **changes))
        return Record.open(root / name)

    reference = record("reference")
    band = Band.measure([reference, *(record(f"noise {seed}", noise=seed) for seed in (1, 2, 3))])
    for name, fault in FAULTS.items():
        if names in name:
            yield Result(name, fault.answer, compare(reference, record(name, **fault.recipe), band).first)
