"""However a global batch is split over micro-batches and ranks, the same step is made.

The oracle is a plain PyTorch loop in one process that sees the whole global batch at once: Hugging Face's model,
torch's AdamW and clipping, and losses written out token by token from the logits. Ours is the whole road:
``TransformersModel``, FSDP2, the engine, ``loss_func`` of ``pretrain_transformers.py`` and the merging of reports.

Samples differ in length, and every micro-batch is padded to its own longest sample. Step 1 has samples without a
target, in step 2 half of the batch has none, so that under two ranks one of them has nothing to learn from.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mindspeed_mm.distributed.grad_norm import scale_gradients
from tests.models.tiny import tiny_config
from tests.ranks import RankPool

STEPS, GLOBAL_BATCH = 5, 8
LR, DECAY, CLIP, AUX = 1e-3, 0.01, 0.5, 0.5
VOCABULARY = 37
LOSSES = ("default", "per_sample_loss", "per_token_loss")
SPLITS = {1: (8, 4, 2, 1), 2: (4, 2, 1)}  # micro-batch sizes by number of ranks; accumulation follows


@dataclass(frozen=True)
class Case:
    """One cell of the matrix, the same on every rank."""

    ranks: int
    micro_batch: int
    loss: str
    chunked: bool
    recomputed: bool
    dtype: torch.dtype
    family: str = "phi"
    wrong: bool = False  # divide by the tokens of the micro-batch, as the published bugs did

    @property
    def accumulation(self) -> int:
        return GLOBAL_BATCH // (self.ranks * self.micro_batch)


def save_model(family: str, folder: Path) -> Path:
    """Write an HF folder with a tiny model.

    Phi has a bias in its output head, and LayerNorm. Models with RMSNorm compute it in fp32 even when all else is
    fp64; a loss divided after the backward pass is then rounded differently from one divided before.
    """
    config = (
        tiny_config(family)
        if family != "phi"
        else transformers.PhiConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            architectures=["PhiForCausalLM"],
        )
    )
    torch.manual_seed(0)
    getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def samples(step: int) -> list[tuple[Tensor, Tensor]]:
    """Return the token ids and labels of each sample of a step."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for index in range(GLOBAL_BATCH):
        length = int(torch.randint(3, 13, (), generator=generator))
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        prompt = int(torch.randint(0, length - 1, (), generator=generator))
        nothing = (step == 1 and index in (2, 3, 6)) or (step == 2 and index < GLOBAL_BATCH // 2)
        made.append((ids, torch.where((torch.arange(length) < prompt) | torch.tensor(nothing), -100, ids)))
    return made


def padded(chosen: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    def stack(rows: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "input_ids": stack([ids for ids, _ in chosen], 0),
        "attention_mask": stack([torch.ones_like(ids) for ids, _ in chosen], 0),
        "labels": stack([labels for _, labels in chosen], -100),
    }


def by_hand(case: Case, tokens: list[list[Tensor]]) -> Tensor:
    """Return the loss of a step from the losses of the target tokens of its samples, in the order of the batch."""
    zero = torch.zeros((), dtype=case.dtype)
    if case.loss == "per_sample_loss":
        return sum((torch.stack(row).mean() if row else zero) for row in tokens) / len(tokens)
    if case.loss == "per_token_loss":
        return sum((loss for row in tokens for loss in row), zero) / sum(len(row) for row in tokens)
    micro_batches = [tokens[i : i + case.micro_batch] for i in range(0, len(tokens), case.micro_batch)]
    means = [[loss for row in micro for loss in row] for micro in micro_batches]
    return sum((torch.stack(micro).mean() if micro else zero) for micro in means) / len(means)


def reference(case: Case, folder: str) -> dict[str, Any]:
    """Train on whole global batches in this process, with nothing of ours."""
    torch.set_num_threads(1)
    model_class = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    model = model_class.from_pretrained(folder, dtype=torch.float32).to(case.dtype).train()
    groups = [{"params": [p], "weight_decay": DECAY if p.ndim > 1 else 0.0} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    losses, norms, auxiliary = [], [], []
    for step in range(STEPS):
        if case.family == "phi":
            loss = by_hand(case, token_losses(model, samples(step))[0])
        else:
            loss, aux = with_router(case, model, step)
            auxiliary.append(aux)
        loss.backward()
        for parameter in model.parameters():  # a step without images trains the tower with gradients of zero
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "aux": auxiliary, "parameters": snapshot(model)}


def token_losses(model: nn.Module, chosen: list[tuple[Tensor, Tensor]], **options: Any) -> tuple[Any, Any]:
    """Return the loss of each target token, sample by sample, and the model's output."""
    batch = padded(chosen)
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **options)
    tokens = []
    for b, (ids, labels) in enumerate(chosen):
        positions = [s for s in range(len(ids) - 1) if labels[s + 1] >= 0]
        scores = output.logits[b].log_softmax(dim=-1)
        tokens.append([-scores[s, labels[s + 1]] for s in positions])
    return tokens, output


def with_router(case: Case, model: nn.Module, step: int) -> tuple[Tensor, float]:
    """Return the loss with Hugging Face's own router loss of each micro-batch, and the mean of the latter."""
    chosen, losses, auxiliary, weights = samples(step), [], [], []
    for i in range(0, GLOBAL_BATCH, case.micro_batch):
        tokens, output = token_losses(model, chosen[i : i + case.micro_batch], output_router_logits=True)
        count = sum(len(row) for row in tokens)
        micro = by_hand(case, tokens) if count else output.logits.sum() * 0
        losses.append(micro + AUX * output.aux_loss)
        auxiliary.append(output.aux_loss.item())
        weights.append(count if case.loss == "per_token_loss" else 1)
    mean = lambda values: sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)  # noqa: E731
    return mean(losses), mean(auxiliary)


