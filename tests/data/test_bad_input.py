"""Mistakes of a user: each is one UserError that names file, row, value and fix, before the first step."""

from __future__ import annotations

import json
import re
from datetime import datetime

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data import build_mm_dataloader, build_mm_dataset
from mindspeed_mm.errors import UserError


def row(*contents: str, images: object = (), **more) -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"images": list(images) if isinstance(images, tuple) else images, "messages": messages, **more}


GOOD = row("hello", "world")


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


ROWS = {
    "an image that does not exist": (
        row("<image>", "x", images=("images/none.png",)),
        r"image 'images/none.png' not found in .*; check the path and basic_parameters.dataset_dir",
    ),
    "an image above the folder": (
        row("<image>", "x", images=("../a.png",)),
        r"image '../a.png' is outside the data folder",
    ),
    "an absolute path elsewhere": (
        row("<image>", "x", images=("/etc/hostname",)),
        r"'/etc/hostname' is outside the data",
    ),
    "too few files": (
        row("<image><image>", "x", images=("images/0.png",)),
        r"2 <image> placeholder\(s\) .* but 1 file\(s\)",
    ),
    "too many files": (row("no mark", "x", images=("images/0.png",)), r"0 <image> placeholder\(s\) .* but 1 file\(s\)"),
    "a file name that is a number": (row("<image>", "x", images=(3,)), r"column 'images' must be a list of file names"),
    "two user turns": (turns("user", "user"), r"message 2 is from 'user', expected 'assistant'; turns must alternate"),
    "an assistant first": (turns("assistant", "user"), r"message 1 is from 'assistant', expected 'user'"),
    "a late system turn": (turns("user", "system"), r"message 2 is from 'system', expected 'assistant'"),
    "no answer": (turns("system", "user"), r"must end with an assistant turn, found system user"),
    "no turn": (turns(), r"must end with an assistant turn, found no turn"),
    "an unknown tag": (turns("user", "asistant"), r"message 2: unknown role 'asistant'; .* Did you mean 'assistant'\?"),
    "a tool first": (turns("observation", "assistant"), r"message 1 is from 'tool', expected 'user'"),
    "a tool's answer last": (turns("user", "assistant", "observation"), r"must end with an assistant turn, found user"),
    "a call that is no call": (turns("user", "function_call"), r"message 2: a call of a function is not JSON"),
    "a NUL character": (row("a\0b", "x"), r"message 1 has a NUL character"),
    "half a surrogate pair": (row("a\ud800b", "x"), r"message 1 is not UTF-8 text at character 1"),
    "a file name with a NUL": (row("<image>", "x", images=("a\0.png",)), r"image 'a\\x00.png' not found"),
    "a content that is not text": (
        {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]},
        r"message 1: 'content' must be text, found 3",
    ),
    "a message without content": (
        {"messages": [{"role": "user", "contents": ""}]},
        r"no column 'content' .*Did you mean",
    ),
    "messages that are text": ({"messages": "hello"}, r"column 'messages' must be a list of objects, found 'hello'"),
    "a missing column": ({"message": []}, r"no column 'messages' \(attr.messages\).* Did you mean 'message'\?"),
    "a file name in no encoding": (row("<image>", "x", images=("a\udcff.png",)), r"image 'a\\udcff.png' is not UTF-8"),
    "a file name that is empty": (row("<image>", "x", images=("",)), r"image '' "),
    "a row that is a list": ([1], r"a row must be a JSON object, found list"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named_with_file_and_line(name, dataset_param, tmp_path):
    bad, problem = ROWS[name]
    param = dataset_param([GOOD, GOOD, bad])
    with pytest.raises(UserError, match=r"data\.jsonl:3: .*" + problem):
        build_mm_dataset(param)
    (tmp_path / "data.jsonl").write_text(json.dumps([GOOD, bad]))
    with pytest.raises(UserError, match=r"data\.jsonl: row 2: .*" + problem):
        build_mm_dataset(param)


def test_an_answer_that_is_null_is_named(dataset_param):
    param = dataset_param([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}])
    param["attr"] = {"formatting": "alpaca"}
    with pytest.raises(UserError, match=r"data\.jsonl:2: column 'output' must be text, found None"):
        build_mm_dataset(param)


