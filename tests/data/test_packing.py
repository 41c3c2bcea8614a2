"""Plans of packs, the sequences made of them, and the keys that ask for them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data import build_mm_dataloader, build_mm_dataset
from mindspeed_mm.data.collators import PackCollator
from mindspeed_mm.data.model_inputs import ModelInputs
from mindspeed_mm.data.packing import plan_packs
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.data.tiny import save_digits
from tests.models.tiny import tiny_config
from tests.training.job import save_tiny_hf_folder


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(1, 25))
def test_every_sample_is_in_one_pack_that_holds_it(lengths: list[int], window: int) -> None:
    packs = list(plan_packs(lengths, 20, window))
    assert sorted(position for pack in packs for position in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[position] for position in pack) <= 20
        assert pack == sorted(pack) and pack[-1] // window == pack[0] // window


def test_windows_are_independent() -> None:
    """So that a run resumes in the middle without planning what lies before."""
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    whole = list(plan_packs(lengths, 100, 250))
    rest = [[500 + position for position in pack] for pack in plan_packs(lengths[500:], 100, 250)]
    assert whole[-len(rest) :] == rest


def log_normal(count: int, capacity: int, seed: int = 0) -> np.ndarray:
    """Lengths as conversation data has them: median 400 tokens, a long tail, cut at the capacity."""
    return np.random.default_rng(seed).lognormal(6.0, 0.9, count).astype(int).clip(1, capacity)


@pytest.mark.parametrize(("capacity", "window"), [(4096, 1024), (8192, 2048), (32768, 8192)])
def test_log_normal_lengths_fill_98_percent(capacity: int, window: int) -> None:
    lengths = log_normal(20 * window, capacity)
    packs = sum(1 for _ in plan_packs(lengths, capacity, window))
    assert lengths.sum() / (packs * capacity) >= 0.98


def test_no_more_than_a_window_is_read_ahead() -> None:
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield 1 + read % 7

    for number, pack in enumerate(islice(plan_packs(endless(), 16, 32), 100)):
        assert pack and read <= 32 * (1 + pack[0] // 32), number


@pytest.mark.parametrize("lengths", [[3, 17], [0]])
def test_a_sample_that_fits_into_no_pack_is_named(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"sample \d has (17|0) tokens, a pack has 16"):
        list(plan_packs(lengths, 16, 4))


@pytest.fixture(scope="module")
def config_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def folder(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"config-{family}"
        tiny_config(family).save_pretrained(path)
        return path

    return folder


def sample(*ids: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(ids)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone(), **more}


def test_a_packed_sequence_by_hand(config_folders: Callable[[str], Path]) -> None:
    batch = PackCollator(10, 0, ModelInputs(config_folders("qwen3")))([sample(5, 6, 7), sample(8, 9), sample(4)])
    assert {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 4, 0, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 0, 0, 0, 0]],
        "labels": [[-100, 6, 7, -100, 9, -100, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 0, 1, 2, 3]],
        "cu_seqlens": [0, 3, 5, 6],
        "max_seqlen": 4,
    }


def test_rotary_positions_of_images_by_hand(config_folders: Callable[[str], Path]) -> None:
    """Text, an image of 2 x 1 merged patches (time, height, width), text from the largest position on; twice."""
    picture = sample(5, 300, 300, 6, image_grid_thw=torch.tensor([[1, 4, 2]]), pixel_values=torch.ones(8, 96))
    inputs = pickle.loads(pickle.dumps(ModelInputs(config_folders("qwen3_vl"))))
    batch = PackCollator(10, 0, inputs)([picture, sample(7), picture])
    once = [[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]]
    assert batch["position_ids"].shape == (3, 1, 10)
    assert batch["position_ids"][:, 0].tolist() == [[*row, 0, *row, 0] for row in once]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 2]] * 2 and batch["pixel_values"].shape == (16, 96)
    assert batch["vision_metadata"]["image"]["cu_seqlens"].tolist() == [0, 8, 16]


def test_samples_that_do_not_fit_are_an_error(config_folders: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"2 samples of 5 tokens do not fit into one sequence of --seq-length 4"):
        PackCollator(4, 0, ModelInputs(config_folders("qwen3")))([sample(5, 6, 7), sample(8, 9)])


@pytest.mark.parametrize(
    ("basic", "attr", "message"),
    [
        ({"packing": True}, {}, r"basic_parameters.packing: pass --seq-length, the tokens of a packed sequence"),
        (
            {"neat_packing": True, "packing": False, "seq_length": 64},
            {},
            r"neat_packing is true and .*\.packing is fal",
        ),
        ({"packing": False, "seq_length": 64}, {"packing": True}, r"attr.packing is true and basic_parameters.packing"),
    ],
)
def test_keys_that_contradict_each_other(
    dataset_param: Callable[..., dict[str, Any]], basic: dict[str, Any], attr: dict[str, Any], message: str
) -> None:
    param = dataset_param(**basic)
    param["attr"] = {**param["attr"], **attr}
    with pytest.raises(UserError, match=message):
        build_mm_dataset(param)


@pytest.mark.parametrize("key", ["packing", "neat_packing"])
def test_packing_needs_the_model_s_config(dataset_param: Callable[..., dict[str, Any]], key: str) -> None:
    dataset = build_mm_dataset(dataset_param(seq_length=64, **{key: True}))
    assert dataset.encoder.options.pack_to == 64
    with pytest.raises(UserError, match=r"packing: preprocess_parameters.model_name_or_path has no config.json"):
        build_mm_dataloader(dataset, {"batch_size": 1})


def test_an_epoch_of_packs_is_an_epoch_of_samples(
    dataset_param: Callable[..., dict[str, Any]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Loss, number of targets and gradients of all digits: two to a batch of padded ones, packed, and streamed so."""
    folder = save_tiny_hf_folder("qwen3_vl", tmp_path_factory.mktemp("model"))
    rows = save_digits(tmp_path)
    for number, row in enumerate(rows):
        row["messages"][1]["content"] += " And so on." * number
    found = []
    for packing, streaming in ((False, False), (True, False), (True, True)):
        param = dataset_param(rows, packing=packing, seq_length=200, streaming=streaming)
        param["preprocess_parameters"]["model_name_or_path"] = str(folder)
        dataset = build_mm_dataset(param)
        options = {"batch_size": 2 - packing, "num_workers": int(packing), "drop_last": not streaming}
        loader = build_mm_dataloader(dataset, options)
        model = TransformersModel({"init_from_hf_path": str(folder), "loss_cfg": {"loss_type": "per_token_loss"}})
        outputs = [model(**batch) for batch in loader]
        loss = sum(output["loss"] for output in outputs) / sum(output["token_nums"] for output in outputs)
        loss.backward()
        found.append((loss, len(outputs), [p.grad for p in model.parameters()]))
        if not packing:
            lengths = [len(dataset[index]["input_ids"]) for index in range(8)]
    (padded, batches, wanted), *others = found
    assert batches == 4
    for packed, packs, gradients in others:
        assert sum(lengths) / 200 <= packs < 8
        torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-5)
