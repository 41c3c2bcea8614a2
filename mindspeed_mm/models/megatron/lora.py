"""Low-rank adapters (LoRA) on megatron-core's linear layers; peft's own support for them does not work.

An adapted layer is that of megatron-core, with an `Adapter` beside its weight. Where it fuses several layers of the
Hugging Face model (queries, keys and values; gate and up), the adapter is those of all of them, each with an A of its
own: what is trained is what peft trains on the Hugging Face model, and goes into the same files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_mm.distributed.meta import seed_of
from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.extras import import_extra
from mindspeed_mm.models.lora import ALL_LINEAR, LoraSettings
from mindspeed_mm.models.megatron.layout import pieces

_LAYERS = "text_decoder.decoder.layers"
_LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "linear_qkv"),
    "o_proj": "linear_proj",
    **dict.fromkeys(("gate_proj", "up_proj"), "linear_fc1"),
    "down_proj": "linear_fc2",
}


class Adapter(nn.Module):
    """The adapters of the Hugging Face layers that one linear layer consists of.

    Args:
        linear: megatron-core's ``ColumnParallelLinear`` or ``RowParallelLinear``.
        parts: (times, rows of each): the layer's rows here are, so many times over, so many rows of each layer.
        settings: rank, scale and dropout.

    Attributes:
        lora_A: (n * r, input size here) for n layers; split over the ranks as the input is.
        lora_B: (output size here, r), its rows in the order of the layer's own; split as these are.
    """

    def __init__(self, linear: Any, parts: tuple[int, Sequence[int]], settings: LoraSettings) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import RowParallelLinear

        rows, columns = linear.weight.shape
        self.times, self.rows = parts
        self.input_is_split = isinstance(linear, RowParallelLinear)
        self.sequence_parallel = bool(linear.config.sequence_parallel)
        self.scale, self.dropout = settings.alpha / settings.r, settings.dropout
        self.lora_A = nn.Parameter(linear.weight.new_empty(len(self.rows) * settings.r, columns))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(rows, settings.r))
        split, whole = (self.lora_A, self.lora_B) if self.input_is_split else (self.lora_B, self.lora_A)
        split.tensor_model_parallel = True
        # Each rank sees its part of the sequence only: megatron-core then adds the gradients up.
        whole.sequence_parallel = self.sequence_parallel
        linear.adapter = self
        linear.register_forward_hook(_add)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what is added to the layer's output, split as that is.

        Args:
            hidden: the layer's input, (s, b, input size here), where s is this rank's part under sequence parallelism
                unless the input is split by its last dimension.
        """
        from megatron.core.tensor_parallel import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        if self.dropout and self.training:
            with self._random_state():
                hidden = F.dropout(hidden, self.dropout)
        low = F.linear(hidden, self.lora_A)
        if self.input_is_split:
            join = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else None
            low = (join or reduce_from_tensor_model_parallel_region)(low)
        else:
            join = gather_from_sequence_parallel_region if self.sequence_parallel else None
            low = (join or copy_to_tensor_model_parallel_region)(low)
        outs = [
            F.linear(one, up.flatten(0, 1)).unflatten(-1, (self.times, -1))
            for one, up in zip(low.chunk(len(self.rows), -1), self._ups(), strict=True)
        ]
        return torch.cat(outs, dim=-1).flatten(-2) * self.scale

    def _ups(self) -> Sequence[Tensor]:
        """Return B of each layer, (times, rows, r)."""
        split: Sequence[Tensor] = self.lora_B.unflatten(0, (self.times, -1)).split(list(self.rows), dim=1)
        return split

    def _random_state(self) -> Any:
        """Draw other numbers on each rank where each has other elements; sequence parallelism does so already."""
        if not self.input_is_split or self.sequence_parallel:
            return nullcontext()
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        return get_cuda_rng_tracker().fork()


