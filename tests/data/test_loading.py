from __future__ import annotations

import json
import pickle
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from mindspeed_mm.data import build_mm_dataloader, build_mm_dataset
from mindspeed_mm.data.collators import PaddingCollator
from mindspeed_mm.data.iterators import build_iterations
from mindspeed_mm.data.loaders import MultiModalDataLoader
from mindspeed_mm.errors import UserError
from tests.data.tiny import save_digits, write_jsonl

TEXT_ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world, " * 9}]}


def answers(batch: dict, dataset) -> list[str]:
    rows = [ids[ids >= 0].tolist() for ids in batch["labels"]]
    return [dataset.encoder.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", ["qwen3_vl", "glm4v", "internvl"])
def test_batches_of_rows_with_and_without_images(family, dataset_param, tmp_path):
    rows = [save_digits(tmp_path)[0], TEXT_ROW, save_digits(tmp_path)[2]]
    dataset = build_mm_dataset(dataset_param(rows, family))
    batch = next(iter(build_mm_dataloader(dataset, {"batch_size": 3, "shuffle": False})))
    assert answers(batch, dataset) == ["The answer is 0.", "world, " * 9, "The answer is 2."]
    size = batch["input_ids"].shape
    assert size[0] == 3 and size[1] % 8 == 0
    lengths = [len(dataset[i]["input_ids"]) for i in range(3)]
    assert max(lengths) <= size[1] < max(lengths) + 8
    for key in batch.keys() - {"pixel_values", "image_grid_thw"}:
        assert batch[key].shape == size and batch[key].dtype == torch.int64, key
    for number, length in enumerate(lengths):
        assert (batch["input_ids"][number, length:] == dataset.encoder.tokenizer.pad_token_id).all()
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (size[1] - length)
        assert (batch["labels"][number, length:] == -100).all()
    assert torch.equal(batch["pixel_values"], torch.cat([dataset[i]["pixel_values"] for i in (0, 2)]))
    if family != "internvl":
        assert batch["image_grid_thw"].shape == (2, 3)
        assert torch.equal(
            batch["mm_token_type_ids"].bool(), batch["input_ids"] == dataset.encoder.processor.image_token_id
        )


def test_a_batch_without_images_has_no_image_keys(dataset_param):
    batch = next(iter(build_mm_dataloader(build_mm_dataset(dataset_param([TEXT_ROW])), {"batch_size": 1})))
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "mm_token_type_ids"}


def test_collator_options():
    samples = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (3, 5)]
    batch = PaddingCollator(9, pad_to_multiple_of=1, ignore_pad_token_for_loss=False)(samples)
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[0, 1, 2, 9, 9], [0, 1, 2, 3, 4]]


def test_layouts_that_mean_the_same_give_the_same_samples(dataset_param, tmp_path, monkeypatch):
    param = dataset_param()
    expected = build_mm_dataset(param)[3]
    digits = save_digits(tmp_path)
    basic, other = param["basic_parameters"], tmp_path / "other.json"

    def check(rows: list, attr: dict, **changed) -> None:
        other.write_text(json.dumps(rows))
        changed = {**param, "attr": attr, "basic_parameters": {**basic, "dataset": str(other), **changed}}
        assert equal(build_mm_dataset(changed)[3], expected)

    check(digits, param["attr"])
    # the documented default tags, one image as text, and columns that nobody reads
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {
            "id": n,
            "images": row["images"][0],
            "conversations": [{"from": names[m["role"]], "value": m["content"], "weight": 1} for m in row["messages"]],
        }
        for n, row in enumerate(digits)
    ]
    check(sharegpt, {"images": "images"})
    alpaca = [
        {
            "instruction": row["messages"][0]["content"].partition("\n")[0],
            "input": "What digit is this?",
            "output": row["messages"][1]["content"],
            "images": row["images"],
        }
        for row in digits
    ]
    check(alpaca, {"formatting": "alpaca", "images": "images"})
    # absolute paths, and paths from the working directory as published sets have them
    check([{**row, "images": [str(tmp_path / row["images"][0])]} for row in digits], param["attr"])
    monkeypatch.chdir(tmp_path.parent)
    check([{**row, "images": [f"./{tmp_path.name}/{row['images'][0]}"]} for row in digits], param["attr"])


