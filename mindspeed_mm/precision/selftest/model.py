"""A vision-language model of a few thousand parameters in plain PyTorch, and a loop that trains and records it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_mm.distributed.grad_norm import clip_by_norm, total_grad_norm
from mindspeed_mm.precision.recording.capture import Capture
from mindspeed_mm.precision.recording.perturb import Perturbation
from mindspeed_mm.precision.recording.plan import CapturePlan
from mindspeed_mm.precision.recording.view import PlainView
from mindspeed_mm.precision.records.record import RecordWriter

WIDTH, HEADS, KV_HEADS, LAYERS, VOCABULARY, LENGTH, IMAGE_TOKENS, PIXELS = 32, 4, 2, 3, 101, 24, 4, 12
STEPS, MICRO_BATCHES, MICRO_BATCH_SIZE = 2, 2, 2


class RMSNorm(nn.Module):
    """Root mean square norm, computed in fp32."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed rows of ``x``, (..., WIDTH)."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class Rotary(nn.Module):
    """Rotary position embedding's cosines and sines."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (B, S, head size), of positions (B, S)."""
        angles = positions.float()[..., None] * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Grouped-query attention with biases of q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.q_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, KV_HEADS * size), nn.Linear(WIDTH, KV_HEADS * size)
        self.scale = size**-0.5
        self.diagonal = 0
        self.eager = False

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, S, WIDTH)."""
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in self._projections)
        cos, sin = (t[:, None].to(x.dtype) for t in rotary)
        q, k = (t * cos + _rotated(t) * sin for t in (q, k))
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(self.diagonal)
        if self.eager:
            weights = (q @ k.transpose(-1, -2) * self.scale).masked_fill(~mask, float("-inf")).float()
            y = torch.softmax(weights, -1).to(q.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    @property
    def _projections(self) -> Iterator[nn.Module]:
        yield from (self.q_proj, self.k_proj, self.v_proj)


def _rotated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.act = nn.SiLU()
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, S, WIDTH)."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP with their norms and residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, S, WIDTH)."""
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionBlock(nn.Module):
    """An MLP over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, patches, WIDTH)."""
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Visual(nn.Module):
    """Patches to image tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.merger = nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(VisionBlock() for _ in range(2))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return (B, IMAGE_TOKENS, WIDTH)."""
        x = self.patch_embed(pixel_values)
        for block in self.blocks:
            x = block(x)
        return self.merger(x)


