"""Vocabularies that the tensor-parallel ranks cannot share evenly: padded, and nobody sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from mindspeed_mm.checkpoint.hf_boxes import export_hf_boxes
from mindspeed_mm.distributed import chunks
from mindspeed_mm.distributed.main_parameters import MainParameters
from mindspeed_mm.engine.megatron import MegatronEngine
from mindspeed_mm.models.megatron.layout import boxes
from mindspeed_mm.models.megatron.vocabulary import VocabularyShare, rows_of_each
from tests.distributed.test_megatron_parity import _boxes, forward_step
from tests.models import tiny
from tests.models.megatron import vlm
from tests.models.megatron.test_weights import weights
from tests.ranks import RankPool

LIMIT = 1e-5
WORDS = 321
ADAM: dict[str, Any] = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1}


def hf_model(tie: bool) -> Any:
    config = tiny.tiny_config("qwen3_vl", tie)
    config.get_text_config().vocab_size = WORDS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float32).train()
        for parameter in model.parameters():  # a bias of zero has no digits to compare after a step
            parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


def batches() -> list[dict[str, Tensor]]:
    found = [tiny.tiny_batch("qwen3_vl", [1, 0], seed=seed) for seed in range(2)]
    for batch in found:
        batch["input_ids"][:, -3] = batch["labels"][:, -3] = WORDS - 1  # the last word, beside the padding
    return found


@pytest.mark.parametrize(
    ("words", "ranks", "divisor", "padded"),
    [(151674, 4, 128, 152064), (151936, 1, 128, 151936), (151936, 2, 128, 152064), (321, 2, 1, 322), (320, 2, 1, 320)],
)
def test_sizes_are_those_of_megatron(words: int, ranks: int, divisor: int, padded: int) -> None:
    """Megatron-LM: the next multiple of make_vocab_size_divisible_by x tensor-parallel size."""
    assert rows_of_each(words, ranks, divisor) * ranks == padded
    rows = rows_of_each(words, ranks, divisor)
    assert sum(VocabularyShare(words, rows, rank).held for rank in range(ranks)) == words


def train(folder: str, exported: str, divisor: int, sharded: bool, chunked: bool) -> dict[str, Any]:
    """Run two steps; return what they showed, whether padding is still zero, and how much there is."""
    vlm.start(tensor=2)
    loss = {"compute_mode": "chunk", "chunk_size": 5} if chunked else {}
    (model,) = vlm.build(folder, megatron={"make_vocab_size_divisible_by": divisor}, loss_cfg=loss)
    export_hf_boxes(model.blueprint.model, exported, boxes(model))
    wrapped = chunks.reduce_gradients([model], sharded=sharded)
    mains = MainParameters(wrapped, sharded=sharded)
    optimizer = torch.optim.AdamW(mains.values, fused=True, **ADAM)
    engine = MegatronEngine(wrapped, mains, optimizer, clip_grad=1.0, sequence_length=14, micro_batch_size=2)
    steps = []
    for _ in range(2):
        reports = engine.forward_backward(forward_step, iter(batches()), 2)
        step = {"loss": sum(float(report["loss"]) for report in reports) / 2}
        step["gradients"] = list(_boxes(engine, gradients=True))
        step["norm"] = float(engine.optimizer_step().grad_norm)
        step["weights"] = list(_boxes(engine, gradients=False))
        steps.append(step)
    decoder = model.text_decoder
    tables = [decoder.embedding.word_embeddings.weight, decoder.output_layer.weight]
    padding = [table[decoder.vocabulary.held :] for table in tables if table is not None]
    return {"steps": steps, "padding": [(len(rows), bool((rows == 0).all())) for rows in padding]}


@pytest.mark.parametrize(
    ("tie", "divisor", "sharded", "chunked", "padded"),
    [
        (False, 1, False, False, [0, 1]),
        pytest.param(True, 128, True, True, [0, 191], marks=pytest.mark.slow),
        (True, 512, True, False, [191, 512]),
        (False, 512, False, True, [191, 512]),
    ],
    ids=["one row", "tied, chunks", "tied, one rank has no word", "chunks, one rank has no word"],
)
def test_training_is_that_of_hugging_face(
    ranks2: RankPool, tmp_path: Path, tie: bool, divisor: int, sharded: bool, chunked: bool, padded: list[int]
) -> None:
    model = hf_model(tie)
    model.save_pretrained(tmp_path / "hf")
    answers = ranks2.run(train, str(tmp_path / "hf"), str(tmp_path / "exported"), divisor, sharded, chunked)
    for rank, answer in enumerate(answers):
        assert answer["padding"] and all(found == (padded[rank], True) for found in answer["padding"])
    stored, found = weights(tmp_path / "hf"), weights(tmp_path / "exported")
    assert stored.keys() == found.keys() and all(torch.equal(stored[key], found[key]) for key in stored)

    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    for number in range(2):
        loss = 0.0
        for batch in batches():
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            one = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()) / 2
            one.backward()
            loss += float(one.detach())
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
        for answer in answers:
            step = answer["steps"][number]
            assert abs(step["loss"] - loss) <= LIMIT * loss and abs(step["norm"] - norm) <= LIMIT * norm
            known = [box for box in step["gradients"] if not box[2].isnan().any()]
            assert known and vlm.worst(known, gradients) <= (LIMIT, "")
            assert vlm.worst(step["weights"], after) <= (LIMIT, "")
