"""Records to and from the folders of msprobe, the Ascend dump tool: ``step0/rank0/{dump,stack,construct}.json``.

Its dumps hold statistics of each process's own tensors. So what is imported can be compared by norms only: what keeps a
tensor's norm, such as exchanged samples or heads, is not seen, and tensors with padding are not compared at all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.records.record import Key, RankStep, Record, RecordWriter, StepRecord
from mindspeed_mm.precision.records.sketch import SIZE, Sketch

_NAME = re.compile(
    r"Module\.(?P<site>.+)\.(?P<kind>\w+)\.(?P<what>forward|backward|parameters_grad)(?:\.(?P<call>\d+))?$"
)
_STEP = re.compile(r"step(\d+)$")
_RANK = re.compile(r"(?:rank|proc)\d*$")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
_FILES = ("dump.json", "stack.json", "construct.json")
DEGRADED = (
    "imported from msprobe: norms only, of one process; "
    "what keeps a norm (exchanged samples, permuted heads) is not seen"
)


def import_msprobe(dump: Path, out: Path, rank: int = 0) -> list[int]:
    """Write a record from what msprobe dumped at level L0 or mix.

    Several calls of a module in a step are taken for micro-batches and added up.

    Args:
        dump: its ``dump_path``, a step's folder or a ``dump.json``.
        out: folder of the record.
        rank: which process's dump to read, where there are several.

    Returns:
        The steps that were found.

    Raises:
        UserError: there is no dump, or it has no modules.
    """
    writer = RecordWriter(out)
    files = _dumps(dump, rank)
    writer.start({"source": "msprobe", "dump": str(dump), "degraded": DEGRADED, "rank": rank})
    for step, file in files.items():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            data = content["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not a dump of msprobe ({error}); pass its dump_path") from error
        entries: dict[Key, Sketch] = {}
        tree: dict[str, str] = {"": "Module"}
        for key, sketch in _entries(data, tree, alone=len(_processes(file.parent.parent)) == 1):
            entries[key] = entries[key] + sketch if key in entries and key.phase != "weights" else sketch
        if not entries:
            raise UserError(f"{file}: no module in it; dump with level L0 or mix and task statistics or tensor")
        writer.write(step, RankStep(entries=entries, tree=tree, notes=[DEGRADED]))
    return sorted(files)


def export_msprobe(record: Record, out: Path) -> int:
    """Write each step of a record as msprobe would have dumped it on one process; its graph viewer shows it.

    Returns:
        The number of steps written.
    """
    for number in record.steps:
        step = record.step(number)
        folder = out / f"step{number}" / "rank0"
        folder.mkdir(parents=True, exist_ok=True)
        data = _as_dump(step)
        header = {"task": "statistics", "level": "L0", "framework": "pytorch", "dump_data_dir": None}
        stack = {"0": {"data": list(data), "info": ["recorded by mindspeed-mm, without call stacks"]}}
        contents: list[Any] = [{**header, "data": data}, stack, _parents(step, data)]
        for name, content in zip(_FILES, contents, strict=True):
            (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return len(record.steps)


def _dumps(dump: Path, rank: int) -> dict[int, Path]:
    if dump.is_file():
        return {0: dump}
    steps = (
        [dump] if _STEP.search(dump.name) else sorted(path for path in dump.glob("step*") if _STEP.search(path.name))
    )
    found: dict[int, Path] = {}
    for path in steps or [dump]:
        processes = _processes(path)
        named = [process for process in processes if process.name == f"rank{rank}"]
        chosen = named or (processes if len(processes) == 1 else [])
        if chosen:
            name = _STEP.search(path.name)
            found[int(name[1]) if name else 0] = chosen[0] / "dump.json"
    if not found:
        raise UserError(f"{dump}: no dump.json of rank {rank} in it; pass msprobe's dump_path, and --rank")
    return found


def _processes(step: Path) -> list[Path]:
    return sorted(p for p in step.iterdir() if _RANK.match(p.name) and (p / "dump.json").is_file())


def _entries(data: Mapping[str, Any], tree: dict[str, str], alone: bool) -> Iterator[tuple[Key, Sketch]]:
    shapes: dict[str, list[Any]] = {}
    for name, value in data.items():
        found = _NAME.match(name)
        if not found:
            continue  # an operator of level mix
        site = _WRAPPERS.sub("", found["site"])
        tree.setdefault(site, found["kind"])
        if found["what"] == "forward":
            given = value.get("input_args", value.get("input", []))
            if not given:  # by keyword: the first one is what HF layers work on
                given = [next((v for v in value.get("input_kwargs", {}).values() if _is_tensor(v)), None)]
            yield from _numbered("forward", site, "input", given)
            yield from _numbered("forward", site, "output", value.get("output", []))
            shapes[site] = [item.get("shape") for item in value.get("output", []) if _is_tensor(item)]
            for parameter, stored in (value.get("parameters") or {}).items():
                if sketch := _sketch(stored):
                    yield Key("weights", f"{site}.{parameter}", "parameter"), sketch
        elif found["what"] == "backward":
            ends = [value.get("input", []), value.get("output", [])]
            # Versions differ in which of the two they call input; the gradient of an output has its shape.
            if [item.get("shape") for item in ends[0] if _is_tensor(item)] != shapes.get(site):
                swapped = [item.get("shape") for item in ends[1] if _is_tensor(item)] == shapes.get(site)
                ends = ends[::-1] if swapped else ends
            yield from _numbered("backward", site, "grad_output", ends[0])
            yield from _numbered("backward", site, "grad_input", ends[1])
        else:
            for parameter, stored in value.items():
                if sketch := _sketch(stored[0] if isinstance(stored, list) and stored else stored):
                    for phase in ("grad_local", "grad_reduced") if alone else ("grad_local",):
                        yield Key(phase, f"{site}.{parameter}", "gradient"), sketch


def _numbered(phase: str, site: str, what: str, values: Any) -> Iterator[tuple[Key, Sketch]]:
    for number, value in enumerate(values if isinstance(values, list) else [values]):
        if sketch := _sketch(value):
            yield Key(phase, site, f"{what}.{number}"), sketch


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Mapping) and "shape" in value and "Norm" in value


def _sketch(value: Any) -> Sketch | None:
    if not _is_tensor(value):
        return None
    try:
        norm, mean, high, low = (float(value[name]) for name in ("Norm", "Mean", "Max", "Min"))
    except (TypeError, ValueError):  # null for integers and private formats
        return None
    shape = tuple(int(size) for size in value["shape"])
    count = math.prod(shape)
    finite = all(map(math.isfinite, (norm, mean, high, low)))
    return Sketch(
        vector=np.zeros(SIZE),
        count=count,
        total=mean * count,
        square_sum=norm**2,
        maximum=high,
        minimum=low,
        nonfinite=0 if finite else 1,
        dtype=str(value["dtype"]).rpartition(".")[2].lower(),
        shape=shape,
        rows="index",  # compared by norms
    )


def _as_dump(step: StepRecord) -> dict[str, Any]:
    forward: dict[str, Any] = {}
    backward: dict[str, Any] = {}
    gradients: dict[str, Any] = {}
    for key, sketch in step.entries.items():
        value = _statistics(sketch)
        site, what = key.site, key.what.partition(".")[0]
        owner = site.rpartition(".")[0]
        if key.phase == "forward" and what in ("input", "output"):
            _module(forward, step, site)["input_args" if what == "input" else "output"].append(value)
        elif key.phase == "weights" and owner in step.tree:
            _module(forward, step, owner)["parameters"][site.rpartition(".")[2]] = value
        elif key.phase == "backward" and what in ("grad_input", "grad_output"):
            entry = backward.setdefault(_named(step, site, "backward.0"), {"input": [], "output": []})
            entry["input" if what == "grad_output" else "output"].append(value)
        elif key.phase == "grad_local" and owner in step.tree:
            entry = gradients.setdefault(_named(step, owner, "parameters_grad.0"), {})
            entry[site.rpartition(".")[2]] = [value]
    return {**forward, **backward, **gradients}


def _module(forward: dict[str, Any], step: StepRecord, site: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"input_args": [], "input_kwargs": {}, "output": [], "parameters": {}}
    found: dict[str, Any] = forward.setdefault(_named(step, site, "forward.0"), empty)
    return found


def _named(step: StepRecord, site: str, what: str) -> str:
    return f"Module.{site or 'root'}.{step.tree.get(site, 'Module')}.{what}"


def _statistics(sketch: Sketch) -> dict[str, Any]:
    return {
        "type": "torch.Tensor",
        "dtype": f"torch.{sketch.dtype}",
        "shape": list(sketch.shape or (sketch.count,)),
        "Max": sketch.maximum,
        "Min": sketch.minimum,
        "Mean": sketch.mean,
        "Norm": sketch.norm,
        "requires_grad": False,
    }


def _parents(step: StepRecord, data: Mapping[str, Any]) -> dict[str, str | None]:
    """Return for each entry the module that it lies in."""
    parents: dict[str, str | None] = {}
    for name in data:
        found = _NAME.match(name)
        assert found is not None
        site = "" if found["site"] == "root" else found["site"]
        what = f"{found['what']}.0" if found["what"] != "parameters_grad" else "backward.0"
        parent: str | None = None
        while site and parent is None:
            site = site.rpartition(".")[0]
            candidate = _named(step, site, what)
            parent = candidate if candidate in data else None
        parents[name] = parent
    return parents
