"""Training from data.json alone, on data sets as they are published, and with bad samples in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.tiny import save_digits
from tests.ranks import RankPool
from tests.training.job import Job, Outcome, run_here
from tests.training.test_resume import losses, tensors


def run(pool: RankPool, job: Job, **flags: Any) -> list[Outcome]:
    before = dict(job.flags)
    job.flags |= {name.replace("_", "-"): value for name, value in flags.items()}
    outcomes = pool.run(run_here, job.command(), job.folder, timeout=240)
    job.flags = before
    return outcomes


def save_photos(folder: Path) -> list[str]:
    """Cut scikit-learn's two photos into eight."""
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    names = []
    for number, photo in enumerate(load_sample_images().images):
        for part, pixels in enumerate(np.array_split(np.asarray(photo), 4, axis=1)):
            names.append(f"{number}{part:011}.jpg")
            Image.fromarray(pixels).resize((40, 107)).save(folder / names[-1])
    return names


def llava_instruct(folder: Path) -> dict[str, Any]:
    """A list of ``{id, image, conversations}``, image first or last, several questions, some rows without image."""
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(save_photos(folder / "coco")):
        thing = ("temple", "flower")[name[0] == "1"]
        question = ("<image>\nWhat is shown?", "What is shown?\n<image>")[number % 2]
        turns = [question, f"A {thing}.", "In one word?", thing]
        rows.append(
            {
                "id": name.removesuffix(".jpg"),
                "image": name,
                "conversations": [
                    {"from": ("human", "gpt")[n % 2], "value": text}
                    for n, text in enumerate(turns[: 2 + 2 * (number % 2)])
                ],
            }
        )
    rows.append({"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    (folder / "llava_instruct.json").write_text(json.dumps(rows))
    return {
        "basic_parameters": {"dataset": "llava_instruct.json", "dataset_dir": str(folder / "coco")},
        "attr": {"images": "image"},
    }


def llama_factory(folder: Path) -> dict[str, Any]:
    """``messages`` with ``images`` beside them in one file, an alpaca-like row's columns in none."""
    digits = save_digits(folder)
    pair = {
        "messages": [
            {"role": "system", "content": "You compare."},
            {"role": "user", "content": "<image><image>Are these the same?"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "images": ["images/0.png", "images/1.png"],
    }
    (folder / "mllm_demo.json").write_text(json.dumps([*digits, pair], indent=2))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    return {
        "basic_parameters": {"template": "qwen3_vl", "dataset": "mllm_demo.json", "dataset_dir": str(folder)},
        "attr": {"formatting": "sharegpt", "messages": "messages", "images": "images", **tags},
    }


@pytest.mark.parametrize("layout", [llava_instruct, llama_factory])
def test_published_layouts_train_from_data_json_alone(layout, job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    job.rows = None
    job.data["dataset_param"] |= layout(tmp_path)
    outcome = run(ranks2, job, train_iters=8, global_batch_size=4, lr="3e-3", calculate_per_token_loss=True)[1]
    assert len(outcome.losses) == 8, outcome.text
    assert np.mean(outcome.losses[-2:]) < 0.9 * outcome.losses[0]  # two epochs


GOOD = 4


def with_bad_rows(job: Job, folder: Path) -> list[str]:
    """Put a bad row after each good one, every one bad in another way; return the reasons."""
    digits = save_digits(folder)
    whole = (folder / "images/6.png").read_bytes()
    (folder / "images/6.png").write_bytes(whole[:-40])  # found when it is decoded
    other = {"images": ["../secret.png"], "messages": digits[0]["messages"]}
    silent = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<|image_pad|>"}]}
    bad = [json.dumps(digits[6]), '{"messages": [', json.dumps(other), json.dumps(silent)]
    job.rows = "".join(f"{json.dumps(digits[n])}\n{bad[n]}\n" for n in range(GOOD))
    job.data["dataset_param"] |= {"on_bad_sample": "quarantine", "bad_sample_budget": 0.5}
    return ["cannot be decoded", "broken JSON", "outside the data folder", "processor refuses this row"]


def listed(folder: Path) -> list[tuple[int, str]]:
    entries = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert all(entry.keys() == {"file", "row", "reason"} and entry["file"] == "train.jsonl" for entry in entries)
    return [(entry["row"], entry["reason"]) for entry in entries]


def test_bad_samples_change_nothing_on_any_number_of_ranks_nor_on_resume(
    job: Job, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    reasons = with_bad_rows(job, tmp_path)
    flags = {"calculate_per_token_loss": True, "train_iters": 2 * GOOD, "lr_decay_iters": 2 * GOOD}
    two = run(ranks2, job, save=tmp_path / "two", **flags, num_workers=1)
    one = run(ranks1, job, save=tmp_path / "one", **flags)
    run(ranks2, job, save=tmp_path / "resumed", **{**flags, "train_iters": 3})
    run(ranks2, job, save=tmp_path / "resumed", auto_resume=True, **flags)

    # Judge: the same rows without the bad ones, each a batch of its own.
    job.rows = [json.loads(line) for line in str(job.rows).splitlines()[::2]]
    del job.data["dataset_param"]["on_bad_sample"]
    run(ranks1, job, save=tmp_path / "judge", **flags, global_batch_size=1)
    judge = losses(tmp_path / "judge")
    for name in ("one", "two", "resumed"):
        found = losses(tmp_path / name)
        assert found.keys() == judge.keys()
        for step in judge:
            assert found[step][:2] == pytest.approx(judge[step][:2], rel=1e-5), (name, step)
        rows = listed(tmp_path / name)
        assert [row for row, _ in rows] == [2, 4, 6, 8]
        assert all(re.search(reason, text) for reason, (_, text) in zip(reasons, rows, strict=True))
    same = [tensors(tmp_path / name / f"iter_{2 * GOOD:07d}") for name in ("two", "resumed")]
    assert not [key for key, value in same[0].items() if not (value == same[1][key]).all()]
    for outcomes in (one, two):
        assert f"4 bad sample(s) were left out (4 of train.jsonl): {tmp_path}" in outcomes[0].text


def test_a_batch_of_bad_samples_only_is_no_mistake(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    with_bad_rows(job, tmp_path)
    outcome = run(ranks2, job, save=tmp_path / "save", global_batch_size=4, micro_batch_size=2, train_iters=2)[1]
    assert len(outcome.losses) == 2, outcome.text
    job.rows = str(job.rows).splitlines()[3] + "\n" * 1 + str(job.rows).splitlines()[5]
    job.data["dataset_param"]["bad_sample_budget"] = 2
    outcome = run(ranks2, job, save=tmp_path / "bad", train_iters=2)[1]
    assert outcome.losses == [0.0, 0.0], outcome.text


def test_a_budget_that_is_used_up_ends_the_run(job: Job, ranks1: RankPool, tmp_path: Path) -> None:
    with_bad_rows(job, tmp_path)
    job.data["dataset_param"]["bad_sample_budget"] = 3
    outcome = run(ranks1, job, save=tmp_path / "save", train_iters=8)[0]
    # Two are found when the files are read, then the picture in step 1; the fourth is in step 4.
    assert len(outcome.losses) == 3 and outcome.code == 1
    assert re.search(
        r"quarantine\.jsonl: 4 bad samples are more than dataset_param\.bad_sample_budget allows \(3\)\. "
        r"The last: .*train\.jsonl:8: .*Repair the data, or raise the budget",
        outcome.error(),
    )
    job.data["dataset_param"]["bad_sample_budget"] = 0.1
    outcome = run(ranks1, job, save=tmp_path / "save", train_iters=8)[0]
    assert outcome.losses == [] and "2 bad samples are more than" in outcome.error()
    assert "allows (0.1 of 8 rows)" in outcome.error()
    del job.data["dataset_param"]["on_bad_sample"]
    outcome = run(ranks1, job, save=tmp_path / "save", train_iters=8)[0]
    assert outcome.error().endswith(
        "train.jsonl:4: broken JSON: Expecting value (column 15); each line must hold one object"
    )


def test_a_quarantine_needs_a_folder(job: Job, ranks1: RankPool, tmp_path: Path) -> None:
    with_bad_rows(job, tmp_path)
    assert "pass --save, or set dataset_param.quarantine_folder" in run(ranks1, job)[0].error()
    job.data["dataset_param"]["quarantine_folder"] = str(tmp_path / "list")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "quarantine.jsonl").write_text('{"file": "of another run", "row": 1, "reason": ""}\n')
    outcome = run(ranks1, job, train_iters=4)[0]
    assert "4 bad sample(s) were left out (4 of train.jsonl)" in outcome.text
    assert len(listed(tmp_path / "list")) == 4 and (tmp_path / "list" / "quarantine.jsonl.old").exists()
