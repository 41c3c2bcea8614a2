"""A megatron-core GPTModel with the weights of a tiny ``Qwen3ForCausalLM``, and that model as the oracle.

Weights, gradients and updated weights are compared under Hugging Face names, through the product's layout table; the
oracle itself is Hugging Face's model and torch's AdamW in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from mindspeed_mm import accelerator
from mindspeed_mm.distributed import chunks, parallel, state
from mindspeed_mm.distributed.main_parameters import MainParameters, unwrap
from mindspeed_mm.distributed.parallel import ParallelSizes
from mindspeed_mm.engine.megatron import MegatronEngine

LENGTH, VOCABULARY = 16, 128
# With a smaller eps the update of an element whose gradient is near zero is the sign of its rounding error.
ADAM: dict[str, Any] = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1}


@dataclass(frozen=True)
class Case:
    """A layout and settings: ``sizes`` are those of ParallelSizes, ``config`` those of TransformerConfig."""

    sizes: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    tied: bool = False
    form: str = "mean"  # what loss_func returns: mean, pair, triple, per_token
    micro_batches: int = 4  # of all data-parallel ranks together
    clip: float = 1.0
    layers: int = 4


def hf_model(tied: bool = False, layers: int = 4) -> Any:
    """Return the oracle: fp32, random weights, the same in every process."""
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Qwen3ForCausalLM._from_config(config, dtype=torch.float32).train()


def batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Return micro-batches of two samples whose numbers of targets differ much."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)
        targets = torch.rand(ids.shape, generator=generator) < 0.25 + 0.6 * index / count
        found.append({"input_ids": ids, "labels": torch.where(targets, ids.roll(-1, 1), -100)})
    return found


@dataclass
class Step:
    """What a training step showed, under Hugging Face names; a rank holds the parts that lie there."""

    loss: float
    grad_norm: float


def gpt_model(case: Case, pre_process: bool, post_process: bool, vp_stage: int | None) -> Any:
    """Return one chunk of the megatron-core model, with the oracle's weights."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mindspeed_mm.models.megatron.specs import decoder_spec

    sizes = parallel.sizes()
    config = TransformerConfig(
        num_layers=case.layers,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=case.form == "per_token",
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **case.config,
    )
    stage = {} if vp_stage is None else {"vp_stage": vp_stage}
    try:
        count = get_num_layers_to_build(config, **stage)
    except TypeError:  # 0.12
        stage, count = {}, get_num_layers_to_build(config)
    model = GPTModel(
        config,
        decoder_spec(config, [False] * count, transformer_engine=False),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope",
        rotary_base=hf_model(layers=1).config.rope_parameters["rope_theta"],
        **stage,
    )
    weights = dict(hf_model(case.tied, case.layers).named_parameters())
    for tensor, whole, block in hf_blocks(model, dict(model.named_parameters())):
        tensor.data.copy_(weights[whole].data[block])
    return model


