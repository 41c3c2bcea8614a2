"""A thousand rows that nobody would write: each is trained on, or quarantined with a true reason."""

from __future__ import annotations

import json
import re
import struct
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mindspeed_mm.configs.data import HuggingFaceAttributes
from mindspeed_mm.data import build_mm_dataloader
from mindspeed_mm.data.conversations import iterate_conversations, read_conversations
from mindspeed_mm.data.datasets import ConversationDataset
from mindspeed_mm.data.encoding import IGNORE_INDEX, ConversationEncoder, EncodingOptions
from mindspeed_mm.data.formats import FORMATS
from mindspeed_mm.data.quarantine import Quarantine
from mindspeed_mm.data.rows import RowFiles
from mindspeed_mm.data.streaming import ConversationStream, Source
from tests.data.conftest import MESSAGES
from tests.data.tiny import save_digits

ROWS, EXAMPLES = 20, 50
ATTR = HuggingFaceAttributes(**MESSAGES)
ENDS = "<|im_end|>"

FIRST = (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', None)

words = st.text(st.sampled_from("abc ,.\n\t<>|{}[]\"'é漢🙂\u200b\u202e"), min_size=1, max_size=12)
answers = words.map(lambda text: "x" + text)  # not empty after stripping
picture = st.sampled_from(["images/0.png", "images/1.png", "./images/2.png"])


def message(role: str, content: Any) -> dict:
    return {"role": role, "content": content}


@st.composite
def good(draw: Any) -> dict:
    """A row that has to be trained on."""
    turns, images = [], []
    if draw(st.booleans()):
        turns.append(message("system", draw(words)))
    for _ in range(draw(st.integers(1, 3))):
        question = draw(words)
        if draw(st.booleans()):
            images.append(draw(picture))
            question = f"<image>{question}"
        turns += [message("user", question), message("assistant", draw(answers))]
    return {"messages": turns, **({"images": images} if images else {})}


def changed(row: dict, what: str, value: Any) -> dict:
    """The row with one thing wrong."""
    row = json.loads(json.dumps(row))
    if what == "role":
        row["messages"][-1]["role"] = value
    elif what == "content":
        row["messages"][-1]["content"] = value
    elif what == "question":
        row["messages"][-2]["content"] += value
    elif what == "images":
        row["images"] = row.get("images", []) + ([value] if not isinstance(value, list) else value)
        row["messages"][-2]["content"] += "<image>"
    elif what == "drop":
        del row[value]
    elif what == "last":
        del row["messages"][-1]
    return row


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
# what is wrong, with what; the reason that has to be given
WRONG: list[tuple[str, st.SearchStrategy, str]] = [
    ("role", st.text(max_size=6).filter(lambda s: s != "assistant"), r"unknown role|is from|end with an assistant"),
    ("role", st.none() | st.integers() | st.lists(st.integers(), max_size=2), r"unknown role"),
    ("content", anything.filter(lambda value: not isinstance(value, str)), r"'content' must be text"),
    ("content", st.just("a\0b"), r"NUL character"),
    ("content", st.just("a\udfffb"), r"not UTF-8 text"),
    ("question", st.just("<|image_pad|>"), r"processor refuses this row: .*image_pad"),
    ("question", st.just("<image>"), r"placeholder\(s\) in the messages but"),
    ("images", st.text(max_size=300), r"not found in|outside the data folder"),
    ("images", st.sampled_from(["../../etc/passwd", "/etc/passwd", "images/../../x.png"]), r"outside the data folder"),
    ("images", st.sampled_from(["broken/text.png", "broken/empty.png"]), r"is not an image"),
    ("images", st.just("broken/cut.png"), r"cannot be decoded"),
    ("images", st.just("broken/bomb.png"), r"has 40000x40000 pixels, over the limit|exceeds limit of \d+ pixels"),
    ("images", st.just("broken/thin.png"), r"processor refuses this row: .*aspect ratio"),
    ("images", st.just("images"), r"not found in"),
    ("images", st.just([3]), r"must be a list of file names"),
    ("drop", st.just("messages"), r"no column 'messages'"),
    ("last", st.none(), r"must end with an assistant"),
]  # fmt: skip


@st.composite
def lines(draw: Any) -> tuple[bytes, str | None]:
    """A line of a file, and the reason why it is bad: none for a good one, "" where any will do."""
    kind = draw(st.integers(0, 9))
    if kind < 4:
        return json.dumps(draw(good()), ensure_ascii=draw(st.booleans())).encode(), None
    if kind < 8:
        what, value, reason = draw(st.sampled_from(WRONG))
        return json.dumps(changed(draw(good()), what, draw(value))).encode(), reason
    if kind == 8:
        return json.dumps(draw(anything)).encode(), "must be a JSON object|no column 'messages'"
    row = json.dumps(draw(good())).encode()
    at = draw(st.integers(1, len(row) - 1))
    cut = draw(st.sampled_from([row[:at], row[:at] + b"\xff" + row[at:], b"[" * 5000 + row, b"\xc3\x28" + row]))
    return cut, "broken JSON|not UTF-8"


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory, processor_folder):
    from PIL import Image

    folder = tmp_path_factory.mktemp("fuzz")
    save_digits(folder)
    (folder / "broken").mkdir()
    whole = (folder / "images" / "0.png").read_bytes()
    (folder / "broken" / "cut.png").write_bytes(whole[:-40])
    (folder / "broken" / "text.png").write_text("hello")
    (folder / "broken" / "empty.png").write_bytes(b"")
    header = b"IHDR" + struct.pack(">II", 40000, 40000) + whole[24:29]  # of a small file: it says that it is huge
    bomb = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    (folder / "broken" / "bomb.png").write_bytes(bomb)
    Image.new("RGB", (3000, 2)).save(folder / "broken" / "thin.png")
    encoder = ConversationEncoder(EncodingOptions(str(processor_folder("qwen3_vl"))))
    return SimpleNamespace(folder=folder, encoder=encoder, seen=[])