def test_several_files_and_a_limit(dataset_param, tmp_path):
    second = write_jsonl(tmp_path / "more.jsonl", [TEXT_ROW] * 3)
    param = dataset_param()
    param["basic_parameters"]["dataset"] += f",{second}"
    assert len(build_mm_dataset(param)) == 11
    param["basic_parameters"]["max_samples"] = 9
    dataset = build_mm_dataset(param)
    assert len(dataset) == 9 and torch.equal(
        dataset[8]["labels"], build_mm_dataset(dataset_param([TEXT_ROW]))[0]["labels"]
    )


def test_validation_set_and_split(dataset_param, tmp_path):
    valid_file = write_jsonl(tmp_path / "valid.jsonl", [TEXT_ROW] * 5)
    train, valid = build_mm_dataset(dataset_param(val_dataset=str(valid_file), val_max_samples=2))
    assert (len(train), len(valid)) == (8, 2)

    one, two, other = (train.train_test_split(test_size=0.25, seed=seed) for seed in (1, 1, 2))
    assert {name: len(part) for name, part in one.items()} == {"train": 6, "test": 2}
    numbers = [[row["row"] for part in split.values() for row in part.rows] for split in (one, two, other)]
    assert numbers[0] == numbers[1] != numbers[2] and sorted(numbers[0]) == list(range(1, 9))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.ranks)])
def test_position_is_restored_exactly_across_epochs(workers, dataset_param):
    dataset = build_mm_dataset(dataset_param())

    def iterator():
        return build_iterations(build_mm_dataloader(dataset, {"batch_size": 2, "num_workers": workers, "seed": 7}))[0]

    straight = iterator()
    batches = [next(straight) for _ in range(11)]
    epochs = [sorted(chain(*(answers(b, dataset) for b in batches[n : n + 4]))) for n in (0, 4)]
    assert epochs[0] == epochs[1] and not equal(batches[0], batches[4])
    for stop in (3, 6):
        first = iterator()
        for _ in range(stop):
            next(first)
        second = iterator()
        second.load_state_dict(first.state_dict())
        assert all(equal(next(second), batch) for batch in batches[stop:])


def test_a_data_set_can_be_sent_to_a_spawned_worker(dataset_param):
    dataset = build_mm_dataset(dataset_param())
    loader = build_mm_dataloader(
        pickle.loads(pickle.dumps(dataset)).train_test_split(test_size=0.5, seed=1)["train"], {"batch_size": 4}
    )
    again = pickle.loads(pickle.dumps(loader.dataset))
    assert len(again) == 4 and equal(again[1], dataset.train_test_split(test_size=0.5, seed=1)["train"][1])


def test_the_seed_decides_the_order(dataset_param):
    dataset = build_mm_dataset(dataset_param())
    first = {
        seed: next(iter(build_mm_dataloader(dataset, {"batch_size": 4, "seed": seed})))["labels"] for seed in (1, 2)
    }
    again = next(iter(build_mm_dataloader(dataset, {"batch_size": 4, "seed": 1, "num_workers": 2})))["labels"]
    assert torch.equal(first[1], again) and not torch.equal(first[1], first[2])


def test_sampler_names(dataset_param):
    dataset = build_mm_dataset(dataset_param())

    def order(**values) -> list[list[int]]:
        return list(build_mm_dataloader(dataset, {"batch_size": 2, **values}).batch_sampler)

    in_order = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert order(sampler_type="SequentialSampler", shuffle=False) == in_order
    for values in ({"sampler_type": "BaseRandomBatchSampler"}, {"sampler_type": "stateful_distributed_sampler"},
                   {"dataloader_mode": "base"}):  # fmt: skip
        assert order(**values, shuffle=True) != in_order == order(**values, shuffle=False)