def train(case: Case, folder: str, yaml: str) -> dict[str, Any]:
    """Train this rank's share of the same global batches on our road."""
    import torch.distributed as dist

    from mindspeed_mm.arguments import set_args
    from mindspeed_mm.distributed import state
    from mindspeed_mm.distributed.fsdp2 import prepare_model
    from mindspeed_mm.engine.fsdp2 import FSDP2Engine
    from mindspeed_mm.models.transformers_model import TransformersModel
    from mindspeed_mm.training.reporting import merge_reports, read_quotients
    from pretrain_transformers import loss_func

    state.initialize(None, state.RankInfo.from_environment(), backend="gloo", timeout=None)
    set_args(Namespace(log_tps=False))
    loss_cfg = {
        "loss_type": case.loss,
        "compute_mode": "chunk" if case.chunked else "default",
        "chunk_size": 7,
        "router_aux_loss_coef": 0.0 if case.family == "phi" else AUX,
    }
    model = TransformersModel({"init_from_hf_path": folder, "loss_cfg": loss_cfg}).to(case.dtype)
    layers = ["model.layers.{*}" if case.family == "phi" else "model.language_model.layers.{*}"]
    config = {"sharding_size": "auto", "sub_modules_to_wrap": layers}
    path = Path(yaml) / f"rank{dist.get_rank()}.yaml"
    path.write_text(json.dumps(config | ({"recompute_modules": layers} if case.recomputed else {})))
    prepare_model(model, state.data_parallel_group(), str(path))
    groups = [{"params": [p], "weight_decay": DECAY if p.ndim > 1 else 0.0} for p in model.parameters()]
    engine = FSDP2Engine(
        model,
        torch.optim.AdamW(groups, lr=LR, fused=True),
        group=state.data_parallel_group(),
        clip_grad=CLIP,
        per_token_loss=case.loss == "per_token_loss" and not case.wrong,
        per_sample_loss=case.loss == "per_sample_loss",
    )
    share = GLOBAL_BATCH // case.ranks
    start = share * dist.get_rank()
    losses, norms, auxiliary = [], [], []
    for step in range(STEPS):
        mine = samples(step)[start : start + share]
        batches = iter([padded(mine[i : i + case.micro_batch]) for i in range(0, share, case.micro_batch)])
        reports = engine.forward_backward(
            lambda iterator, module: (module(**next(iterator)), loss_func), batches, case.accumulation
        )
        norms.append(float(engine.optimizer_step().grad_norm))
        merged = merge_reports(reports)
        losses.append(read_quotients(merged["loss"]))
        if "aux_loss" in merged:
            auxiliary.append(read_quotients(merged["aux_loss"]))
    parameters = snapshot(model.model) if dist.get_rank() == 0 else snapshot(model.model) and None
    return {"losses": losses, "norms": norms, "aux": auxiliary, "parameters": parameters}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    named = model.named_parameters()
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in named}


def train_all(cases: list[Case], folder: str, yaml: str) -> list[dict[str, Any]]:
    """Train every case, one after the other: starting the ranks once is what makes the matrix cheap."""
    return [train(case, folder, yaml) for case in cases]


