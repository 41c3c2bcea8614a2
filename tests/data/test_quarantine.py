"""The list of bad samples: each once, whoever finds it, whatever happens to the process that writes it."""

from __future__ import annotations

import json
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from mindspeed_mm.data import build_mm_dataloader, build_mm_dataset
from mindspeed_mm.data.quarantine import BadSample, Quarantine, start_over, summarise
from mindspeed_mm.errors import UserError
from tests.data.tiny import save_digits


def bad(row: int, file: str = "a.jsonl") -> BadSample:
    return BadSample(f"{file}:{row}", f"reason {row}").at(file, row)


def listed(folder: Path) -> list[tuple[str, int]]:
    entries = map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
    return [(entry["file"], entry["row"]) for entry in entries]


def add_all(folder: Path, start: float) -> None:
    time.sleep(max(start - time.time(), 0))
    for row in range(300):
        Quarantine(folder, 1000, 1000).add([bad(row)])


def test_processes_that_write_at_the_same_time_list_each_sample_once(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        list(pool.map(add_all, [tmp_path] * 2, [time.time() + 0.3] * 2))
    assert sorted(listed(tmp_path)) == [("a.jsonl", row) for row in range(300)]


def test_half_a_line_of_a_killed_run_is_written_anew(tmp_path):
    Quarantine(tmp_path, 10, 10).add([bad(1), bad(2)])
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    Quarantine(tmp_path, 10, 10).add([bad(3), bad(2)])
    assert sorted(listed(tmp_path)) == [("a.jsonl", row) for row in (1, 2, 3)]


@pytest.mark.parametrize("content", [b"\xff\n", b"[]\n", b'{"file": "a"}\n', b"{\n", b'{"file": [], "row": 1}\n'])
def test_a_damaged_list_is_named(content, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(content)
    for use in (lambda: Quarantine(tmp_path, 9, 9).add([bad(1)]), lambda: summarise(tmp_path)):
        with pytest.raises(UserError, match=rf"{path} is no list of bad samples: "):
            use()
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("budget", "rows", "limit"), [(2, 10, 2), (0, 10, 0), (0.2, 10, 2), (0.11, 10, 2), (0.0, 10, 0)]
)
def test_the_budget_counts_different_samples_of_all_runs(budget, rows, limit, tmp_path):
    for row in range(limit):
        Quarantine(tmp_path, budget, rows).add([bad(row)])
    again = Quarantine(tmp_path, budget, rows)
    again.add([bad(row) for row in range(limit)])
    with pytest.raises(
        UserError, match=rf"{limit + 1} bad samples are more than .* allows \({budget}.*The last: a.jsonl:9"
    ):
        again.add([bad(9)])


def test_the_summary_sorts_and_another_run_starts_anew(tmp_path):
    assert summarise(tmp_path) is None
    start_over(tmp_path)
    Quarantine(tmp_path, 10, 10).add([bad(11), bad(2), bad(3, "A.jsonl")])
    assert summarise(tmp_path).startswith("3 bad sample(s) were left out (1 of A.jsonl, 2 of a.jsonl): ")
    assert listed(tmp_path) == [("A.jsonl", 3), ("a.jsonl", 2), ("a.jsonl", 11)]
    start_over(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["quarantine.jsonl.old"]


def test_a_bad_sample_survives_the_way_from_a_worker():
    one = pickle.loads(pickle.dumps(bad(4)))
    assert (str(one), one.file, one.row, one.reason) == ("a.jsonl:4: reason 4", "a.jsonl", 4, "reason 4")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.ranks)])
def test_what_is_fetched_ahead_is_listed_when_its_batch_is_taken(workers, dataset_param, tmp_path):
    digits = save_digits(tmp_path)
    param = dataset_param(digits)
    param |= {"on_bad_sample": "quarantine", "bad_sample_budget": 2, "quarantine_folder": str(tmp_path / "list")}
    for index in (2, 5):
        (tmp_path / f"images/{index}.png").write_text("no picture")
    dataset = build_mm_dataset(param)
    loader = build_mm_dataloader(dataset, {"batch_size": 2, "shuffle": False, "num_workers": workers})
    seen = []
    for batch in loader:
        path = tmp_path / "list/quarantine.jsonl"
        seen.append([row for _, row in listed(path.parent)] if path.exists() else [])
        assert len(batch["input_ids"]) == 2 and len(batch["pixel_values"]) == 64 * (2 - (len(seen) in (2, 3)))
    assert seen == [[], [3], [3, 6], [3, 6]]
    with pytest.raises(BadSample, match="is not an image"):
        dataset.question(2)