@pytest.mark.parametrize(
    "name", ["qwen2vl", "qwen3vl", "glm4v_moe", "internvl", "deepseekvl2", "qwen3omni", "llm_pretrain"]
)
def test_the_published_names_of_collators_pad_alike(name, dataset_param):
    dataset = build_mm_dataset(dataset_param())
    named, plain = (
        next(iter(build_mm_dataloader(dataset, {"batch_size": 2, "shuffle": False, "collate_param": param})))
        for param in ({"model_name": name, "pad_id": 5, "ignore_pad_token_for_loss": False}, {"pad_id": 5})
    )
    ignored = plain["labels"].masked_fill(plain["attention_mask"] == 0, 5)
    assert equal({**plain, "labels": ignored}, named)


def test_a_data_set_of_the_user(dataset_param):
    loader = build_mm_dataloader(
        TensorDataset(torch.arange(8)), {"batch_size": 4, "shuffle": False}, consumed_samples=4
    )
    assert [batch[0].tolist() for batch in loader] == [[4, 5, 6, 7]]
    assert [batch[0].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(loader) == 2


def test_keys_without_effect_are_named_once(dataset_param, capsys):
    param = dataset_param(overwrite_cache=True, tool_format="qwen")
    param["preprocess_parameters"]["video_resolution"] = 64
    build_mm_dataset(param)
    said = capsys.readouterr().out
    assert said.count("no effect") == 3 and "tool_format: no effect, because tools are written as" in said
    build_mm_dataset(dataset_param())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "values",
    [
        {"max_seq_len": 160},
        {"sampler_type": "LengthGroupedSampler"},
        {"use_data_balance": True, "global_batch_size": 4},
    ],
)
def test_batches_that_lengths_decide(values, dataset_param, tmp_path):
    text = [
        {"messages": [*TEXT_ROW["messages"][:1], {"role": "assistant", "content": f"{n} is" * n}]} for n in range(1, 9)
    ]
    dataset = build_mm_dataset(dataset_param([*save_digits(tmp_path), *text]))
    assert dataset.sizes[:, 0].tolist() == [len(dataset[n]["input_ids"]) for n in range(16)]
    batches = list(build_mm_dataloader(dataset, {"batch_size": 1, **values}))
    expected = [*(f"The answer is {n}." for n in range(8)), *(f"{n} is" * n for n in range(1, 9))]
    assert sorted(texts(batches, dataset)) == sorted(expected)
    if "max_seq_len" in values:
        assert max(batch["input_ids"].numel() for batch in batches) <= 160
        assert max(len(batch["input_ids"]) for batch in batches) > 1 and len(batches) < 12
    else:
        assert len(batches) == 16


def texts(batches, dataset) -> list[str]:
    return [answer for batch in batches for answer in answers(batch, dataset)]


def test_a_mixture_of_files(dataset_param, tmp_path):
    more = write_jsonl(tmp_path / "more.jsonl", [TEXT_ROW] * 3)
    param = dataset_param()
    digits = param["basic_parameters"].pop("dataset")
    sources = [{"dataset": digits, "repeat_time": 0.5}, {"dataset": str(more), "repeat_time": 2}]
    param["basic_parameters"]["mixture"] = sources
    dataset = build_mm_dataset(param)
    loader = build_mm_dataloader(dataset, {"batch_size": 2, "num_workers": 1})
    assert sorted(texts(loader, dataset)) == [*(f"The answer is {n}." for n in range(4)), *["world, " * 9] * 6]
    assert dataset.where(8) == f"{more}:1" and torch.equal(dataset.question(8).answer, dataset.question(10).answer)
    split = dataset.train_test_split(test_size=0.3, seed=1)
    assert [len(split["train"]), len(split["test"])] == [7, 4]

    for source, weight in zip(sources, (1, 4), strict=True):
        source["weight"] = weight
    dataset = build_mm_dataset(param)
    found = texts(build_mm_dataloader(dataset, {"batch_size": 2}), dataset)
    assert len(found) == 10 and found.count("world, " * 9) == 8
    sources[0]["weight"] = 0.1
    with pytest.raises(UserError, match=r"mixture\.0\.weight: 0\.1 beside the others is not one of the 10 rows"):
        build_mm_dataset(param)
    sources[0]["weight"] = float("inf")
    with pytest.raises(UserError, match=r"mixture\[0\]\.weight: "):
        build_mm_dataset(param)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.ranks)])