def _add(linear: Any, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    out, bias = output
    return out + linear.adapter(args[0]), bias


def add_adapters(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Put adapters into a pipeline chunk and freeze all else, in place.

    They have no meaningful values until :func:`initialize_adapters`.

    Args:
        model: ``VLMModel`` or ``GPTModel``, of local layers, not yet wrapped.
        settings: what gets an adapter, and of which size.

    Returns:
        Lines for the log, about this chunk.

    Raises:
        UserError: a target is no linear layer of the text decoder.
    """
    endings = _endings(settings)
    found: dict[str, Any] = {
        path: module
        for path, module in model.named_modules()
        if path.endswith(endings) and f".{_LAYERS.partition('.')[2]}." in f".{path}" and "expert" not in path
    }
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, module in found.items():
        if type(module).__name__ not in ("ColumnParallelLinear", "RowParallelLinear"):
            raise UserError(
                f"--lora-target-modules: {path} is Transformer Engine's {type(module).__name__}, which takes no "
                f"adapter; set text_decoder.use_te to false in model.json"
            )
        Adapter(module, _parts(path, module), settings)
    decoder: Any = getattr(model, "text_decoder", model)
    if hasattr(decoder, "embedding") and decoder.config.recompute_granularity == "full":
        # Layers that are recomputed hand no gradient on, not to their parameters either, if no input carries one.
        decoder.embedding.register_forward_hook(_carry_gradient)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kinds = " ".join(dict.fromkeys(path.rpartition(".")[2] for path in found))
    return [
        f"LoRA: rank {settings.r}, alpha {settings.alpha}, on {len(found)} layers here: {kinds}",
        f"LoRA: {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters here are trained",
    ]


def peft_config(hf_model: nn.Module, decoder_path: str, settings: LoraSettings, base: str | None = None) -> Any:
    """Return peft's configuration of the same adapters on the Hugging Face model.

    Args:
        hf_model: on meta, say.
        decoder_path: of its text decoder.
        settings: as for :func:`add_adapters`.
        base: where the weights under the adapters can be read again; None if they cannot.

    Raises:
        UserError: peft is missing, or nothing in the model is a target.
    """
    peft = import_extra("peft", "lora", "--lora-target-modules")
    endings = _endings(settings)
    wanted = {name for name, fused in _FUSED.items() if any(ending.endswith(f".{fused}") for ending in endings)}
    layers = [
        path
        for path, module in hf_model.named_modules()
        if path.startswith(f"{decoder_path}.layers.")
        and path.rpartition(".")[2] in wanted
        and isinstance(module, nn.Linear)
    ]
    if not layers:
        raise UserError(
            f"--lora-target-modules {' '.join(settings.target_modules)}: the model has experts in these places, which "
            f"get no adapters in pretrain_vlm.py; use linear_qkv or linear_proj"
        )
    return peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=layers,
        base_model_name_or_path=base,
    )


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int) -> None:
    """Set the adapters' first values: A as peft draws it, B zero, so that the model computes what it did before.

    They are those of :func:`mindspeed_mm.models.lora.initialize_adapters` for the Hugging Face model, whatever the
    parallel layout.

    Args:
        model: what `add_adapters` was given.
        seed: the same on all ranks.
    """
    parameters = dict(model.named_parameters())
    for name, boxes in pieces(model).items():
        if name.endswith(".adapter.lora_B"):
            parameters[name].zero_()
        for piece in boxes if name.endswith(".adapter.lora_A") else ():
            whole = torch.empty(piece.global_shape, dtype=parameters[name].dtype)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_of(seed, piece.hf_name.rpartition(".lora_")[0]))
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
            piece.view(parameters[name]).copy_(whole[piece.block])


def _endings(settings: LoraSettings) -> tuple[str, ...]:
    if settings.target_parameters:
        raise UserError(
            f"--lora-target-parameters {' '.join(settings.target_parameters)}: pretrain_vlm.py puts adapters on linear "
            f"layers only; remove it"
        )
    if not {"all", "text_decoder"} & set(settings.apply_modules):
        raise UserError(
            f"--lora-apply-modules {' '.join(settings.apply_modules)}: pretrain_vlm.py puts adapters into the "
            f"text_decoder only; use text_decoder or all"
        )
    words: list[str] = []
    for word in settings.target_modules:
        if word == ALL_LINEAR:
            words += _LINEAR
        elif not any(f".{name}".endswith(f".{word}") for name in _LINEAR):
            names = [name.rpartition(".")[2] for name in _LINEAR]
            hint = f" It is part of {_FUSED[word]} here." if word in _FUSED else did_you_mean(word, names)
            raise UserError(
                f"--lora-target-modules: '{word}' is no linear layer of pretrain_vlm.py.{hint} Use some of "
                f"{', '.join(names)} or {ALL_LINEAR}."
            )
        else:
            words.append(word)
    return tuple(f".{word}" for word in words)


def _parts(path: str, linear: Any) -> tuple[int, Sequence[int]]:
    config, rows = linear.config, linear.weight.shape[0]
    if path.endswith("linear_qkv"):
        head, queries = config.kv_channels, config.num_attention_heads // config.num_query_groups
        return rows // ((queries + 2) * head), (queries * head, head, head)
    if path.endswith("linear_fc1") and config.gated_linear_unit:
        return 1, (rows // 2, rows // 2)
    return 1, (rows,)


def _carry_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()
