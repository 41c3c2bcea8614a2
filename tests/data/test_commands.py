"""``mindspeed-mm data prepare`` and ``inspect``, and what training takes from the cache."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image
from typer.testing import CliRunner

from mindspeed_mm.cli import app
from mindspeed_mm.data import build_mm_dataloader, build_mm_dataset
from mindspeed_mm.errors import UserError
from tests.data.tiny import save_digits, write_jsonl

FORK = torch.multiprocessing.get_context("fork")
LONG = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world, " * 40}]}


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def data_json(dataset_param: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Return the path of a data.json for some rows; the cache is in ``tmp_path / "cache"``."""

    def make(rows: list[Any] | None = None, **basic: Any) -> Path:
        param = dataset_param(rows, cache_dir=str(tmp_path / "cache"), **basic)
        (tmp_path / "data.json").write_text(json.dumps({"dataset_param": param}))
        return tmp_path / "data.json"

    return make


def caches(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("cache/*/done.json")}


def param_of(path: Path, **basic: Any) -> dict[str, Any]:
    param = json.loads(path.read_text())["dataset_param"]
    param["basic_parameters"] |= basic
    return param


def test_prepare_writes_what_training_reads(data_json: Callable[..., Path], tmp_path: Path) -> None:
    path = data_json([*save_digits(tmp_path), LONG])
    assert "train: 9 samples, 0 of them bad" in run("prepare", "--mm-data", path, "--seq-length", 60, "--workers", 2)
    (done,) = (tmp_path / "cache").glob("*/done.json")
    written = done.stat().st_mtime_ns
    dataset = build_mm_dataset(param_of(path, seq_length=60))
    samples = [dataset[i] for i in range(9)]
    expected = [[len(s["input_ids"]), int(s["image_grid_thw"].prod()) if "image_grid_thw" in s else 0] for s in samples]
    assert dataset.sizes.dtype == np.int32 and dataset.sizes.tolist() == expected
    assert dataset.rows.cache_files, "the rows are not mapped from the cache"
    known = dataset.cache.prepared()
    assert known.column("targets").tolist() == [int((s["labels"][1:] >= 0).sum()) for s in samples]
    whole = build_mm_dataset(param_of(path))[8]
    assert known.column("uncut")[8] == len(whole["input_ids"]) > known.column("tokens")[8] == 60
    run("prepare", "--mm-data", path, "--seq-length", 60)
    assert done.stat().st_mtime_ns == written and len(caches(tmp_path)) == 1
    run("prepare", "--mm-data", path, "--seq-length", 60, "--overwrite")
    assert done.stat().st_mtime_ns != written

    parts = dataset.train_test_split(test_size=0.25, seed=1)
    for part in parts.values():
        for index in range(len(part)):
            assert part.sizes[index, 0] == len(part[index]["input_ids"])
            assert part.where(index) == dataset.where([r["row"] for r in dataset.rows].index(part.rows[index]["row"]))


def test_options_and_contents_decide_the_key(
    data_json: Callable[..., Path], tmp_path: Path, processor_folder: Callable[[str], Path]
) -> None:
    def prepared_now(path: Path, *words: object) -> set[str]:
        before = caches(tmp_path)
        run("prepare", "--mm-data", path, "--workers", 1, *words)
        return caches(tmp_path) - before

    rows = save_digits(tmp_path, 2)
    assert len(prepared_now(data_json(rows))) == 1
    assert not prepared_now(data_json(rows))
    (tmp_path / "other").mkdir()
    assert not prepared_now(data_json(rows, dataset=str(write_jsonl(tmp_path / "other" / "name.jsonl", rows))))
    for changed in ({"mask_history": True}, {"max_samples": 1}, {"cache_samples": True}):
        assert len(prepared_now(data_json(rows, **changed))) == 1, changed
    assert len(prepared_now(data_json(rows), "--seq-length", 50)) == 1
    assert len(prepared_now(data_json([*rows, LONG]))) == 1
    template = processor_folder("qwen3_vl") / "chat_template.jinja"
    text = template.read_text()
    try:
        template.write_text(text.replace("<|im_start|>", "<|im_start|> "))
        assert len(prepared_now(data_json(rows))) == 1
    finally:
        template.write_text(text)


