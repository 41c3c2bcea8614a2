"""Rows in the layouts that data sets come in: all that mean the same give the same samples."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm.data import build_mm_dataset
from mindspeed_mm.data.encoding import ConversationEncoder, EncodingOptions
from mindspeed_mm.data.formats import FORMATS, register_format
from mindspeed_mm.errors import UserError
from tests.data.tiny import save_digits, save_tiny_processor, write_jsonl


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def labelled(sample: dict, tokenizer: Any) -> str:
    return tokenizer.decode(sample["labels"][sample["labels"] >= 0])


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows({key: json.dumps(value) for key, value in row.items()} for row in rows)


WRITERS = {
    ".jsonl": write_jsonl,
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".parquet": write_parquet,
    ".csv": write_csv,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_samples(kind, dataset_param, tmp_path):
    digits = save_digits(tmp_path)
    expected = build_mm_dataset(dataset_param(digits))
    folder = tmp_path / "many"
    folder.mkdir()
    WRITERS[kind](folder / f"b{kind}", digits[3:])
    WRITERS[kind](folder / f"a{kind}", digits[:3])
    for source in (f"{folder}/a{kind},{folder}/b{kind}", str(folder), f"{folder}/?{kind}", f"{tmp_path}/**/[ab]{kind}"):
        found = build_mm_dataset(dataset_param(digits, dataset=source))
        assert len(found) == 8 and all(equal(found[n], expected[n]) for n in range(8)), source
    row = 1 if kind != ".jsonl" else "1"
    assert found.where(3) == (f"{folder}/b{kind}:{row}" if kind == ".jsonl" else f"{folder}/b{kind}: row {row}")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_may_hold_the_pictures_themselves(streaming, dataset_param, tmp_path):
    digits = save_digits(tmp_path)
    expected = build_mm_dataset(dataset_param(digits))
    # As Hugging Face's datasets writes a column of images: the content of each, or its name alone.
    rows = [
        {**row, "images": [{"bytes": (tmp_path / row["images"][0]).read_bytes(), "path": "0.png"}]} for row in digits
    ]
    rows[6]["images"] = [{"bytes": None, "path": "images/6.png"}]
    write_parquet(tmp_path / "many.parquet", rows[:7])
    write_parquet(tmp_path / "one.parquet", [{**rows[7], "images": rows[7]["images"][0]}])
    for _ in range(2):  # the second time all pictures are there
        source = f"{tmp_path}/many.parquet,{tmp_path}/one.parquet"
        param = dataset_param(digits, dataset=source, cache_dir=str(tmp_path / "cache"), streaming=streaming)
        dataset = build_mm_dataset(param)
        found = [dataset[row] for row in (dataset.once() if streaming else range(8))]
        assert len(found) == 8 and all(equal(one, other) for one, other in zip(found, expected, strict=True))
        pictures = [path for path in (tmp_path / "cache" / "media").rglob("*") if path.is_file()]
        assert len(pictures) == 7
        pictures[0].write_bytes(b"")  # of a host that has lost power
    (tmp_path / "file").touch()
    param = dataset_param(digits, dataset=source, cache_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/.*: the cache of prepared samples cannot be written: .*cache_dir"):
        build_mm_dataset(param)


def test_what_is_hidden_in_a_folder_is_not_read(dataset_param, tmp_path):
    digits = save_digits(tmp_path)
    for name in (".ipynb_checkpoints/a.jsonl", "a.jsonl", ".a.jsonl", "b/.cache/a.jsonl"):
        (tmp_path / "many" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "many" / name, digits[:2])
    assert len(build_mm_dataset(dataset_param(digits, dataset=str(tmp_path / "many")))) == 2


def test_a_folder_or_pattern_without_files_is_named(dataset_param, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, problem in (("empty", "the folder has no data files"), ("*.jsonlines", "no file fits this pattern")):
        with pytest.raises(UserError, match=f"{re.escape(source)}: {problem}"):
            build_mm_dataset(dataset_param(dataset=str(tmp_path / source)))
    (tmp_path / "a.jsonx").write_text("{}")
    with pytest.raises(UserError, match=r"a\.jsonx: cannot read this kind of file; use one of .*Did you mean '\.json"):
        build_mm_dataset(dataset_param(dataset=str(tmp_path / "a.jsonx")))


def test_rows_of_tables_that_cannot_be_read_are_named(dataset_param, tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\nhello,world\nhello\n")
    attr = {"formatting": "alpaca"}
    with pytest.raises(UserError, match=r"a\.csv: row 2: 1 fields, the header names 2 columns"):
        build_mm_dataset({**dataset_param(dataset=str(tmp_path / "a.csv")), "attr": attr})
    (tmp_path / "a.csv").write_text("instruction,output,output\nhello,world,you\n")
    with pytest.raises(UserError, match=r"a\.csv: the header names column 'output' twice"):
        build_mm_dataset({**dataset_param(dataset=str(tmp_path / "a.csv")), "attr": attr})
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet after row 0"):
        build_mm_dataset(dataset_param(dataset=str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_no_row_has_is_an_error(streaming, dataset_param, tmp_path):
    """A row, or a file of several, may be without it."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}, {"messages": turns, "prompt": "Be brief.", "functions": None}]
    for names, problem in (
        ({"system": "promt"}, r"attr\.system: no row has a column 'promt'; the first has 'messages'"),
        ({"tools": "tools"}, r"attr\.tools: no row has a column 'tools'; the first has 'messages'"),
        ({"system": "prompt", "tools": "functions"}, None),
    ):
        param = dataset_param(rows, family="text", streaming=streaming, cache_dir=str(tmp_path / "cache"))
        param["attr"] = {**param["attr"], **names}
        for _ in range(2):  # the second time the rows may come from the cache
            if problem is None:
                build_mm_dataset(param)
            else:
                with pytest.raises(UserError, match=problem):
                    build_mm_dataset(param)


