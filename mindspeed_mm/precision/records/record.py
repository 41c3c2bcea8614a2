"""The files of a record: what one run computed at some of its steps. The only module that knows how they look.

    <folder>/manifest.json                        what the run was made of
    <folder>/step_0000003/rank_00000.npz          one rank's sketches, and an index of them
    <folder>/step_0000003/rank_00000.pt           tensors, where they were asked for

Every file is written beside its place and moved there, so a killed run leaves whole files or none. A step counts once
all its ranks have written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.records.entries import PHASES, Call, Key, RankStep, SampleFingerprint
from mindspeed_mm.precision.records.sketch import Sketch

__all__ = ["PHASES", "Call", "Key", "RankStep", "Record", "RecordWriter", "SampleFingerprint", "StepRecord"]

MANIFEST = "manifest.json"
FORMAT = 1


class RecordWriter:
    """Writes one rank's part of a record.

    Args:
        folder: of the record; made if it is not there. Steps that an earlier run has left in it are removed by
            :meth:`start`.
        rank: of this process.
        world_size: ranks that write.
    """

    def __init__(self, folder: str | Path, rank: int = 0, world_size: int = 1) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self.world_size = world_size

    def start(self, manifest: Mapping[str, Any], first_step: int = 0) -> None:
        """Write the manifest and forget the steps from ``first_step`` on. Rank 0 calls it, before any rank writes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("step_*"):
            if (step := _step_of(path)) is not None and step >= first_step:
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
        self.write_manifest(manifest)

    def forget_mine(self) -> None:
        """Remove what this rank wrote in an earlier run, where no rank may touch what the others are writing now."""
        for file in self.folder.glob(f"step_*/rank_{self.rank:05d}.*"):
            file.unlink()

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest. Rank 0 calls it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {**manifest, "precision_format": FORMAT, "world_size": self.world_size}
        _write(self.folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False, default=str).encode())

    def write(self, step: int, data: RankStep) -> None:
        """Write this rank's part of ``step``, the number of iterations done before it."""
        folder = self.folder / f"step_{step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        if data.tensors or data.calls:
            tensors = [(asdict(key), value.detach().cpu(), *about) for key, value, *about in data.tensors]
            calls = {site: [vars(call) for call in calls] for site, calls in data.calls.items()}
            _write(folder / f"rank_{self.rank:05d}.pt", lambda file: torch.save([tensors, calls], file))
        arrays = _to_arrays(data)
        _write(folder / f"rank_{self.rank:05d}.npz", lambda file: np.savez_compressed(file, **arrays))


