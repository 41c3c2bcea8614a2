"""The page about two runs: complete, true, and readable without a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.finding import Finding, Measurement, Verdict
from mindspeed_mm.precision.records.record import Key, RankStep, RecordWriter
from mindspeed_mm.precision.report import collect, module_tree, page, read_verdict
from tests.precision.command import run
from tests.precision.test_data_and_state import samples
from tests.precision.test_msprobe import sketch_of

TREE = {"": "Net", "layers": "ModuleList", "layers.0": "Block", "layers.0.norm": "RMSNorm", "layers.1": "Block"}


def write_run(folder: Path, *, loss: float = 2.0, eps: float = 1e-8, torch_version: str = "2.7.1") -> Path:
    """Write what a training run of ours leaves: manifest, metrics, record."""
    folder.mkdir()
    start = {
        "arguments": {"lr": 1e-5, "adam_eps": eps, "micro_batch_size": 1, "use_torch_fsdp2": True, "weight_decay": 0.1},
        "configs": {}, "versions": {"torch": torch_version}, "backend": "gloo", "world_size": 1,
    }  # fmt: skip
    (folder / "run_manifest.json").write_text(json.dumps({"starts": [start]}))
    rows = [{"iteration": i, "loss": loss + 1 / i, "grad_norm": 1.0} for i in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    keys = [("weights", "layers.0.norm.weight", "parameter"), ("forward", "layers.0.norm", "output.0")]
    entries = {Key(*key): sketch_of(torch.randn(2, 4)) for key in keys}
    writer = RecordWriter(folder / "precision")
    writer.start(start)
    writer.write(0, RankStep(entries=entries, tree=TREE, samples=samples(4), scalars={"loss": (loss, "same")}))
    return folder


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "br", "path", "use", "link", "img", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_nothing_else_and_says_what_differs(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "a")
    candidate = write_run(tmp_path / "b", loss=2.2, eps=1e-6, torch_version="2.13.0")
    code, text = run("report", reference, candidate, "--out", tmp_path / "out", "--min-steps", 10)
    assert code == 1, text
    html = (tmp_path / "out/report.html").read_text()
    content = Page(html)
    assert not content.open and not [target for target in content.loaded if not target.startswith("#")]
    assert "url(http" not in html and "@import" not in html and "<script" not in html
    words = " ".join(content.texts)
    for expected in ("not aligned", "first loss", "1e-06 (ours: adam_eps)", "2.13.0", "layers", "RMSNorm", "eps"):
        assert expected in words, expected
    assert "<svg" in html and "<metadata" not in html
    verdict = json.loads((tmp_path / "out/verdict.json").read_text())
    assert verdict["exit_code"] == 1


def test_runs_that_agree_are_aligned_and_nothing_comparable_is_an_error(tmp_path: Path) -> None:
    reference, candidate = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert run("report", reference, candidate, "--out", tmp_path / "out", "--min-steps", 10)[0] == 0
    assert run("report", reference, tmp_path, "--out", tmp_path / "x")[0] == 2
    with pytest.raises(UserError, match="nothing that can be compared"):
        collect(tmp_path, reference)


def test_an_earlier_verdict_is_taken_over_and_its_first_finding_is_marked_in_the_tree(tmp_path: Path) -> None:
    found = Finding("forward", "layers.0.norm", 0, "eps <1e-5>", "replay it")
    rows = [
        Measurement(0, "forward", "layers.0.norm", "output.0", 0.01, 1e-6),
        Measurement(0, "forward", "layers.1", "output.0", 0.02, 1e-6),
        Measurement(0, "weights", "layers.0.norm.weight", "parameter", 0.0, 1e-6),
    ]
    Verdict("compare", [found], table=rows).write(tmp_path / "verdict")
    assert read_verdict(tmp_path / "verdict").table == rows
    report = collect(write_run(tmp_path / "a"), write_run(tmp_path / "b"), [tmp_path / "verdict"], min_steps=10)
    assert report.whole.first == found
    html = page(report)
    assert "eps &lt;1e-5&gt;" in html and "eps <1e-5>" not in html
    assert re.search(r'<li class="first">\s*<span class="name">norm</span>', html)
    with pytest.raises(UserError, match="not a verdict"):
        read_verdict(tmp_path)


def marks(node: Any) -> dict[str, str]:
    found = {node.name: node.mark}
    for child in node.children:
        found |= marks(child)
    return found


def test_the_way_to_the_first_difference_is_open(tmp_path: Path) -> None:
    rows = [
        Measurement(0, "forward", "layers.0.norm", "output.0", 1.0, 0.1),
        Measurement(0, "forward", "layers.1", "output.0", 0.0, 0.1),
    ]
    tree = module_tree(TREE, Finding("forward", "layers.0.norm", 0, "", ""), rows)
    assert tree is not None and tree.open and tree.children[0].open and tree.children[0].children[0].open
    assert not tree.children[0].children[1].open
    assert marks(tree) == {"model": "", "layers": "", "0": "", "norm": "first", "1": "good"}
