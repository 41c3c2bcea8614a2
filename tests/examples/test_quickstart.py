"""The parts of the quickstart that can be checked in seconds; ``make quickstart`` runs the whole."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_data_are_all_digits_split_at_random(tmp_path: Path) -> None:
    prepare = load_script("prepare")
    assert prepare.write_data(tmp_path) == (1438, 359)
    parts = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    ]
    names = [{row["images"][0] for row in part} for part in parts]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 1797
    for part in parts:
        assert {row["messages"][1]["content"] for row in part} == set(prepare.WORDS)
    with Image.open(tmp_path / parts[0][0]["images"][0]) as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")


def test_model_folder_is_complete_but_for_the_weights(tmp_path: Path) -> None:
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    from mindspeed_mm.data.processors import load_processor

    prepare = load_script("prepare")
    prepare.write_model_folder(tmp_path)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(tmp_path))
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 2.5e6
    assert not list(tmp_path.glob("*.safetensors"))
    processor = load_processor(tmp_path)
    question = [{"type": "image"}, {"type": "text", "text": prepare.QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    inputs = processor(images=[Image.new("RGB", (32, 32))], text=[text], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
    for word in prepare.WORDS:
        tokens = processor.tokenizer.encode(word)
        assert len(tokens) == 1 and processor.tokenizer.decode(tokens) == word


@pytest.mark.parametrize(
    ("loss", "weight", "message"),
    [(0.5, 1.0, None), (0.5000001, 1.0, "losses differ from iteration 60"), (0.5, 1.0000001, "1 of 2 tensors differ")],
)
def test_a_loss_or_a_weight_that_changed_is_seen(
    loss: float, weight: float, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_script("run")
    for name, last_loss, value in (("STRAIGHT", 0.5, 1.0), ("BROKEN", loss, weight)):
        folder = tmp_path / name
        monkeypatch.setattr(run, name, folder)
        state = {"model.weight": torch.tensor([value]), "optimizer.state.weight.exp_avg": torch.zeros(1)}
        dcp.save(state, checkpoint_id=folder / f"iter_{run.COMPARE_AT:07d}", no_dist=True)
        rows = [{"iteration": i, "loss": 1.0} for i in range(1, run.COMPARE_AT)]
        rows.append({"iteration": run.COMPARE_AT, "loss": last_loss})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if message is None:
        run.compare()
    else:
        with pytest.raises(SystemExit, match=message):
            run.compare()


def test_the_share_of_waiting_leaves_out_the_first_step_and_is_held_against_its_target(tmp_path: Path) -> None:
    rows = [{"iteration": i, "loss": 1.0, "step_time": t, "data_wait_time": w}
            for i, t, w in ((1, 9.0, 8.0), (2, 0.5, 0.01), (3, 1.5, 0.03))]  # fmt: skip
    lines = [*map(json.dumps, rows), json.dumps({"iteration": 3, "validation loss": 1.0}), '{"iteration": 4, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = load_script("run")
    assert run.data_wait(tmp_path) == pytest.approx(0.02)
    assert run.about_data_wait(tmp_path) == "waiting for data: 2.00% of the steps; target at most 2% reached"
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines).replace("0.03", "0.031"))
    assert run.about_data_wait(tmp_path) == "waiting for data: 2.05% of the steps; target at most 2% MISSED"