def difference(ours: list[float], theirs: list[float]) -> float:
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return float(((a - b).abs() / b.abs().clamp(min=1e-30)).max())  # NaN wins, as it would not with Python's max


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative L2 distance of all the parameters together."""
    gap = sum((ours[name] - theirs[name]).double().square().sum() for name in theirs)
    return float((gap / sum(p.double().square().sum() for p in theirs.values())).sqrt())


def errors(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Return the largest relative errors of the losses, the norms, all parameters together, and the worst tensor."""
    ours, theirs = found["parameters"], expected["parameters"]
    return {
        "loss": difference(found["losses"], expected["losses"]),
        "norm": difference(found["norms"], expected["norms"]),
        "aux": difference(found["aux"], expected["aux"]) if expected["aux"] else 0.0,
        "parameters": distance(ours, theirs),
        "worst tensor": float(torch.tensor([distance({n: ours[n]}, {n: theirs[n]}) for n in theirs]).max()),
    }


def within_limits(case: Case, error: dict[str, float]) -> bool:
    """1e-6 in fp32, where the worst tensor only shows noise that Adam amplifies; 1e-10 for all of it in fp64."""
    if case.dtype == torch.float64:
        return all(value <= 1e-10 for value in error.values())
    return all(error[key] <= 1e-6 for key in ("loss", "norm", "aux", "parameters"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    return cache(lambda family: str(save_model(family, tmp_path_factory.mktemp(family))))


def check(cases: list[Case], pool: RankPool, folder: Callable[[str], str], tmp_path: Path) -> None:
    assert cases
    source = folder(cases[0].family)
    expected = cache(lambda *key: reference(Case(*key), source))
    results = pool.run(train_all, cases, source, str(tmp_path), timeout=240)
    wrong = []
    for index, case in enumerate(cases):
        split = case.micro_batch if case.loss == "default" or case.family != "phi" else GLOBAL_BATCH
        oracle = expected(1, split, case.loss, False, False, case.dtype, case.family)
        found = results[0][index]
        assert all(other[index]["losses"] == found["losses"] for other in results[1:]), "all ranks log the same"
        if not within_limits(case, error := errors(found, oracle)):
            wrong.append((case, error))
    assert not wrong, "\n".join(f"{case}: {error}" for case, error in wrong)


def matrix(ranks: int, dtype: torch.dtype, ways: list[tuple[bool, bool]]) -> list[Case]:
    """Return every split of the global batch with every loss, and ``(chunked, recomputed)`` as given."""
    return [
        Case(ranks, micro_batch, loss, *way, dtype) for micro_batch, loss, way in product(SPLITS[ranks], LOSSES, ways)
    ]


EVERY_WAY = list(product([False, True], repeat=2))


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_pain_14_gradient_accumulation_with_variable_lengths(
    ranks: int,
    dtype: torch.dtype,
    folder: Callable[[str], str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    plain, everything = EVERY_WAY[0], EVERY_WAY[-1]
    cases = matrix(ranks, dtype, [plain, everything] if dtype == torch.float64 else [everything])
    check(cases, request.getfixturevalue(f"ranks{ranks}"), folder, tmp_path)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_pain_14_in_every_way_to_compute_the_loss(
    ranks: int,
    dtype: torch.dtype,
    folder: Callable[[str], str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    check(matrix(ranks, dtype, EVERY_WAY), request.getfixturevalue(f"ranks{ranks}"), folder, tmp_path)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_pain_14_a_denominator_of_one_micro_batch_is_caught(
    ranks: int, folder: Callable[[str], str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every micro-batch's sum divided by its own tokens, the published bug, misses the limits by a factor of 100."""
    case = Case(ranks, 2, "per_token_loss", False, False, torch.float32, wrong=True)
    pool = request.getfixturevalue(f"ranks{ranks}")
    found = pool.run(train_all, [case], folder("phi"), str(tmp_path))[0][0]
    expected = reference(Case(1, GLOBAL_BATCH, "per_token_loss", False, False, torch.float32), folder("phi"))
    error = errors(found, expected)
    assert not within_limits(case, error)
    assert min(error["loss"], error["norm"], error["parameters"]) > 1e-4
    # It is what the default loss means, and a triple without --calculate-per-token-loss.
    intended = errors(found, reference(Case(1, 2, "default", False, False, torch.float32), folder("phi")))
    assert max(intended["norm"], intended["parameters"]) <= 1e-6


def test_router_loss_under_accumulation(folder: Callable[[str], str], ranks2: RankPool, tmp_path: Path) -> None:
    """Hugging Face's own router loss of each micro-batch, averaged as its targets are."""
    cases = [Case(2, 2, loss, True, True, torch.float32, family="qwen3_vl_moe") for loss in LOSSES]
    check(cases, ranks2, folder, tmp_path)


def test_a_16_bit_gradient_is_scaled_by_the_exact_factor() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad = torch.full((3,), 300.0, dtype=torch.bfloat16)
    scale_gradients([parameter], torch.tensor(1 / 300))
    assert parameter.grad.tolist() == [1.0] * 3, "1/300 in bfloat16 is 0.2 % off"
