"""Split over ranks, the model still gives Hugging Face's loss and gradients; deepstack, experts and ties included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import tiny
from tests.models.megatron import vlm
from tests.ranks import RankPool

LIMIT = 1e-5
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SEQUENCE = {"sequence_parallel": True}

# Family, whether it is tied, decoder layers, sizes, fields of TransformerConfig, pipeline_num_layers.
Case = tuple[str, bool, int, dict[str, int], dict[str, Any], Any]
SHARED = {"enable_encoder_dp": True}  # of model.json
CASES: dict[str, Case] = {
    "tp2 shared images": ("qwen3_vl", False, 2, {"tensor": 2}, SHARED, None),
    "tp2": ("qwen2_5_vl", False, 2, {"tensor": 2}, {}, None),
    "tp2 sp deepstack recompute": ("qwen3_vl", True, 2, {"tensor": 2}, {**SEQUENCE, **RECOMPUTE}, None),
    "pp2 deepstack recompute tied": ("qwen3_vl", True, 2, {"pipeline": 2}, RECOMPUTE, None),
    "vpp2 deepstack recompute": ("qwen3_vl", False, 4, {"pipeline": 2, "virtual": 2}, RECOMPUTE, None),
    "ep2": ("qwen3_vl_moe", False, 2, {"expert": 2}, {}, None),
}
SLOW: dict[str, Case] = {
    "tp2 sp": ("internvl", False, 2, {"tensor": 2}, SEQUENCE, None),
    "tp2 shared images internvl": ("internvl", False, 2, {"tensor": 2}, {**SHARED, **SEQUENCE}, None),
    "tp2 shared images llava": ("llava", False, 2, {"tensor": 2}, SHARED, None),
    "tp2 shared images, windows": ("qwen2_5_vl", False, 2, {"tensor": 2}, SHARED, None),
    "tp2 llava": ("llava", False, 2, {"tensor": 2}, {}, None),
    "tp2 sp experts split": ("qwen3_vl_moe", False, 2, {"tensor": 2}, SEQUENCE, None),
    "tp2 sp experts whole": (
        "qwen3_vl_moe",
        False,
        2,
        {"tensor": 2, "expert": 2, "expert_tensor": 1},
        {**SEQUENCE, "moe_token_dispatcher_type": "allgather"},
        None,
    ),
    "pp2 uneven": ("qwen3_vl", False, 3, {"pipeline": 2}, {}, [2, 1]),
    "pp2 a stage without layers": ("qwen2_5_vl", False, 2, {"pipeline": 2}, {}, [2, 0]),
    "pp2 selective": ("qwen3_vl_moe", False, 2, {"pipeline": 2}, {"recompute_granularity": "selective"}, None),
    "pp2 block": ("qwen3_vl", False, 4, {"pipeline": 2}, {**RECOMPUTE, "recompute_method": "block"}, None),
}


# What is frozen, and sizes; the embeddings are tied.
FROZEN: dict[str, tuple[list[str], dict[str, int]]] = {
    "the embedding, on two stages": (["text_decoder.embedding"], {"pipeline": 2}),
    "the output layer, on one stage": (["text_decoder.output_layer"], {}),
    "the decoder, on two stages": (["text_decoder"], {"pipeline": 2}),
}


@pytest.mark.parametrize("name", FROZEN)
def test_tied_embeddings_are_frozen_under_both_names(ranks2: RankPool, tmp_path: Path, name: str) -> None:
    freeze, sizes = FROZEN[name]
    tiny.save_tiny("qwen2_5_vl", tmp_path, tie=True)
    batches = micro_batches("qwen2_5_vl")
    answers = ranks2.run(vlm.train_step, str(tmp_path), batches, sizes, freeze)
    _, grads = expected(("qwen2_5_vl", True, 2, {}, {}, None))
    kept = {
        key: grad
        for key, grad in grads.items()
        if "embed_tokens" not in key and ("visual" in key or "text_decoder" not in freeze)
    }
    norm = float(torch.nn.utils.get_total_norm(list(kept.values())))
    for answer in answers:
        assert abs(answer["norm"] - norm) <= LIMIT * norm
        assert {key for key, _, gradient in answer["gradients"] if gradient is not None} <= kept.keys()


def micro_batches(family: str) -> list[dict[str, Tensor]]:
    """Return four, the second without an image."""
    images = ([1, 2], [0, 0], [2, 0], [0, 1])
    return [tiny.tiny_batch(family, counts, seed=seed) for seed, counts in enumerate(images)]


def expected(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Return Hugging Face's mean loss and gradients."""
    family, tie, layers, *_ = case
    results = [vlm.oracle(family, batch, tie, layers=layers) for batch in micro_batches(family)]
    count = len(results)
    return sum(r[0] for r in results) / count, {
        name: sum((r[2][name] for r in results[1:]), results[0][2][name]) / count for name in results[0][2]
    }


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)], ids=lambda n: n.replace(" ", "-")
)
def test_same_gradients(ranks2: RankPool, tmp_path: Path, name: str) -> None:
    if name == "tp2 sp experts split" and torch.__version__.startswith("2.7"):
        pytest.skip(
            "gloo of torch 2.7 has no reduce_scatter of unequal parts, which megatron-core's alltoall takes here"
        )
    case = {**CASES, **SLOW}[name]
    family, tie, layers, sizes, config, division = case
    tiny.save_tiny(family, tmp_path, tie, layers=layers)
    batches = micro_batches(family)
    model_json: dict[str, Any] = {} if division is None else {"text_decoder": {"pipeline_num_layers": division}}
    config, shared = ({k: v for k, v in config.items() if (k in SHARED) == wanted} for wanted in (False, True))
    answers = ranks2.run(vlm.train_step, str(tmp_path), batches, sizes, megatron=config, **shared, **model_json)
    loss, grads = expected(case)
    norm = float(torch.nn.utils.get_total_norm(list(grads.values())))
    seen = {key: torch.zeros(grad.shape, dtype=torch.bool) for key, grad in grads.items()}
    for answer in answers:
        assert abs(answer["loss"] - loss) <= LIMIT * loss
        assert vlm.worst(answer["gradients"], grads) <= (LIMIT, "")
        assert abs(answer["norm"] - norm) <= LIMIT * norm
        for key, block, _ in answer["gradients"]:
            seen[key][block] = True
    assert all(part.all() for part in seen.values())
