"""LoRA on the Megatron road: the run of the FSDP2 road, resumed in another layout, and read by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankPool
from tests.training.job import ROOT, Job, run_here
from tests.training.test_resume import losses, tensors
from tests.training.test_vlm_road import PP, odd_folder, train, vlm

peft = pytest.importorskip("peft")

__all__ = ["odd_folder", "vlm"]

LORA = {"lora_r": 4, "lora_alpha": 8, "train_iters": 6, "lr_decay_iters": 6}
FUSED: dict[str, Any] = {**LORA, "lora_target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]}
CP = {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}
PLAIN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def close(one: dict[int, list[float]], other: dict[int, list[float]], limit: float = 1e-5) -> None:
    for step, numbers in one.items():
        for a, b in zip(numbers, other[step], strict=True):
            assert abs(a - b) <= limit * abs(b), (step, numbers, other[step])


def test_a_run_with_adapters(vlm: Job, ranks2: RankPool, odd_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    train(ranks2, vlm, save=tmp_path / "cp", export_hf=tmp_path / "adapter", **CP, **FUSED)
    flags = {f.replace("_", "-"): v for f, v in LORA.items()}
    fsdp2 = {**flags, "lora-target-modules": PLAIN, "lora-apply-modules": ["text_decoder"], "save": tmp_path / "fsdp2"}
    vlm.flags |= fsdp2
    assert not any(o.code for o in ranks2.run(run_here, vlm.command(), vlm.folder, timeout=240))
    close(losses(tmp_path / "cp"), losses(tmp_path / "fsdp2"))
    vlm.flags |= dict.fromkeys(fsdp2)

    train(ranks2, vlm, save=tmp_path / "first", **CP, **{**FUSED, "train_iters": 3})
    resumed = {**FUSED, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    train(ranks2, vlm, save=tmp_path / "second", load=tmp_path / "first", **PP, **resumed)
    close(losses(tmp_path / "second"), losses(tmp_path / "cp"), 1e-6)

    saved, others = (tensors(tmp_path / name / "iter_0000006") for name in ("cp", "fsdp2"))
    assert saved.keys() == others.keys() and all(".lora_" in key for key in saved)
    for key, value in saved.items():
        torch.testing.assert_close(value, others[key], rtol=1e-3, atol=1e-5, msg=key)
    for folder in (tmp_path / "cp" / "iter_0000006", tmp_path / "adapter"):
        base = AutoModelForImageTextToText.from_pretrained(odd_folder)
        model = peft.PeftModel.from_pretrained(base, str(folder)).base_model.model
        found = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
        assert len(found) == 2 * 7 * 2
        for name, value in found.items():
            assert torch.equal(value, saved[f"model.model.{name}"]), name
            assert value.any(), name


def test_under_fsdp2_it_takes_no_adapters(vlm: Job, ranks1: RankPool) -> None:
    vlm.script = ROOT / "pretrain_vlm.py"
    vlm.yaml = {"sharding_size": "auto", "sub_modules_to_wrap": ["text_decoder.decoder.layers.{*}"]}
    vlm.flags |= {"lora-target-modules": ["all-linear"], "global-batch-size": 1, "train-iters": 4}
    (outcome,) = ranks1.run(run_here, vlm.command(), vlm.folder, timeout=240)
    assert "VLMModel takes no adapters under FSDP2; remove --use-torch-fsdp2" in outcome.error()