class LanguageModel(nn.Module):
    """Embedding, layers and head; image tokens take the first places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.rotary_emb = Rotary()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RMSNorm()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.flipped = False

    def forward(self, input_ids: Tensor, images: Tensor) -> Tensor:
        """Return logits, (B, S, VOCABULARY)."""
        x = self.embed_tokens(input_ids)
        images = images.flip(1) if self.flipped else images
        x = torch.cat([images.to(x.dtype), x[:, IMAGE_TOKENS:]], 1)
        rotary = self.rotary_emb(torch.arange(x.shape[1]).expand(len(x), -1))
        for layer in self.layers:
            x = layer(x, rotary)
        return self.lm_head(self.norm(x))


class TinyVLM(nn.Module):
    """The whole."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.language_model = Visual(), LanguageModel()

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """Return logits, (B, S, VOCABULARY)."""
        return self.language_model(input_ids, self.visual(pixel_values))

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, as Hugging Face models do."""
        return self.language_model.lm_head


@dataclass
class Recipe:
    """What a run does; a fault changes one thing of it.

    Attributes:
        change: of the model, before the first step.
        optimizer: makes the optimizer of groups.
        decays: which parameters' weights decay.
        betas, clip, bf16: as everywhere.
        loss: of a micro-batch: logits, targets, tokens of the global batch.
        order: sample numbers of the whole run.
        norm_of: the parameters whose gradients' norm decides on clipping.
        noise: seed of a perturbation.
    """

    change: Callable[[TinyVLM], None] = lambda model: None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    decays: Callable[[Tensor], bool] = lambda parameter: parameter.ndim > 1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    bf16: bool = False
    loss: Callable[[Tensor, Tensor, int], Tensor] = lambda logits, targets, tokens: (
        F.cross_entropy(logits, targets, reduction="sum") / tokens
    )
    order: list[int] = field(default_factory=lambda: list(range(64)))
    norm_of: Callable[[str], bool] = lambda name: True
    noise: int = 0
    kept: tuple[str, ...] = ("*",)


def build() -> TinyVLM:
    """Return the model with the same random weights every time."""
    generator = torch.Generator().manual_seed(1234)
    model = TinyVLM()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                small = "embed_tokens" in name or "merger" in name
                parameter.normal_(0, 0.02 if small else 0.12, generator=generator)
            elif "bias" in name:
                parameter.normal_(0, 0.02, generator=generator)
    return model


def train(folder: Path, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
    """Train for ``STEPS`` steps and write a record; several ranks train on the same samples."""
    model = build()
    recipe.change(model)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    for parameter in model.parameters():
        groups[0 if recipe.decays(parameter) else 1]["params"].append(parameter)
    optimizer = recipe.optimizer([g for g in groups if g["params"]], lr=1e-2, betas=recipe.betas, eps=1e-8)
    if recipe.noise:
        Perturbation(recipe.noise).attach(model)
    writer = RecordWriter(folder, rank, world_size)
    if rank == 0:
        writer.start({"arguments": {"clip_grad": recipe.clip}})
    plan = CapturePlan(frozenset(range(STEPS)), True, recipe.kept)
    view = PlainView(model, speaks=rank == 0)
    capture = Capture(view, optimizer, writer, plan, device=torch.device("cpu"))
    size = MICRO_BATCHES * MICRO_BATCH_SIZE
    for step in range(STEPS):
        numbers = recipe.order[step * size : (step + 1) * size]
        parts = [numbers[i : i + MICRO_BATCH_SIZE] for i in range(0, size, MICRO_BATCH_SIZE)]
        _step(model, optimizer, capture, recipe, step, [batch_of(part) for part in parts])


def batch_of(numbers: list[int]) -> dict[str, Tensor]:
    """Return the samples of these numbers: tokens, pixels and labels, of lengths between 10 and ``LENGTH``."""
    samples = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(5, VOCABULARY, (LENGTH,), generator=generator)
        length = int(torch.randint(10, LENGTH + 1, (), generator=generator))
        used = torch.arange(LENGTH) < length
        labels = ids.masked_fill(~used | (torch.arange(LENGTH) <= IMAGE_TOKENS), -100)
        pixels = torch.randn(IMAGE_TOKENS, PIXELS, generator=generator)
        samples.append(
            {"input_ids": ids * used, "attention_mask": used.long(), "labels": labels, "pixel_values": pixels}
        )
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _step(
    model: TinyVLM,
    optimizer: torch.optim.Optimizer,
    capture: Capture,
    recipe: Recipe,
    step: int,
    batches: list[dict[str, Tensor]],
) -> None:
    capture.step_begins(step)
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        capture.micro_batch(batch)
        with torch.autocast("cpu", torch.bfloat16) if recipe.bf16 else nullcontext():
            logits = model(batch["input_ids"], batch["pixel_values"])
        targets = batch["labels"][:, 1:].flatten()
        loss = recipe.loss(logits[:, :-1].float().flatten(0, 1), targets, tokens)
        capture.loss(loss, (targets != -100).sum())
        loss.backward()
    capture.gradients_reduced()
    norm = total_grad_norm(p for name, p in model.named_parameters() if recipe.norm_of(name))
    clip_by_norm(model.parameters(), norm, recipe.clip)
    capture.gradients_clipped(norm)
    optimizer.step()
    capture.updated()
    optimizer.zero_grad()
    capture.step_ends(learning_rate=optimizer.param_groups[0]["lr"])