class Record:
    """What a run left; see :meth:`open`.

    Attributes:
        folder: it lies here.
        manifest: what the run was made of, with ``effective`` values read from its live objects.
        ranks: that wrote.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.ranks = list(range(int(manifest["world_size"])))

    @classmethod
    def open(cls, folder: str | Path) -> Record:
        """Read a record, given its folder or that of the run (``--save``) it lies in.

        Raises:
            UserError: there is none, or one of a later version.
        """
        folders = [Path(folder), Path(folder) / "precision"]
        found = next((path for path in folders if (path / MANIFEST).is_file()), None)
        if found is None:
            raise UserError(
                f"{folder}: no record of a run ({MANIFEST} is missing). Train with --precision-capture steps=0-1 and "
                "--save or --precision-dir, and pass that folder."
            )
        try:
            manifest = json.loads((found / MANIFEST).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{found / MANIFEST}: not JSON ({error}); record the run again.") from error
        if manifest.get("precision_format") != FORMAT:
            raise UserError(
                f"{found / MANIFEST}: precision_format is {manifest.get('precision_format')}, this version reads "
                f"{FORMAT}; record the run again, or use the version that wrote it."
            )
        return cls(found, manifest)

    @property
    def steps(self) -> list[int]:
        """The steps that all ranks have written, in order; 0 is the first of a run."""
        found = []
        for path in self.folder.glob("step_*"):
            step = _step_of(path)
            if step is not None and all((path / f"rank_{rank:05d}.npz").exists() for rank in self.ranks):
                found.append(step)
        return sorted(found)

    def step(self, step: int) -> StepRecord:
        """Return one step.

        Raises:
            UserError: it was not recorded.
        """
        if step not in self.steps:
            raise UserError(f"{self.folder}: step {step} was not recorded; there are {self.steps}.")
        return StepRecord(self.folder / f"step_{step:07d}", step, self.ranks)

    @cached_property
    def weights(self) -> dict[Key, Sketch]:
        """The parameters as the first recorded step found them; empty without a step."""
        return self.step(self.steps[0]).of_phase("weights") if self.steps else {}


class StepRecord:
    """One step of a record, all ranks together; read when asked for."""

    def __init__(self, folder: Path, step: int, ranks: Sequence[int]) -> None:
        self.folder = folder
        self.step = step
        self.ranks = list(ranks)

    @cached_property
    def _parts(self) -> list[RankStep]:
        return [_from_arrays(self.folder / f"rank_{rank:05d}.npz") for rank in self.ranks]

    @cached_property
    def entries(self) -> dict[Key, Sketch]:
        """All sketches, merged over ranks and micro-batches, in the order of first execution."""
        order = _by_stage(_merged_order([list(part.entries) for part in self._parts]), self._parts)
        found = {key: [part.entries[key] for part in self._parts if key in part.entries] for key in order}
        return {key: _merge(sketches) for key, sketches in found.items()}

    def of_rank(self, rank: int) -> dict[Key, Sketch]:
        """Return what one rank saw, its micro-batches added up."""
        return self._parts[self.ranks.index(rank)].entries

    def of_phase(self, phase: str) -> dict[Key, Sketch]:
        """Return the merged entries of one phase."""
        return {key: sketch for key, sketch in self.entries.items() if key.phase == phase}

    @cached_property
    def scalars(self) -> dict[str, float]:
        """``loss`` (of the global batch, as it is optimised), ``grad_norm``, ``learning_rate``, ``num_tokens``, ..."""
        merged: dict[str, float] = {}
        for part in self._parts:
            for name, (value, how) in part.scalars.items():
                if how == "sum":
                    merged[name] = merged.get(name, 0.0) + value
                elif how == "same":
                    merged.setdefault(name, value)
        return merged

    @cached_property
    def samples(self) -> list[SampleFingerprint]:
        """The samples of the global batch, by position where that is known."""
        samples = [sample for part in self._parts for sample in part.samples]
        return sorted(samples, key=lambda s: (s.position is None, s.position or 0))

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: ``class``, ``names`` of the parameters, ``lr``, ``betas`` and so on."""
        return self._parts[0].groups

    @property
    def tree(self) -> dict[str, str]:
        """Class of each module by path, parents before children, children in their order."""
        return self._parts[0].tree

    @property
    def notes(self) -> list[str]:
        """What a reader should know, such as logits that never were in memory as a whole."""
        return list(dict.fromkeys(note for part in self._parts for note in part.notes))

    @cached_property
    def _kept(self) -> list[tuple[list[Any], dict[str, Any]]]:
        files = [self.folder / f"rank_{rank:05d}.pt" for rank in self.ranks]
        return [torch.load(file, weights_only=True) if file.exists() else ([], {}) for file in files]

    def tensor(self, key: Key) -> Tensor | None:
        """Return a kept tensor, put together from all ranks' parts; None if it was not kept.

        Inputs and outputs are those of the first call on the first rank, as in :meth:`calls`.
        """
        parts = self._tensors.get(key)
        if not parts:
            return self._of_call(key)
        if parts[0][2] is None:
            return parts[0][1]
        whole = torch.empty(parts[0][3], dtype=parts[0][1].dtype)
        for _, value, part, _ in parts:
            whole[tuple(slice(offset, offset + size) for offset, size in part)] = value
        return whole

    @cached_property
    def _tensors(self) -> dict[Key, list[Any]]:
        found: dict[Key, list[Any]] = {}
        for tensors, _ in self._kept:
            for item in tensors:
                found.setdefault(Key(**item[0]), []).append(item)
        return found

    def calls(self, site: str) -> list[Call]:
        """Return the kept calls of a module, all ranks, in the order of execution on each."""
        return [Call(**call) for _, calls in self._kept for call in calls.get(site, [])]

    def _of_call(self, key: Key) -> Tensor | None:
        what, _, number = key.what.partition("@")
        calls = (call for call in self.calls(key.site) if call.index == int(number or 0))
        return next((call.tensors[what] for call in calls if what in call.tensors), None)


