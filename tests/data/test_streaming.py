"""Files that are read while they are trained on: packed, mixed, with bad rows, on any number of ranks."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.configs.data import DataloaderParam
from mindspeed_mm.data import build_mm_dataloader, build_mm_dataset
from mindspeed_mm.data.formats import FORMATS, register_format
from mindspeed_mm.data.iterators import CursorIterator, build_iterations, iterate
from mindspeed_mm.data.loaders import MultiModalDataLoader
from mindspeed_mm.data.planning import build_sampler
from mindspeed_mm.data.rows import RowFiles
from mindspeed_mm.data.streaming import FileRows
from mindspeed_mm.errors import UserError
from tests.data.test_formats import WRITERS
from tests.data.test_packing import log_normal
from tests.data.tiny import save_digits, write_jsonl
from tests.training.job import save_tiny_hf_folder


def named(name: str, count: int) -> list[dict[str, Any]]:
    """Return rows whose answers are ``a0``, ``a1`` and so on, of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": "Say it." * (number % 3)},
                {"role": "assistant", "content": f"{name}{number}"},
            ]
        }
        for number in range(count)
    ]


@pytest.fixture
def mixture(dataset_param: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return ``dataset_param`` for streams of named rows, each with the keys of its entry."""

    def make(counts: dict[str, int], entries: list[dict[str, Any]], **basic: Any) -> dict[str, Any]:
        param = dataset_param(streaming=True, **basic)
        param["basic_parameters"]["dataset"] = None
        files = [write_jsonl(tmp_path / f"{name}.jsonl", named(name, count)) for name, count in counts.items()]
        param["basic_parameters"]["mixture"] = [
            {"dataset": str(file), **entry} for file, entry in zip(files, entries, strict=True)
        ]
        return param

    return make


def answers_of(samples: list[dict[str, Any]], dataset: Any) -> list[str]:
    tokenizer = dataset.encoder.tokenizer
    return [tokenizer.decode(s["labels"][s["labels"] >= 0], skip_special_tokens=True) for s in samples]


def ranks_of(count: int, dataset: Any, workers: int = 0, **param: Any) -> list[CursorIterator]:
    """Return the iterator of every rank, whose batches are the answers of their samples."""
    typed = DataloaderParam(**{"batch_size": 1, "seed": 3, "drop_last": False, "num_workers": workers, **param})
    loaders = []
    for rank in range(count):
        sampler = build_sampler(dataset, typed, rank, count, pack_to=dataset.encoder.options.pack_to)
        loaders.append(
            MultiModalDataLoader(dataset, sampler, lambda samples: answers_of(samples, dataset), num_workers=workers)
        )
    return [iterate(loader) for loader in loaders]


def step(iterators: list[CursorIterator]) -> list[list[str]]:
    return [next(it) for _ in range(iterators[0].sampler.num_microbatches) for it in iterators]


def test_streams_are_mixed_in_proportion_and_begin_anew(mixture: Callable[..., dict[str, Any]]) -> None:
    dataset = build_mm_dataset(mixture({"a": 3, "b": 2}, [{"weight": 2}, {"weight": 1}]))
    (straight,) = ranks_of(1, dataset, shuffle=False)
    by_hand = ["a0", "a1", "b0", "a2", "a0", "b1", "a1", "a2", "b0", "a0", "a1", "b1"]
    assert [next(straight)[0] for _ in range(12)] == by_hand
    assert list(chain.from_iterable(straight.one_pass())) == ["a0", "a1", "a2", "b0", "b1"]


def test_streams_without_weights_are_read_as_often_as_they_say(mixture: Callable[..., dict[str, Any]]) -> None:
    dataset = build_mm_dataset(mixture({"a": 3, "b": 2}, [{"repeat_time": 2}, {}]))
    (straight,) = ranks_of(1, dataset, shuffle=False)
    epoch = ["a0", "a1", "a2", "a0", "a1", "a2", "b0", "b1"]
    assert [next(straight)[0] for _ in range(16)] == epoch * 2
    (shuffled,) = ranks_of(1, dataset)
    epochs = [[next(shuffled)[0] for _ in range(8)] for _ in range(3)]
    assert all(sorted(one) == sorted(epoch) for one in epochs) and len({str(one) for one in epochs}) == 3


def test_a_position_in_other_streams_is_refused(
    mixture: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    weighted, plain = ([{"weight": 2}, {"weight": 1}], [{}, {}])
    for before, after in ((weighted, plain), (plain, weighted)):
        (straight,) = ranks_of(1, build_mm_dataset(mixture({"a": 3, "b": 2}, before)))
        next(straight)
        (other,) = ranks_of(1, build_mm_dataset(mixture({"a": 3, "b": 2}, after)))
        other.load_state_dict(straight.state_dict())
        assert "not the one that was saved: sources [[1, 1, " in capsys.readouterr().err
        with pytest.raises(UserError, match=r"cannot be restored .* resume with the data\.json that it was saved with"):
            next(other)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_packed_and_mixed_streams_go_on_on_any_number_of_ranks(
    workers: int, mixture: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mindspeed_mm.data.row_windows.WINDOW", 10)
    monkeypatch.setattr("mindspeed_mm.data.planning._PACKS", 2)
    counts = {"a": 23, "b": 7}
    param = mixture(counts, [{"weight": 2}, {"weight": 1}], packing=True, seq_length=80)
    dataset = build_mm_dataset(param)
    options = {"workers": workers, "global_batch_size": 4}
    straight = ranks_of(2, dataset, **options)
    states, steps = [], []
    for _ in range(7):
        states.append(straight[0].state_dict())
        assert straight[1].state_dict() == states[-1]
        steps.append(step(straight))
    order = [name for pack in chain.from_iterable(steps) for name in pack]
    assert len(order) > 2 * sum(counts.values())
    seen = Counter(order)
    assert abs(sum(n for name, n in seen.items() if name[0] == "b") - len(order) / 3) < 10  # a window is shuffled
    for name, count in counts.items():
        times = [seen[f"{name}{number}"] for number in range(count)]
        assert max(times) - min(times) <= 1 and min(times) >= 1, name
    for number, state in enumerate(states):
        for ranks in (1, 2, 4) if workers == 0 else (1,):
            again = ranks_of(ranks, dataset, **options)
            for iterator in again:
                iterator.load_state_dict(json.loads(json.dumps(state)))
            assert [step(again) for _ in steps[number : number + 2]] == steps[number : number + 2], (number, ranks)


def test_a_stream_can_be_sent_to_a_spawned_worker(dataset_param: Callable[..., dict[str, Any]]) -> None:
    @register_format("of a plugin")  # which pickle cannot name
    def read(row: Any, attr: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]}

    try:
        param = dataset_param([{"q": "?" * n, "a": f"a{n}"} for n in range(6)], streaming=True)
        param["attr"] = {"formatting": "of a plugin"}
        dataset = build_mm_dataset(param)
        row = next(iter(dataset.once()))
        again = pickle.loads(pickle.dumps(dataset))
        assert answers_of([again[row]], dataset) == ["a0"] and again.tokens_of(row) == len(again[row]["input_ids"])
        loader = {"batch_size": 1, "num_workers": 1, "max_seq_len": 64, "shuffle": False}
        batches = build_mm_dataloader(dataset, loader)
        spoken = [
            answer for batch in batches for answer in answers_of([{"labels": n} for n in batch["labels"]], dataset)
        ]
        assert sorted(spoken) == [f"a{n}" for n in range(6)]
    finally:
        del FORMATS["of a plugin"]


@pytest.mark.parametrize("kind", [*WRITERS, ".txt"])
def test_rows_that_are_passed_over_are_not_parsed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"rows{kind}"
    if kind in (".jsonl", ".txt"):
        path.write_text("\n\n".join(['\ufeff{"n": 0}', *(f'{{"n": {n}}}' for n in range(1, 5)), "{broken"]) + "\n")
    else:
        WRITERS[kind](path, [{"n": n} for n in range(2500)])
    files = RowFiles([path])
    whole = [(file, row, getattr(value, "reason", value)) for file, row, value in files]
    for skip in (0, 1, 3, len(whole) - 1, len(whole)):
        found = [(file, row, getattr(value, "reason", value)) for file, row, value in files.rows(skip)]
        assert found == whole[skip:], skip
    if kind == ".jsonl":
        monkeypatch.setattr("mindspeed_mm.data.rows.json.loads", None)
        assert list(files.rows(6)) == []


@pytest.mark.parametrize("capacity", [4096, 32768])
def test_packs_of_a_stream_are_full_and_only_a_window_is_held(capacity: int) -> None:
    lengths = log_normal(60_000, capacity)
    held = most = 0

    class Lengths:
        def stream(self, epoch: int, seed: int | None) -> FileRows:
            return FileRows([0], lambda file, skip: self.rows(skip))

        def rows(self, skip: int) -> Iterator[int]:
            nonlocal held, most
            for length in lengths[skip:].tolist():
                held += 1
                most = max(most, held)
                yield length

        def tokens_of(self, length: int) -> int:
            return length

    param = DataloaderParam(batch_size=1, seed=0, global_batch_size=1)
    sampler = build_sampler(Lengths(), param, 0, 1, pack_to=capacity)
    packs = tokens = 0
    for pack in sampler:
        packs, tokens, held = packs + 1, tokens + sum(pack), held - len(pack)
        assert sum(pack) <= capacity
    assert tokens == lengths.sum() and tokens / (packs * capacity) >= 0.98
    assert most < 2 * max(1000, 100 * capacity / lengths.mean())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.ranks)])
def test_bad_rows_keep_their_place_in_a_packed_stream(
    workers: int, dataset_param: Callable[..., dict[str, Any]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Row 2 is found when it is read, row 4 when its length is, row 6 when its picture is decoded."""
    digits = save_digits(tmp_path)
    silent = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<|image_pad|>"}]}
    rows = [digits[0], {"messages": 3}, digits[1], silent, digits[2], digits[7], digits[3], *named("a", 6)]
    param = dataset_param(rows, streaming=True, packing=True, seq_length=120)
    (tmp_path / "images/7.png").write_bytes((tmp_path / "images/7.png").read_bytes()[:-40])
    folder = save_tiny_hf_folder("qwen3_vl", tmp_path_factory.mktemp("model"))
    param["preprocess_parameters"]["model_name_or_path"] = str(folder)
    loader = {"batch_size": 1, "num_workers": workers, "drop_last": False}
    with pytest.raises(UserError, match=r"data\.jsonl:2: column 'messages' must be a list"):
        next(build_iterations(build_mm_dataloader(build_mm_dataset(param), loader))[0])

    param |= {"on_bad_sample": "quarantine", "bad_sample_budget": 3, "quarantine_folder": str(tmp_path / "bad")}
    dataset = build_mm_dataset(param)
    iterator = build_iterations(build_mm_dataloader(dataset, loader))[0]
    for _ in range(2):
        answers: list[str] = []
        samples = 0
        while samples < len(rows):
            batch = next(iterator)
            ends = batch["cu_seqlens"].tolist()
            samples += len(ends) - 1
            parts = [batch["labels"][0, start:end] for start, end in pairwise(ends)]
            answers += answers_of([{"labels": part} for part in parts], dataset)
        expected = [f"The answer is {n}." for n in range(4)] + [f"a{n}" for n in range(6)] + [""] * 3
        assert sorted(answers) == sorted(expected)
    listed = [json.loads(line)["row"] for line in (tmp_path / "bad/quarantine.jsonl").read_text().splitlines()]
    assert sorted(listed) == [2, 4, 6]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([{"max_samples": 2}, {}], r"mixture\.0: max_samples needs the number of rows"),
        ([{"repeat_time": 0.5}, {}], r"mixture\.0: a stream is read a whole number of times .*round repeat_time 0\.5"),
        ([{"weight": 1}, {"weight": 1, "repeat_time": 2}], r"mixture\.1: with weights a stream begins anew"),
    ],
)
def test_what_streams_of_a_mixture_cannot_do(
    entries: list[dict[str, Any]], problem: str, mixture: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match=problem):
        build_mm_dataset(mixture({"a": 3, "b": 2}, entries))
