"""Adapters on megatron-core layers: peft on the Hugging Face model is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mindspeed_mm import accelerator
from mindspeed_mm.distributed import chunks, parallel, state
from mindspeed_mm.distributed.main_parameters import MainParameters, unwrap
from mindspeed_mm.distributed.parallel import ParallelSizes
from mindspeed_mm.engine.megatron import MegatronEngine
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.lora import LoraSettings
from mindspeed_mm.models.lora import add_adapters as add_to_hf
from mindspeed_mm.models.lora import initialize_adapters as initialize_hf
from tests.engine.gpt import ADAM, LENGTH, Case, batches, forward_step, gpt_model, hf_blocks, hf_model
from tests.models import tiny
from tests.models.megatron import vlm
from tests.ranks import RankPool

peft = pytest.importorskip("peft")

LAYERS = 2
HF_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = LoraSettings(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), r=3, alpha=7)


def value_of(name: str, shape: Any) -> Tensor:
    """Return values for an adapter's B that are not zero, the same on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name) + 13 * sum(name.encode()))
        return torch.randn(shape) / 10


def oracle() -> Any:
    model = hf_model(layers=LAYERS)
    add_to_hf(model, LoraSettings(HF_TARGETS, r=3, alpha=7))
    initialize_hf(model, 5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(value_of(name, parameter.shape))
    return model


def train(case: Case, settings: LoraSettings = SETTINGS, steps: int = 2) -> list[dict[str, Any]]:
    """Train on this rank and return what it saw: loss, grad norm, and its boxes of gradients and updated adapters."""
    from mindspeed_mm.models.megatron.lora import add_adapters, initialize_adapters

    state.initialize(
        None, state.RankInfo.from_environment(), backend="gloo", timeout=None, sizes=ParallelSizes(**case.sizes)
    )
    accelerator.prepare_megatron_layers()
    parallel.seed_stages(1)

    def build(*where: Any) -> nn.Module:
        model = gpt_model(case, *where)
        add_adapters(model, settings)
        initialize_adapters(model, 5)
        for tensor, whole, block in hf_blocks(model, dict(model.named_parameters())):
            if "lora_B" in whole:
                tensor.copy_(value_of(whole, shapes[whole])[block])
        return model

    shapes = {name: p.shape for name, p in oracle().named_parameters()}
    wrapped = chunks.reduce_gradients(chunks.build_chunks(build), sharded=case.sharded)
    mains = MainParameters(wrapped, sharded=case.sharded)
    optimizer = torch.optim.AdamW([{"params": mains.values}], **ADAM)
    engine = MegatronEngine(wrapped, mains, optimizer, clip_grad=1.0, sequence_length=LENGTH, micro_batch_size=2)
    seen = []
    for number in range(steps):
        taken = batches(2, seed=number)
        reports = engine.forward_backward(forward_step("mean"), iter(taken), len(taken))
        loss = sum(float(r["loss"]) for r in reports) / len(reports)
        found: dict[str, Any] = {"gradients": {}, "weights": {}}
        for chunk in engine.module:
            inner = unwrap(chunk)
            grads = {n: p.main_grad.clone() for n, p in inner.named_parameters() if p.requires_grad}
            found["gradients"].update({(n, str(b)): (b, t.clone()) for t, n, b in hf_blocks(inner, grads)})
        norm = float(engine.optimizer_step().grad_norm)
        for chunk in engine.module:
            inner = unwrap(chunk)
            values = {n: p for n, p in inner.named_parameters() if p.requires_grad}
            found["weights"].update({(n, str(b)): (b, t.clone()) for t, n, b in hf_blocks(inner, values)})
        seen.append({"loss": loss, "grad_norm": norm, **found})
    return seen


def expected(steps: int = 2) -> list[dict[str, Any]]:
    model = oracle()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), **ADAM)
    seen = []
    for number in range(steps):
        total = 0.0
        for batch in batches(2, seed=number):
            logits = model(input_ids=batch["input_ids"]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) / 2
            loss.backward()
            total += float(loss.detach())
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        norm = float(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        weights = {name: p.detach().clone() for name, p in trained.items()}
        seen.append({"loss": total, "grad_norm": norm, "gradients": gradients, "weights": weights})
    return seen


CASES = {
    "one rank": Case(layers=LAYERS),
    "recompute": Case(
        config={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        layers=LAYERS,
    ),
    "TP2": Case({"tensor": 2}, layers=LAYERS),
    "TP2+SP": Case({"tensor": 2}, {"sequence_parallel": True}, layers=LAYERS),
    "PP2": Case({"pipeline": 2}, layers=LAYERS),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", CASES)
def test_training_equals_peft_on_the_hugging_face_model(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    pool: RankPool = request.getfixturevalue("ranks2" if case.sizes else "ranks1")
    ranks = pool.run(train, case)
    for number, right in enumerate(expected()):
        covered = {name: torch.zeros_like(g, dtype=torch.bool) for name, g in right["gradients"].items()}
        for steps in ranks:
            step = steps[number]
            for key in ("loss", "grad_norm"):
                assert abs(step[key] - right[key]) <= 1e-5 * abs(right[key]), (number, key, step[key], right[key])
            for key in ("gradients", "weights"):
                for (tensor, _), (block, found) in step[key].items():
                    worst = (found - right[key][tensor][block]).abs().max() / right[key][tensor].abs().max()
                    assert worst <= 1e-5, (number, key, tensor, float(worst))
                    covered[tensor][block] = True
        assert all(part.all() for part in covered.values()), [n for n, p in covered.items() if not p.all()]


def write_files(hf_folder: str, folder: Path, sizes: dict[str, int]) -> Tensor:
    """Give a whole VLM adapters with random B, write peft's files, and return this rank's logits."""
    from mindspeed_mm.checkpoint.adapters import boxed_adapter_files, written_config
    from mindspeed_mm.models.megatron.layout import boxes
    from mindspeed_mm.models.megatron.lora import add_adapters, initialize_adapters, peft_config

    vlm.start(**sizes)
    (model,) = vlm.build(hf_folder)
    add_adapters(model, SETTINGS)
    initialize_adapters(model, 5)
    held = boxes(model, adapters=True)
    for piece, view in held:
        if "lora_B" in piece.hf_name:
            view.copy_(value_of(piece.hf_name, piece.global_shape)[piece.block])
    bare = model.blueprint.model
    config = written_config(peft_config(bare, model.blueprint.decoder_path, SETTINGS, hf_folder), bare)
    for name, content in boxed_adapter_files(config, held).items():
        (folder / name).write_bytes(content)
    logits: Tensor = model(**tiny.tiny_batch("qwen2_5_vl", [1, 1]))["logits"].detach()
    return logits


@pytest.mark.ranks
@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}], ids=["one rank", "TP2"])
def test_peft_reads_the_files(sizes: dict[str, int], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pool: RankPool = request.getfixturevalue("ranks2" if sizes else "ranks1")
    tiny.save_tiny("qwen2_5_vl", tmp_path / "hf")
    (tmp_path / "adapter").mkdir()
    parts = pool.run(write_files, str(tmp_path / "hf"), tmp_path / "adapter", sizes)
    batch = tiny.tiny_batch("qwen2_5_vl", [1, 1])
    base = tiny.tiny_model("qwen2_5_vl")
    before = base(**batch).logits
    after = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(**batch).logits
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(torch.cat(parts, dim=-1), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            LoraSettings(("q_proj",)),
            r"'q_proj' is no linear layer .* part of linear_qkv here.* linear_fc2 or all-linear",
        ),
        (LoraSettings(("linear_qvk",)), r"'linear_qvk' .* Did you mean 'linear_qkv'"),
        (LoraSettings((), ("experts.down_proj",)), r"--lora-target-parameters experts.down_proj: .* remove it"),
        (
            LoraSettings(("linear_qkv",), apply_modules=("image_encoder",)),
            r"--lora-apply-modules image_encoder: .* or all",
        ),
    ],
)
def test_mistakes(settings: LoraSettings, message: str) -> None:
    from mindspeed_mm.models.megatron.lora import add_adapters

    with pytest.raises(UserError, match=message):
        add_adapters(nn.Module(), settings)