def test_a_stream_of_files(workers, dataset_param, tmp_path):
    more = write_jsonl(tmp_path / "more.jsonl", [TEXT_ROW] * 3)
    param = dataset_param(streaming=True)
    param["basic_parameters"]["dataset"] += f",{more}"
    dataset = build_mm_dataset(param)
    loader = {"batch_size": 1, "global_batch_size": 2, "num_workers": workers, "drop_last": False}

    def iterator(**values):
        return build_iterations(build_mm_dataloader(dataset, {**loader, **values}))[0]

    in_order = [*(f"The answer is {n}." for n in range(8)), *["world, " * 9] * 3]
    straight = iterator(shuffle=False)
    assert texts((next(straight) for _ in range(22)), dataset) == in_order * 2
    assert straight.samples_at(straight.place) == [f"{more}:3"]
    shuffled = iterator()
    epochs = [texts((next(shuffled) for _ in range(11)), dataset) for _ in range(3)]
    assert all(sorted(epoch) == in_order for epoch in epochs) and len({str(epoch) for epoch in epochs}) == 3
    first, again = iterator(), iterator()
    for _ in range(14):
        next(first)
    again.load_state_dict(first.state_dict())
    assert texts((next(again) for _ in range(8)), dataset) == epochs[1][3:]
    assert texts(again.one_pass(), dataset) == in_order


def test_a_stream_of_hugging_face_datasets():
    import datasets

    def numbers(shards):
        yield from ({"id": number} for shard in shards for number in shard)

    rows = datasets.IterableDataset.from_generator(numbers, gen_kwargs={"shards": [[0, 1, 2], [3, 4, 5, 6]]})
    loader = {"batch_size": 2, "shuffle": False, "drop_last": False, "num_workers": 1}
    straight, again = (build_iterations(build_mm_dataloader(rows, loader))[0] for _ in range(2))
    found = [next(straight)["id"].tolist() for _ in range(5)]
    assert found == [[0, 1], [2, 3], [4, 5], [6, 0], [1, 2]]
    again.load_state_dict(straight.state_dict())
    assert again.loader.batch_sampler.rank == 0 and next(again)["id"].tolist() == [3, 4]


def micro_batches_of_this_rank(num_samples: int) -> list[list[int]]:
    loader = build_mm_dataloader(TensorDataset(torch.arange(num_samples)), {"batch_size": 2}, dist.group.WORLD)
    return [batch[0].tolist() for batch in loader]


def test_two_ranks_share_the_order_of_one(ranks2):
    one, two = ranks2.run(micro_batches_of_this_rank, 12)
    alone = build_mm_dataloader(TensorDataset(torch.arange(12)), {"batch_size": 4})
    assert [a + b for a, b in zip(one, two, strict=True)] == [batch[0].tolist() for batch in alone]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_a_collate_fn_reports_is_raised_as_it_is(workers):
    def collate(samples: list) -> dict:
        if any(sample[0] == 2 for sample in samples):
            raise UserError("collate: sample 2 has no label; add one")
        return {"numbers": torch.stack([sample[0] for sample in samples])}

    dataset = TensorDataset(torch.arange(4))
    sampler = build_mm_dataloader(dataset, {"batch_size": 1, "shuffle": False}).batch_sampler
    batches = iter(MultiModalDataLoader(dataset, sampler, collate, num_workers=workers))
    assert [next(batches)["numbers"].tolist() for _ in range(2)] == [[0], [1]]
    with pytest.raises(UserError) as raised:
        next(batches)
    assert str(raised.value) == "collate: sample 2 has no label; add one"