def reasons(path: Path, file: Path) -> dict[int, str]:
    """What was listed of each row of ``file``, once."""
    entries = [json.loads(line) for line in path.open()] if path.exists() else []
    assert all(entry["file"] == str(file) for entry in entries)
    assert len({entry["row"] for entry in entries}) == len(entries)
    return {entry["row"]: entry["reason"] for entry in entries}


@seed(1)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # of 20 rows it is plain which one failed
)
@given(st.lists(lines(), min_size=ROWS, max_size=ROWS))
def test_a_thousand_rows(fuzzed, batch):
    file = fuzzed.folder / "rows.jsonl"
    batch = [FIRST, *batch]  # what kind of file it is shows in its first row
    file.write_bytes(b"\n".join(line for line, _ in batch))
    (fuzzed.folder / "quarantine.jsonl").unlink(missing_ok=True)
    files = RowFiles([file])
    table = read_conversations(files, FORMATS["sharegpt"], ATTR, fuzzed.folder, keep_bad=True)
    dataset = ConversationDataset(table, files, fuzzed.encoder, Quarantine(fuzzed.folder, ROWS, ROWS))
    batches = list(build_mm_dataloader(dataset, {"batch_size": 1, "shuffle": False}))
    assert len(batches) == len(batch)  # none is dropped

    listed = reasons(dataset.quarantine.path, file)
    for number, ((line, reason), got) in enumerate(zip(batch, batches, strict=True), start=1):
        targets = got["labels"][0][got["labels"][0] != IGNORE_INDEX]
        if reason is None:
            assert number not in listed, (line, listed[number])
            spoken = [turn["content"] for turn in json.loads(line)["messages"] if turn["role"] == "assistant"]
            assert fuzzed.encoder.tokenizer.decode(targets) == "".join(text + ENDS for text in spoken)
        else:
            assert len(targets) == 0 and re.search(reason, listed[number]), (line, listed.get(number))

    # The same rows streamed, and put together by their lengths.
    quarantine = Quarantine(fuzzed.folder / "streamed", ROWS, ROWS)
    quarantine.path.unlink(missing_ok=True)
    read = partial(
        iterate_conversations, read=FORMATS["sharegpt"], attr=ATTR, media_folder=fuzzed.folder, keep_bad=True
    )
    stream = ConversationStream([Source(files, read)], fuzzed.encoder, quarantine)
    longest = max(got["input_ids"].shape[1] for got in batches)
    options = {"batch_size": 1, "shuffle": False, "drop_last": False, "max_seq_len": 2 * longest}
    streamed = list(build_mm_dataloader(stream, options))
    assert all(got["input_ids"].numel() <= 2 * longest for got in streamed)
    assert reasons(quarantine.path, file) == listed
    spoken, expected = (
        sorted(fuzzed.encoder.tokenizer.decode(row[row != IGNORE_INDEX]) for got in part for row in got["labels"])
        for part in (streamed, batches)
    )
    assert spoken == expected
    fuzzed.seen += [reason is None for _, reason in batch]


def test_it_were_a_thousand_and_many_of_each_kind(fuzzed):
    """Judges the test above."""
    assert len(fuzzed.seen) >= 1000 and 200 < sum(fuzzed.seen) < 800