def hf_blocks(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[tuple[Tensor, str, tuple[slice, ...]]]:
    """Yield views of tensors, named and shaped as the parameters of ``model``, with what they are in the oracle."""
    from mindspeed_mm.models.megatron.layout import pieces

    for name, boxes in pieces(model).items():
        for piece in boxes:
            if name in tensors:
                yield piece.view(tensors[name].detach()), piece.hf_name, piece.block


def start(case: Case) -> MegatronEngine:
    """Create the groups of a case and its engine."""
    state.initialize(
        None,
        state.RankInfo.from_environment(),
        backend="gloo",
        timeout=None,
        sizes=ParallelSizes(**case.sizes),
    )
    accelerator.prepare_megatron_layers()
    parallel.seed_stages(1)
    wrapped = chunks.reduce_gradients(
        chunks.build_chunks(lambda *where: gpt_model(case, *where)),
        sharded=case.sharded,
        overlap_grad_reduce=case.overlap_grad_reduce,
        overlap_param_gather=case.overlap_param_gather,
    )
    mains = MainParameters(wrapped, sharded=case.sharded)
    return MegatronEngine(
        wrapped,
        mains,
        torch.optim.AdamW([{"params": mains.values}], fused=True, **ADAM),
        clip_grad=case.clip,
        sequence_length=LENGTH,
        micro_batch_size=2,
        per_token_loss=case.form == "per_token",
    )


def forward_step(form: str) -> Any:
    """Return a ``forward_step`` for GPTModel whose ``loss_func`` has one of the documented forms."""

    def step(iterator: Any, model: nn.Module) -> tuple[Any, Any]:
        batch = next(iterator)
        labels = batch["labels"]
        positions = torch.arange(LENGTH).expand_as(labels)
        output = model(batch["input_ids"], positions, None, labels=labels.clamp(min=0))

        def loss_func(losses: Tensor) -> Any:
            mask = (labels >= 0).float()
            total, count = (losses * mask).sum(), mask.sum()
            if form == "mean":
                return total / count
            if form == "pair":
                return total / count, {"loss": (total / count).detach()}
            return total, count.int(), {"loss": (total.detach(), count)}

        return output, loss_func

    return step


def train(case: Case, steps: int = 3) -> list[dict[str, Any]]:
    """Train and return, for each step: loss, grad norm, and this rank's blocks of gradients and updated weights."""
    engine = start(case)
    replicas = parallel.loader_group()
    rank, size = dist.get_rank(replicas), dist.get_world_size(replicas)
    seen = []
    for number in range(steps):
        mine = batches(case.micro_batches, seed=number)[rank::size]
        reports = engine.forward_backward(forward_step(case.form), iter(mine), len(mine))
        gradients = list(_blocks(engine, gradients=True))
        result = engine.optimizer_step()
        seen.append(
            {
                "loss": _mean_loss(reports, replicas),
                "grad_norm": float(result.grad_norm),
                "gradients": gradients,
                "weights": list(_blocks(engine, gradients=False)),
            }
        )
    return seen


def _mean_loss(reports: list[Any], group: Any) -> float:
    pairs = [r["loss"] if isinstance(r["loss"], tuple) else (r["loss"], torch.ones(())) for r in reports]
    total = torch.tensor([[float(a), float(b)] for a, b in pairs], dtype=torch.float64).sum(0)
    dist.all_reduce(total, group=group)
    return float(total[0] / total[1])


def _blocks(engine: MegatronEngine, gradients: bool) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """Yield what this rank holds; of sharded gradients only the parts that are its own, the others as NaN."""
    if not gradients and engine.mains.sharded:
        engine.mains.publish()  # a forward pass may not have gathered them yet
    for index, chunk in enumerate(engine.module):
        inner = unwrap(chunk)
        tensors: dict[str, Tensor] = {}
        for name, parameter in inner.named_parameters():
            tensors[name] = torch.full_like(parameter, torch.nan) if gradients else parameter.detach()
        if gradients:
            names = {id(parameter): name for name, parameter in inner.named_parameters()}
            for main in engine.mains.all:
                if main.chunk == index and id(main.parameter) in names:
                    flat = tensors[names[id(main.parameter)]].view(-1)
                    flat[main.start : main.start + main.value.numel()] = main.value.grad.reshape(-1)
        for tensor, whole, block in hf_blocks(inner, tensors):
            yield whole, block, tensor.clone()


def oracle(case: Case, steps: int = 3) -> list[dict[str, Any]]:
    """Train Hugging Face's model the same way in this process."""
    model = hf_model(case.tied, case.layers)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    seen = []
    for number in range(steps):
        taken = batches(case.micro_batches, seed=number)
        count = sum((b["labels"] >= 0).sum() for b in taken)
        total = 0.0
        for batch in taken:
            logits = model(input_ids=batch["input_ids"]).logits
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
            )
            share = count if case.form == "per_token" else (batch["labels"] >= 0).sum() * len(taken)
            (losses / share).backward()
            # A triple reports sums and counts, whatever is optimised.
            total += float(losses.detach() / (count if case.form in ("triple", "per_token") else share))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if case.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        seen.append({"loss": total, "grad_norm": float(norm), "gradients": gradients, "weights": weights})
    return seen


def compare(case: Case, ranks: list[list[dict[str, Any]]], limit: float = 1e-5) -> None:
    """Check every rank's steps against the oracle's, and that all of every gradient was seen.

    The limit is relative to each tensor's maximum.
    """
    expected = oracle(case, len(ranks[0]))
    for number, right in enumerate(expected):
        covered = {name: torch.zeros(g.shape, dtype=torch.bool) for name, g in right["gradients"].items()}
        for rank, steps in enumerate(ranks):
            step = steps[number]
            for key in ("loss", "grad_norm"):
                assert abs(step[key] - right[key]) <= limit * abs(right[key]), (
                    number,
                    rank,
                    key,
                    step[key],
                    right[key],
                )
            for key in ("gradients", "weights"):
                for name, block, found in step[key]:
                    whole = right[key][name]
                    seen = ~found.isnan()
                    worst = ((found - whole[block]).abs() * seen).nan_to_num().max() / whole.abs().max()
                    assert worst <= limit, (number, rank, key, name, float(worst))
                    if key == "gradients":
                        covered[name][block] |= seen
        assert all(part.all() for part in covered.values()), [n for n, p in covered.items() if not p.all()]