def run_in_silence(words: tuple[object, ...]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    run(*words)


@pytest.mark.ranks
def test_a_killed_prepare_goes_on_where_it_was(data_json: Callable[..., Path], tmp_path: Path) -> None:
    path = data_json(save_digits(tmp_path) * 60, cache_samples=True)  # chunks of 15
    words = ("prepare", "--mm-data", path, "--workers", 2)

    def finished() -> dict[Path, int]:
        return {
            part: (part.parents[1] / "samples" / part.stem).stat().st_mtime_ns
            for part in tmp_path.glob("cache/*/parts/*.json")
        }

    process = FORK.Process(target=run_in_silence, args=(words,))
    process.start()
    while len(finished()) < 8:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    time.sleep(1.0)  # its processes notice it
    before = finished()
    assert 8 <= len(before) < 32 and not caches(tmp_path)
    # two at once go on with it
    others = [FORK.Process(target=run_in_silence, args=(words,)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
        assert other.exitcode == 0
    for part, time_written in before.items():
        assert (part.parents[1] / "samples" / part.stem).stat().st_mtime_ns == time_written
    kept, fresh = build_mm_dataset(param_of(path)), build_mm_dataset(param_of(path, cache_samples=False))
    assert kept.sizes.tolist() == fresh.sizes.tolist() and len(caches(tmp_path)) == 2
    for index in (0, 7, 250, 479):
        one, other = kept[index], fresh[index]
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_kept_samples_are_used_without_the_pictures(data_json: Callable[..., Path], tmp_path: Path) -> None:
    path = data_json(cache_samples=True)
    options = {"batch_size": 4, "shuffle": False}
    expected = list(build_mm_dataloader(build_mm_dataset(param_of(path, cache_samples=False)), options))
    loader = build_mm_dataloader(build_mm_dataset(param_of(path)), options)  # prepares them now
    for picture in (tmp_path / "images").iterdir():
        picture.unlink()
    for batch, other in zip(loader, expected, strict=True):
        assert batch.keys() == other.keys() and all(torch.equal(batch[key], other[key]) for key in batch)
    again = build_mm_dataloader(build_mm_dataset(param_of(path)), {**options, "num_workers": 2})
    assert torch.equal(next(iter(again))["pixel_values"], expected[0]["pixel_values"])


@pytest.mark.parametrize("name", ["done.json", "table.npy", "rows.arrow", "samples/000001"])
def test_a_cache_that_the_disk_has_damaged_is_named(name: str, data_json: Callable[..., Path], tmp_path: Path) -> None:
    path = data_json(cache_samples=True)
    run("prepare", "--mm-data", path, "--workers", 1)
    (folder,) = tmp_path.glob("cache/*")
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(UserError, match=rf"{folder}: the cache of prepared samples is damaged: .*delete the folder"):
        dataset = build_mm_dataset(param_of(path))
        assert len(dataset.sizes) == 8 and dataset[1]


def test_a_picture_that_changes_after_preparing_is_noticed(data_json: Callable[..., Path], tmp_path: Path) -> None:
    path = data_json()
    dataset = build_mm_dataset(param_of(path))
    before = dataset.sizes.tolist()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "3.png")
    with pytest.raises(UserError, match=r"data.jsonl:4: has \d+ tokens, had \d+ .*run mindspeed-mm data prepare"):
        dataset[3]
    run("prepare", "--mm-data", path, "--workers", 1)
    dataset = build_mm_dataset(param_of(path))
    assert [i for i in range(8) if dataset.sizes[i].tolist() != before[i]] == [3]
    assert len(dataset[3]["input_ids"]) == dataset.sizes[3, 0]


def test_bad_samples_stop_a_run_that_needs_sizes_or_are_quarantined(
    data_json: Callable[..., Path], tmp_path: Path
) -> None:
    path = data_json()
    picture = tmp_path / "images" / "2.png"
    whole = picture.read_bytes()
    picture.write_text("no picture")
    with pytest.raises(UserError, match=r"jsonl:3: .*not an image.*\n1 of 8 samples are bad: mindspeed-mm data insp"):
        build_mm_dataset(param_of(path)).sizes  # noqa: B018
    quarantined = {**param_of(path), "on_bad_sample": "quarantine", "quarantine_folder": str(tmp_path / "q")}
    dataset = build_mm_dataset(quarantined)
    assert dataset.sizes[2].tolist() == [len(dataset.stand_in()["input_ids"]), 0]
    picture.write_bytes(whole)
    assert "0 of them bad" in run("prepare", "--mm-data", path, "--workers", 1)
    dataset = build_mm_dataset(param_of(path))
    assert dataset.sizes[2, 0] == len(dataset[2]["input_ids"])


def sizes_and_pid(param: dict[str, Any]) -> tuple[list[Any], int]:
    return build_mm_dataset(param).sizes.tolist(), os.getpid()


def test_two_ranks_prepare_together(data_json: Callable[..., Path], tmp_path: Path, ranks2: Any) -> None:
    param = param_of(data_json(save_digits(tmp_path) * 5))
    (one, first), (two, second) = ranks2.run(sizes_and_pid, param)
    assert one == two and len(one) == 40 and first != second
    fresh = build_mm_dataset({**param, "basic_parameters": {**param["basic_parameters"], "cache_dir": None}})
    assert one[:8] == [fresh.measure(i).numbers[:2] for i in range(8)]


class Page(HTMLParser):
    """Collects the pictures, the text of each sample and what is marked in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: dict[str, list[bytes]] = {}
        self.marked: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self._inside: list[tuple[str, str]] = []
        self.feed(text)
        assert not self._inside

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {key: value or "" for key, value in attrs}
        if tag == "img":
            start, _, data = values["src"].partition(",")
            assert start.startswith("data:image/") and start.endswith(";base64")
            self.pictures.setdefault(values["class"], []).append(base64.b64decode(data, validate=True))
        elif tag not in ("meta",):
            self._inside.append((tag, values.get("class", "")))
            if values.get("class") == "text":
                self.texts.append("")
                self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if any(name == "text" for _, name in self._inside):
            self.texts[-1] += data
            if self._inside[-1][0] == "mark":
                self.marked[-1] += data


def bad_rows(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    turns = save_digits(folder)[0]["messages"]
    (folder / "images" / "broken.png").write_text("hello")
    yield {"images": ["images/none.png"], "messages": turns}, "image 'images/none.png' not found"
    yield {"images": ["images/broken.png"], "messages": turns}, "is not an image that Pillow can read"
    yield {"messages": turns}, "1 <image> placeholder(s) in the messages but 0 file(s)"
    hidden = [{"role": "user", "content": "world, " * 40}, {"role": "assistant", "content": "x"}]
    yield {"messages": hidden}, "and the cut would leave nothing to learn"


def test_inspect_shows_masks_pictures_and_bad_rows(data_json: Callable[..., Path], tmp_path: Path) -> None:
    script = {"role": "user", "content": "<script>alert('&amp;')</script> [bold]{{ 7 * 6 }}"}
    turns = [script, {"role": "assistant", "content": "one"}, script, {"role": "assistant", "content": "<b>two</b>"}]
    bad, reasons = zip(*bad_rows(tmp_path), strict=True)
    path = data_json([save_digits(tmp_path)[3], {"messages": turns}, LONG, *bad])
    out = tmp_path / "out"
    said = run("inspect", "--mm-data", path, "--seq-length", 200, "--samples", 7, "--workers", 1, "--out", out)
    flat = " ".join(said.replace("│", " ").split())
    assert "rows 7" in flat and "bad rows 4" in flat and "cut at 200 tokens 1, 101 tokens lost" in flat
    for number, reason in enumerate(reasons, start=4):
        assert re.search(rf"data\.jsonl:{number}: [^\n]*{re.escape(reason)}", said), reason
    assert "[[The answer is 3.<|im_end|>]]" in flat and "[[one<|im_end|>]]" in flat

    page = Page((out / "report.html").read_text())
    assert "script" not in page.tags and "b" not in page.tags
    assert page.marked[:2] == ["The answer is 3.<|im_end|>", "one<|im_end|><b>two</b><|im_end|>"]
    assert len(page.texts) == 3 and page.texts[1].count(script["content"]) == 2
    (picture,) = page.pictures["picture"]
    shown, original = (Image.open(file).convert("L") for file in (BytesIO(picture), tmp_path / "images" / "3.png"))
    assert shown.size == original.size
    assert np.abs(np.asarray(shown, float) - np.asarray(original, float)).mean() < 8  # JPEG
    text = (out / "report.html").read_text()
    assert "http" not in text and all(reason.split("'")[0].split("<")[0] in text for reason in reasons)
    (histogram,) = page.pictures["histogram"]
    for file in (out / "lengths_train.png", BytesIO(histogram)):
        with Image.open(file) as png:
            assert png.format == "PNG" and png.size > (400, 200) and len(png.convert("RGB").getcolors(1 << 24)) > 3


def test_the_mask_on_the_page_is_the_processors_own(data_json: Callable[..., Path], tmp_path: Path) -> None:
    """The template of the tiny processor marks what an assistant wrote; transformers makes a mask of it."""
    from mindspeed_mm.data.inspection import render_samples

    dataset = build_mm_dataset(param_of(data_json()))
    processor = dataset.encoder.processor
    for index, rendered in enumerate(render_samples(dataset, 8)):
        row = save_digits(tmp_path)[index]
        content = [
            {"type": "image", "image": Image.open(tmp_path / row["images"][0]).convert("RGB")},
            {"type": "text", "text": "\nWhat digit is this?"},
        ]
        answer = {"role": "assistant", "content": [{"type": "text", "text": row["messages"][1]["content"]}]}
        encoded = processor.apply_chat_template(
            [{"role": "user", "content": content}, answer],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = np.ravel(encoded["input_ids"]), np.ravel(encoded["assistant_masks"]).astype(bool)
        assert "".join(p.text for p in rendered.pieces if p.trained) == processor.tokenizer.decode(ids[mask])
        assert rendered.tokens == len(ids) and rendered.targets == mask.sum()


def test_odd_options(data_json: Callable[..., Path], tmp_path: Path) -> None:
    path = data_json(val_dataset={"a/b": str(tmp_path / "data.jsonl")})
    for option, words in {"--samples": "inspect -1", "--seq-length": "prepare 0", "--workers": "prepare -1"}.items():
        command, value = words.split()
        result = CliRunner().invoke(app, ["data", command, "--mm-data", str(path), option, value])
        assert result.exit_code == 2, result.output
    run("inspect", "--mm-data", path, "--workers", 1, "--out", tmp_path / "out", "--samples", 0)
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {"lengths_train.png", "lengths_valid_a_b.png"}


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"custom": {}}')
    for command in ("prepare", "inspect"):
        with pytest.raises(UserError, match=r"data.json: has no dataset_param"):
            run(command, "--mm-data", tmp_path / "data.json")