def test_cells_are_text_where_text_is_meant(dataset_param, tmp_path):
    answers = ["[2, 3, 5]", '{"primes": [2]}', "[]", 'a "b", \nc']
    lines = ["", "instruction,output,history", *(f'list them,"{a.replace(chr(34), chr(34) * 2)}",' for a in answers)]
    (tmp_path / "a.csv").write_text(
        "\r\n\r\n".join([*lines, 'x,y,"[[""q"", ""a""]]"', "", ""])
    )  # empty lines are no rows
    param = {**dataset_param(family="text", dataset=str(tmp_path / "a.csv")), "attr": {"formatting": "alpaca"}}
    dataset = build_mm_dataset(param)
    learnt = [labelled(dataset[n], dataset.encoder.tokenizer) for n in range(len(dataset))]
    assert learnt == [*(f"{a}<|im_end|>" for a in answers), "a<|im_end|>y<|im_end|>"]


def test_plain_text_is_learnt_whole(dataset_param, tmp_path):
    texts = ["A story.\nIt goes on.", "Another <image> in words"]
    (tmp_path / "a.txt").write_text("One line.\n\nAnother line.\n")
    sources = {
        str(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])): (["text"], texts),
        str(write_jsonl(tmp_path / "b.jsonl", [{"story": text} for text in texts[:1]])): (["story"], texts[:1]),
        str(tmp_path / "a.txt"): ([], ["One line.", "Another line."]),
    }
    for source, (prompt, expected) in sources.items():
        param = dataset_param(family="text", dataset=source)
        param["attr"] = {"formatting": "alpaca", "pretrain": True, **({"prompt": prompt[0]} if prompt else {})}
        if "<image>" in "".join(expected):
            with pytest.raises(UserError, match=r"a\.jsonl:2: 1 <image> placeholder"):
                build_mm_dataset(param)
            continue
        dataset = build_mm_dataset(param)
        for number, text in enumerate(expected):
            sample = dataset[number]
            assert labelled(sample, dataset.encoder.tokenizer) == text + "<|im_end|>"
            assert torch.equal(sample["labels"], sample["input_ids"])


