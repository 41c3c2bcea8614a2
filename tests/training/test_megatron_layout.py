"""Layouts that do not fit the model: one message with the two numbers and the flags, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.megatron_layout import apply_layout
from tests.arguments.lines import validated
from tests.models import tiny

BASE = ("--lr", "1e-5", "--train-iters", "10", "--global-batch-size", "48")


def layout(folder: Path, family: str, line: str, world_size: int, **model: Any) -> dict[str, Any]:
    """Return the fields of TransformerConfig that the command line decides."""
    if not (folder / "config.json").exists():
        tiny.tiny_config(family).save_pretrained(folder)
    config = ModelConfig.model_validate({"init_from_hf_path": str(folder), **model})
    apply_layout(validated(*BASE, *line.split(), world_size=world_size), config)
    return config.megatron.to_dict()


@pytest.mark.parametrize(
    ("family", "line", "world_size", "shown"),
    [
        (
            "qwen3_vl",
            "--tensor-model-parallel-size 3",
            3,
            "--tensor-model-parallel-size 3 does not divide the 4 attent",
        ),
        (
            "qwen3_vl",
            "--tensor-model-parallel-size 4",
            4,
            "--tensor-model-parallel-size 4 does not divide the 2 key an",
        ),
        ("qwen3_vl", "--tensor-model-parallel-size 3", 3, "does not divide the 64 columns of an MLP (ffn_hidden_size"),
        (
            "qwen3_vl",
            "--pipeline-model-parallel-size 3",
            3,
            "2 layers, which 3 pipeline stages (--pipeline-model-paral",
        ),
        (
            "qwen3_vl",
            "--pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2",
            2,
            "2 layers, which 2 pipeline stages x 2 virtual chunks",
        ),
        ("qwen3_vl", "--expert-model-parallel-size 2", 2, "--expert-model-parallel-size 2: the model has no experts"),
        (
            "qwen3_vl_moe",
            "--expert-model-parallel-size 3",
            3,
            "--expert-model-parallel-size 3 does not divide the 4 exp",
        ),
        (
            "qwen3_vl_moe",
            "--tensor-model-parallel-size 2",
            2,
            "--tensor-model-parallel-size 2 with 4 experts needs --se",
        ),
        (
            "qwen3_vl",
            "--context-parallel-size 8 --context-parallel-algo ulysses_cp_algo",
            8,
            "--context-parallel-size 8 --context-parallel-algo ulysses_cp_algo: 8 ranks cannot share the 4 attention",
        ),
    ],
)
def test_it_is_refused(tmp_path: Path, family: str, line: str, world_size: int, shown: str) -> None:
    with pytest.raises(UserError) as error:
        layout(tmp_path, family, line, world_size)
    assert shown in str(error.value)


@pytest.mark.parametrize("kind", [transformers.GPT2Config, transformers.T5Config, transformers.MambaConfig])
def test_a_decoder_that_megatron_core_does_not_compute_is_refused(tmp_path: Path, kind: Any) -> None:
    kind().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has a text decoder of type .* Use pretrain_transformers.py"):
        layout(tmp_path, "none", "", 1)


def test_layers_without_experts_are_looked_at_too(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        num_attention_heads=6, num_key_value_heads=3, intermediate_size=64, moe_intermediate_size=24, num_experts=4
    )
    config.decoder_sparse_step = 2
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not divide the 64 columns of an MLP"):
        layout(tmp_path, "none", "--tensor-model-parallel-size 3 --sequence-parallel", 3)


def test_stages_that_model_json_writes(tmp_path: Path) -> None:
    stages = {"text_decoder": {"pipeline_num_layers": [2, 0]}}
    layout(tmp_path, "qwen3_vl", "--pipeline-model-parallel-size 2", 2, **stages)
    with pytest.raises(UserError, match=r"is \[2, 0\], but there are 3 pipeline stages"):
        layout(tmp_path, "qwen3_vl", "--pipeline-model-parallel-size 3", 3, **stages)


def test_what_the_flags_decide(tmp_path: Path) -> None:
    assert layout(tmp_path, "qwen3_vl", "", 1) == {
        "calculate_per_token_loss": False,
        "variable_seq_lengths": False,
        "make_vocab_size_divisible_by": 128,
        "perform_initialization": False,
    }
    # Values that may stay have to be drawn.
    assert "perform_initialization" not in layout(tmp_path, "qwen3_vl", "--load-strict false", 1)
    assert "perform_initialization" not in layout(tmp_path, "qwen3_vl", "", 1, random_init=True)
    assert layout(tmp_path, "qwen3_vl", "--calculate-per-sample-loss", 1)["calculate_per_token_loss"]
    line = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --bf16"
    line += " --recompute-granularity full --recompute-method block --recompute-num-layers 1"
    fields = layout(tmp_path, "qwen3_vl", line, 4)
    assert (fields["sequence_parallel"], fields["variable_seq_lengths"], fields["bf16"]) == (True, True, True)
    assert fields["recompute_method"] == "block"
    assert "moe_token_dispatcher_type" not in fields