def test_a_name_that_is_null_is_named(dataset_param):
    for key in ("messages", "role_tag", "content_tag"):
        param = dataset_param([GOOD])
        param["attr"] = {**param["attr"], key: None}
        with pytest.raises(UserError, match=rf"attr\.{key} is null; set it to one of "):
            build_mm_dataset(param)


@pytest.mark.parametrize("keep", [True, False])
def test_a_tool_with_a_date_is_named(keep, dataset_param, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tools = [{"name": "f", "since": datetime(2020, 1, 1)}]
    pq.write_table(pa.Table.from_pylist([{**GOOD, "tools": None}, {**GOOD, "tools": tools}]), tmp_path / "a.parquet")
    param = dataset_param(dataset=str(tmp_path / "a.parquet"))
    param["attr"] = {**param["attr"], "tools": "tools"}
    if keep:
        param |= {"on_bad_sample": "quarantine", "bad_sample_budget": 1, "quarantine_folder": str(tmp_path)}
        assert len(build_mm_dataset(param).bad_rows()) == 1
    else:
        with pytest.raises(UserError, match=r"a\.parquet: row 2: tools and calls of functions must be JSON values"):
            build_mm_dataset(param)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", r"data\.jsonl: the data file is empty"),
        (b" \n\n", r"data\.jsonl: the data file is empty"),
        (b"[]", r"data\.jsonl: holds no rows"),
        (b'{"messages": []\n', r"data\.jsonl:1: broken JSON: .*; each line must hold one object"),
        (json.dumps(GOOD).encode() + b"\n\n{oops}\n", r"data\.jsonl:3: broken JSON: .* \(column 2\)"),
        (b'[\n{"messages": []},\n{oops}]', r"data\.jsonl:3: broken JSON"),
        (b'{"messages": "\xff"}', r"data\.jsonl:1: not UTF-8 text .*save the file as UTF-8"),
        (
            b'[{"messages": [{"role": "user", "content": "\xff"}, {"role": "assistant", "content": ""}]}]',
            r"data\.jsonl: row 1: message 1 is not UTF-8 text at character 0",
        ),
        (b"[" * 100000, r"data\.jsonl: broken JSON: .*recursion"),
        (b'{"messages": ' + b"[" * 100000, r"data\.jsonl:1: broken JSON: .*recursion"),
        (b'{"messages": 1' + b"0" * 5000 + b"}", r"data\.jsonl:1: broken JSON: .*integer"),
        (b"\xef\xbb\xbf{}", r"data\.jsonl:1: no column 'messages'"),
        (b"id,text\n1,hello\n", r"data\.jsonl:1: not JSON: starts with 'id,text.* expected one object per line"),
    ],
)
def test_a_bad_file_is_named(content, problem, dataset_param, tmp_path):
    param = dataset_param()
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        build_mm_dataset(param)


def test_a_missing_file_is_named(dataset_param):
    with pytest.raises(UserError, match=r"nowhere\.json: no such data file; check basic_parameters\.dataset"):
        build_mm_dataset(dataset_param(dataset="nowhere.json"))


def mistake_in(loader) -> str:
    # Not pytest.raises: workers that its traceback keeps alive take seconds to end.
    try:
        next(iter(loader))
    except UserError as error:
        return str(error)
    raise AssertionError("no UserError")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["truncated", "not an image", "a bomb", "numbers"])