def _merge(sketches: Sequence[Sketch]) -> Sketch:
    """Return the sketch of the full tensor from those of the ranks."""
    counted = [sketch for sketch in sketches if not sketch.copy] or sketches[:1]
    by_part: dict[Any, Sketch] = {}
    for sketch in counted:
        if sketch.part not in by_part:
            by_part[sketch.part] = sketch
        elif sketch.summed:
            by_part[sketch.part] = by_part[sketch.part] + sketch
    merged, *others = by_part.values()
    for sketch in others:
        merged = merged + sketch
    return replace(merged, part=None, copy=False)


def _merged_order(orders: Iterable[list[Key]]) -> list[Key]:
    """Return all keys in an order that fits each list as far as possible: a new key follows the one before it."""
    first, *others = orders
    merged: list[Key] = list(first)
    known: set[Key] = set(merged)
    for order in others:
        previous = None
        for key in order:
            if key not in known:
                known.add(key)
                merged.insert(len(merged) if previous is None else merged.index(previous) + 1, key)
            previous = key
    return merged


def _by_stage(order: list[Key], parts: Iterable[RankStep]) -> list[Key]:
    """Return keys in the order in which a pipeline runs: through its stages, and back."""
    stages: dict[Key, int] = {}
    for part in parts:
        for key, stage in part.stages.items():
            stages.setdefault(key, stage)
    if not any(stages.values()):
        return order
    back = {"backward": -1}
    return sorted(order, key=lambda key: (PHASES.index(key.phase), back.get(key.phase, 1) * stages.get(key, 0)))


def _step_of(path: Path) -> int | None:
    number = path.name.removeprefix("step_")
    return int(number) if number.isdigit() else None


def _write(path: Path, content: Any) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


_FLOATS = ("total", "square_sum", "maximum", "minimum")
_WORDS = ("dtype", "shape", "rows", "part", "copy", "summed", "estimated", "count", "nonfinite")


def _to_arrays(data: RankStep) -> dict[str, np.ndarray]:
    index = {
        "entries": [[*vars(key).values(), *(getattr(s, name) for name in _WORDS)] for key, s in data.entries.items()],
        "scalars": data.scalars,
        "samples": [asdict(sample) for sample in data.samples],
        "groups": data.groups,
        "tree": data.tree,
        "notes": data.notes,
        "stages": [data.stages.get(key, 0) for key in data.entries],
    }
    sketches = list(data.entries.values())
    vectors = np.array([s.vector for s in sketches], dtype=np.float32)
    floats = np.array([[getattr(s, name) for name in _FLOATS] for s in sketches], dtype=np.float64)
    text = json.dumps(index, ensure_ascii=False, default=str).encode()
    return {"vectors": vectors, "floats": floats, "index": np.frombuffer(text, dtype=np.uint8)}


def _from_arrays(path: Path) -> RankStep:
    with np.load(path, allow_pickle=False) as file:
        vectors, floats, index = file["vectors"].astype(np.float64), file["floats"], json.loads(file["index"].tobytes())
    entries = {}
    for (phase, site, what, *words), vector, numbers in zip(index["entries"], vectors, floats, strict=True):
        values: dict[str, Any] = dict(zip((*_WORDS, *_FLOATS), [*words, *map(float, numbers)], strict=True))
        values["shape"] = None if values["shape"] is None else tuple(values["shape"])
        values["part"] = None if values["part"] is None else tuple((o, s) for o, s in values["part"])
        entries[Key(phase, site, what)] = Sketch(vector=vector, **values)
    return RankStep(
        entries=entries,
        scalars={name: (value, how) for name, (value, how) in index["scalars"].items()},
        samples=[SampleFingerprint(**{**s, "tokens": tuple(s["tokens"])}) for s in index["samples"]],
        groups=index["groups"],
        tree=index["tree"],
        notes=index["notes"],
        stages=dict(zip(entries, index.get("stages", ()), strict=False)),
    )