def test_text_with_images_to_continue(dataset_param, tmp_path):
    save_digits(tmp_path)
    row = {"text": "Look: <image> is a digit.", "pictures": ["images/3.png"]}
    param = dataset_param([row])
    param["attr"] = {"pretrain": True, "images": "pictures"}
    dataset = build_mm_dataset(param)
    sample = dataset[0]
    tokenizer = dataset.encoder.tokenizer
    text = tokenizer.decode(sample["input_ids"]).replace("<|image_pad|>", "")
    assert text == "Look: <|vision_start|><|vision_end|> is a digit.<|im_end|>"
    pads = sample["input_ids"] == dataset.encoder.processor.image_token_id
    assert int(pads.sum()) == 16 and torch.equal(sample["labels"] < 0, pads)


# Calls of functions as Qwen's and GLM's published templates write them, marked for the judge's mask.
TOOLS = """{%- if tools %}<|im_start|>system
{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}<|im_end|>
{% endif %}{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
WEATHER = {"name": "weather", "description": "of a place", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "weather", "arguments": {"place": "Bern"}}
TOOL_ROWS = {
    # as LLaMA-Factory has them: a call is JSON text, tools are JSON text in a column
    "sharegpt": {
        "tools": json.dumps([WEATHER]),
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": '{"rain": true}'},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    # as OpenAI's interface has them
    "openai": {
        "tools": [{"type": "function", "function": WEATHER}],
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "gpt", "value": None,
             "tool_calls": [{"function": {"name": "weather", "arguments": '{"place": "Bern"}'}}]},
            {"from": "observation", "value": '{"rain": true}'},
            {"from": "gpt", "value": "Yes."},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", TOOL_ROWS)
def test_calls_of_functions_are_learnt_and_their_results_are_not(layout, dataset_param, tmp_path):
    tokenizer = save_tiny_processor("text", tmp_path / "tools", chat_template=TOOLS)
    param = dataset_param([TOOL_ROWS[layout]])
    param["preprocess_parameters"]["model_name_or_path"] = str(tmp_path / "tools")
    param["attr"] = {"tools": "tools"}
    sample = build_mm_dataset(param)[0]
    judge = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": '{"rain": true}'},
            {"role": "assistant", "content": "Yes."},
        ],
        tools=[{"type": "function", "function": WEATHER}],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert sample["input_ids"].tolist() == judge["input_ids"]
    assert (sample["labels"] >= 0).int().tolist() == judge["assistant_masks"]
    assert '"weather"' in tokenizer.decode(sample["input_ids"]).partition("<|im_end|>")[0]


def test_a_template_that_leaves_out_tools_is_refused(dataset_param, tmp_path):
    row = TOOL_ROWS["sharegpt"]
    param = dataset_param([row], family="text")
    param["attr"] = {"tools": "tools"}
    with pytest.raises(UserError, match=r"data\.jsonl:1: the model's chat template does not print a tool 'weather'"):
        build_mm_dataset(param)[0]
    param["attr"] = {}
    with pytest.raises(UserError, match=r"does not print message 2: the call of 'weather'"):
        build_mm_dataset(param)[0]


def test_a_format_of_the_user(dataset_param, tmp_path):
    expected = build_mm_dataset(dataset_param())[5]

    @register_format("question-and-answer")
    def read(row, attr):
        turns = [{"role": "user", "content": "<image>\n" + row["q"]}, {"role": "assistant", "content": row["a"]}]
        return {"messages": turns, "images": [f"images/{row['file']}"]}

    try:
        rows = [{"q": "What digit is this?", "a": "The answer is 5.", "file": "5.png"}, {"q": 1}]
        param = dataset_param(rows, max_samples=1)
        param["attr"] = {"formatting": "question-and-answer"}
        assert equal(build_mm_dataset(param)[0], expected)
        del param["basic_parameters"]["max_samples"]
        problem = (
            r"data\.jsonl:2: the format 'question-and-answer' cannot read this row: TypeError: can only concatenate"
        )
        with pytest.raises(UserError, match=problem):
            build_mm_dataset(param)
        with pytest.raises(UserError, match="there is a format of that name"):
            register_format("question-and-answer")(lambda row, attr: {})
    finally:
        del FORMATS["question-and-answer"]
    with pytest.raises(UserError, match=r"attr\.formatting: 'question-and-answer' is not known; use one of sharegpt"):
        build_mm_dataset(param)


@pytest.mark.parametrize(("name", "thinking"), [("qwen3_vl", True), ("qwen3_vl_nothink", False), ("default", True)])
def test_documented_template_names_mean_the_template_of_the_model(name, thinking, dataset_param):
    dataset = build_mm_dataset(dataset_param(template=name))
    assert dataset.encoder.options.enable_thinking is thinking
    assert equal(dataset[0], build_mm_dataset(dataset_param())[0])


def test_templates_that_are_not_known_and_templates_in_a_file(dataset_param, tmp_path, processor_folder):
    with pytest.raises(UserError, match=r"template: 'qwen3_v' is not known.*Did you mean 'qwen3_vl'"):
        build_mm_dataset(dataset_param(template="qwen3_v"))
    with pytest.raises(UserError, match=r"template: no file '.*none\.jinja'"):
        build_mm_dataset(dataset_param(template=str(tmp_path / "none.jinja")))
    (tmp_path / "own.jinja").write_text(TOOLS)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    dataset = build_mm_dataset(dataset_param([row], family="text", template=str(tmp_path / "own.jinja")))
    options = EncodingOptions(str(processor_folder("text")))
    assert equal(dataset[0], ConversationEncoder(options).encode(row, "row"))
    assert dataset.encoder.tokenizer.chat_template == TOOLS


def multimodal(folder: Path, processor: Path, **keys: Any) -> dict[str, Any]:
    rows = [
        {
            "id": n,
            "image": Path(row["images"][0]).name,
            "conversations": [
                {"from": ("human", "gpt")[k], "value": turn["content"]} for k, turn in enumerate(row["messages"])
            ],
        }
        for n, row in enumerate(save_digits(folder))
    ]
    write_jsonl(folder / "a.jsonl", rows[:6])
    write_jsonl(folder / "b.jsonl", [*rows[6:], {"conversations": TEXT}])
    return {
        "dataset_type": "multimodal",
        "basic_parameters": [
            {"data_path": str(folder / "a.jsonl"), "data_folder": str(folder / "images"), "repeat_time": 0.5},
            {"data_path": str(folder / "b.jsonl"), "data_folder": str(folder / "images"), "repeat_time": 2},
        ],
        "preprocess_parameters": {"image_reader_type": "torchvision", "train_pipeline": {"image": []}},
        "tokenizer_config": {"from_pretrained": str(processor)},
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 3,
        "image_size": 448,
        **keys,
    }


TEXT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def test_rows_and_keys_of_internvl(dataset_param, processor_folder, tmp_path, capsys):
    processor = processor_folder("internvl")
    dataset = build_mm_dataset(multimodal(tmp_path, processor))
    assert "image_size, preprocess_parameters.image_reader_type" in capsys.readouterr().out
    param = dataset_param(family="internvl")
    param["preprocess_parameters"] |= {"crop_to_patches": True, "max_patches": 3, "image_max_pixels": 2**31}
    expected = build_mm_dataset(param)
    # Half of the first six, twice the other two and a row of text.
    assert [len(part) for part in dataset.parts] == [6, 3] and sum(share.per_epoch for share in dataset.shares) == 9
    assert all(equal(dataset[n], expected[n]) for n in range(8))
    assert labelled(dataset[8], dataset.encoder.tokenizer) == "Hello<|im_end|>"
    one = build_mm_dataset(multimodal(tmp_path, processor, dynamic_image_size=False))
    assert len(one[0]["pixel_values"]) == 1


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"group_by_length": True}, r"dataset_param\.group_by_length: True is not available; set dataloader_param"),
        ({"use_thumbnail": False}, r"dataset_param\.use_thumbnail: False is not available; .* set it to true"),
        ({"template_name": "internvl3"}, r"template: 'internvl3' is not known.*Did you mean 'internvl'"),
    ],
)
def test_keys_of_internvl_that_would_change_the_samples_are_refused(keys, problem, processor_folder, tmp_path):
    with pytest.raises(UserError, match=problem):
        build_mm_dataset(multimodal(tmp_path, processor_folder("internvl"), **keys))