def test_an_image_that_cannot_be_decoded_is_named_by_a_worker_too(kind, workers, dataset_param, tmp_path, monkeypatch):
    param = dataset_param([row("<image>", "x", images=("images/0.png",))])
    file = tmp_path / "images" / "0.png"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-60])
    elif kind == "not an image":
        file.write_text("hello")
    elif kind == "numbers":
        Image.fromarray(np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)).save(file, format="TIFF")
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # below the 32 x 32 of the picture
    loader = build_mm_dataloader(build_mm_dataset(param), {"num_workers": workers, "batch_size": 1})
    problem = {
        "truncated": "cannot be decoded: .*replace the file",
        "numbers": r"cannot be decoded: its pixels \(mode F\) have no range",
        "not an image": "is not an image that Pillow can read; replace the file",
        "a bomb": "(has 32x32 pixels, over the limit of 600|exceeds limit of 600 pixels)",
    }[kind]
    message = mistake_in(loader)
    assert re.search(problem, message)
    assert message.startswith(f"{tmp_path}/data.jsonl:1: ") and "0.png" in message and "Traceback" not in message


def test_a_row_the_processor_refuses_is_named(dataset_param):
    dataset = build_mm_dataset(dataset_param([row("look: <|image_pad|>", "x")]))
    with pytest.raises(UserError, match=r"data\.jsonl:1: the model's processor refuses this row: .*<\|image_pad\|>"):
        dataset[0]


@pytest.mark.parametrize(
    ("section", "values", "problem"),
    [
        ("basic_parameters", {"streaming": True, "max_samples": 2}, r"max_samples needs the number of rows"),
        ("basic_parameters", {"mixture": [{"dataset": "a.jsonl"}]}, r"mixture: there is a 'dataset' beside it"),
        (
            "basic_parameters",
            {"dataset": None, "mixture": [{"dataset": "a.jsonl", "weight": 1}, {"dataset": "a.jsonl"}]},
            r"mixture: some data sets have a weight and some have not",
        ),
        ("basic_parameters", {"train_on_prompt": True, "mask_history": True}, r"contradict each other"),
        ("basic_parameters", {"dataset": None}, r"dataset_param\.basic_parameters\.dataset is required"),
        ("preprocess_parameters", {"model_name_or_path": None}, r"model_name_or_path is required"),
        ("preprocess_parameters", {"model_name_or_path": "/no"}, r"model_name_or_path: no folder '/no'"),
        ("preprocess_parameters", {"image_max_pixel": 1}, r"unknown key.* Did you mean 'image_max_pixels'"),
        ("attr", {"ranking": True}, r"attr\.ranking: True is not available"),
        ("attr", {"formatting": "shargpt"}, r"attr\.formatting: .*Did you mean 'sharegpt'"),
    ],
)
def test_keys_that_would_change_the_samples_are_refused(section, values, problem, dataset_param):
    param = dataset_param()
    param[section] = {**param[section], **values}
    with pytest.raises(UserError, match=problem):
        build_mm_dataset(param)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"dataloader_mode": "variable"}, r"dataloader_mode: 'variable' is not available yet; use 'sampler'"),
        (
            {"sampler_type": "BucketBatchSampler"},
            r"sampler_type: 'BucketBatchSampler' is not available yet; use one of",
        ),
        ({"group_frame": True}, r"group_frame: True is not available"),
        (
            {"collate_param": {"model_name": "qwen3v"}},
            r"model_name: 'qwen3v' is not available, because it is not known; .*Did you mean 'qwen3vl'",
        ),
        (
            {"collate_param": {"model_name": "qwen2vl_dpo"}},
            r"model_name: 'qwen2vl_dpo' is not available, because this version trains on no preferences; leave it out",
        ),
        ({"batch_size": 9}, r"has 8 samples, fewer than one micro batch of all ranks \(9 x 1\); lower --micro-batch"),
        ({"shufle": True}, r"shufle: unknown key.* Did you mean 'shuffle'"),
    ],
)
def test_bad_loader_keys_are_refused(values, problem, dataset_param):
    with pytest.raises(UserError, match=problem):
        build_mm_dataloader(build_mm_dataset(dataset_param()), values)
