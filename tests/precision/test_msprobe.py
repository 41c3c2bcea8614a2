"""Dumps of msprobe become references, and records become dumps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mindspeed_mm.precision.msprobe import import_msprobe
from mindspeed_mm.precision.records.record import Key, RankStep, Record, RecordWriter
from mindspeed_mm.precision.records.sketch import Sketch
from tests.precision.command import run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.GELU())
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def statistics(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "type": "torch.Tensor", "dtype": str(tensor.dtype), "shape": list(tensor.shape), "requires_grad": True,
        "Max": tensor.max().item(), "Min": tensor.min().item(), "Mean": tensor.mean().item(),
        "Norm": torch.norm(tensor).item(),
    }  # fmt: skip


def dump(folder: Path, scale: float = 1.0, micro_batches: int = 1) -> dict[str, torch.Tensor]:
    """Write what msprobe's hooks see of a step at level L0; return what the record has to hold."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.head.weight *= scale
    data: dict[str, Any] = {}
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, tensor: torch.Tensor) -> dict[str, Any]:
        seen.setdefault(name, []).append(tensor.detach().clone())
        return statistics(tensor.detach())

    calls: dict[str, int] = {}
    for name, module in net.named_modules():
        if name in ("", "body"):
            continue
        kind = type(module).__name__

        def before(module: nn.Module, args: Any, output: Any, name: str = name, kind: str = kind) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            data[f"Module.module.{name}.{kind}.forward.{call}"] = {
                "input_args": [keep(f"{name}/input", args[0])], "input_kwargs": {}, "is_recompute": False,
                "output": [keep(f"{name}/output", output)],
                "parameters": {key: statistics(p.detach()) for key, p in module.named_parameters()},
            }  # fmt: skip

        def after(module: nn.Module, inputs: Any, outputs: Any, name: str = name, kind: str = kind) -> None:
            data[f"Module.module.{name}.{kind}.backward.{calls[name]}"] = {
                "input": [keep(f"{name}/grad_output", outputs[0])],
                "output": [keep(f"{name}/grad_input", inputs[0])] if inputs[0] is not None else [None],
            }

        module.register_forward_hook(before)
        module.register_full_backward_hook(after)
    for _ in range(micro_batches):
        net(torch.randn(4, 6, requires_grad=True)).square().sum().backward()
    for name, parameter in net.named_parameters():
        owner, _, own = name.rpartition(".")
        entry = data.setdefault(f"Module.module.{owner}.Linear.parameters_grad.0", {})
        entry[own] = [keep(f"{name}/gradient", parameter.grad)]
        seen[f"{name}/parameter"] = [parameter.detach()]
    data["Functional.linear.0.forward"] = {"input_args": [], "output": []}
    target = folder / "step0/proc123"
    target.mkdir(parents=True)
    content = {"task": "statistics", "level": "mix", "framework": "pytorch", "dump_data_dir": None, "data": data}
    (target / "dump.json").write_text(json.dumps(content))
    return {name: torch.cat([t.flatten() for t in tensors]) for name, tensors in seen.items()}


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_was_dumped_is_in_the_record(micro_batches: int, tmp_path: Path) -> None:
    tensors = dump(tmp_path / "dump", micro_batches=micro_batches)
    assert import_msprobe(tmp_path / "dump", tmp_path / "record") == [0]
    step = Record.open(tmp_path / "record").step(0)
    phases = {"input": "forward", "output": "forward", "grad_input": "backward", "grad_output": "backward"}
    for name, tensor in tensors.items():
        site, what = name.split("/")
        numbered = what in phases
        phase = phases.get(what, "weights" if what == "parameter" else "grad_reduced")
        sketch = step.entries[Key(phase, site, f"{what}.0" if numbered else what)]
        expected = tensor.double().numpy()
        assert sketch.count == expected.size
        np.testing.assert_allclose(sketch.norm, np.linalg.norm(expected), rtol=1e-6)
        np.testing.assert_allclose(sketch.mean, expected.mean(), rtol=1e-5, atol=1e-7)
        assert (sketch.maximum, sketch.minimum) == pytest.approx((expected.max(), expected.min()))
    assert step.tree["body.0"] == "Linear" and "norms only" in step.notes[0]


def test_the_command_says_that_it_is_degraded_and_what_is_no_dump(tmp_path: Path) -> None:
    dump(tmp_path / "dump")
    code, text = run("import-msprobe", tmp_path / "dump", tmp_path / "record")
    assert code == 0 and "norms only" in text
    assert run("import-msprobe", tmp_path / "dump/step0/proc123/dump.json", tmp_path / "again")[0] == 0
    (tmp_path / "bad/step0/rank0").mkdir(parents=True)
    (tmp_path / "bad/step0/rank0/dump.json").write_text('{"data": {"Functional.a.0.forward": {}}}')
    code, text = run("import-msprobe", tmp_path / "bad", tmp_path / "x")
    assert code == 2 and "no module in it" in text
    assert run("import-msprobe", tmp_path / "none", tmp_path / "x")[0] == 2


def test_an_imported_reference_is_compared_by_norms(tmp_path: Path) -> None:
    compare = pytest.importorskip("mindspeed_mm.precision.comparing.compare").compare
    for name, scale in (("a", 1.0), ("same", 1.0), ("other", 1.02)):
        dump(tmp_path / f"{name}.dump", scale)
        import_msprobe(tmp_path / f"{name}.dump", tmp_path / name)
    reference, same, other = (Record.open(tmp_path / name) for name in ("a", "same", "other"))
    assert compare(reference, same).exit_code == 0
    found = compare(reference, other).first
    assert found is not None and found.phase == "weights" and found.site.startswith("head")


def sketch_of(tensor: torch.Tensor) -> Sketch:
    flat = tensor.double().numpy()
    return Sketch(
        vector=np.ones(32), count=flat.size, total=flat.sum(), square_sum=(flat**2).sum(), maximum=flat.max(),
        minimum=flat.min(), nonfinite=0, dtype="float32", shape=tuple(tensor.shape), rows="token",
    )  # fmt: skip


def test_a_record_comes_back_from_its_dump(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tree = {"": "Model", "body": "Body", "body.norm": "RMSNorm"}
    entries = {
        Key("weights", "body.norm.weight", "parameter"): sketch_of(torch.randn(4)),
        Key("forward", "body", "input.0"): sketch_of(torch.randn(2, 4)),
        Key("forward", "body.norm", "input.0"): sketch_of(torch.randn(2, 4)),
        Key("forward", "body.norm", "output.0"): sketch_of(torch.randn(2, 4)),
        Key("forward", "body", "output.0"): sketch_of(torch.randn(2, 4)),
        Key("backward", "body.norm", "grad_output.0"): sketch_of(torch.randn(2, 4)),
        Key("grad_local", "body.norm.weight", "gradient"): sketch_of(torch.randn(4)),
    }
    writer = RecordWriter(tmp_path / "record")
    writer.start({})
    for step in (0, 2):
        writer.write(step, RankStep(entries=entries, tree=tree))
    code, text = run("export-msprobe", tmp_path / "record", tmp_path / "dump")
    assert code == 0 and "2 steps" in text
    files = {path.name for path in (tmp_path / "dump/step2/rank0").iterdir()}
    assert files == {"dump.json", "stack.json", "construct.json"}
    parents = json.loads((tmp_path / "dump/step2/rank0/construct.json").read_text())
    assert parents["Module.body.norm.RMSNorm.forward.0"] == "Module.body.Body.forward.0"
    assert parents["Module.body.Body.forward.0"] is None
    assert import_msprobe(tmp_path / "dump", tmp_path / "back") == [0, 2]
    back = Record.open(tmp_path / "back").step(2).entries
    for key, sketch in entries.items():
        assert back[key].norm == pytest.approx(sketch.norm) and back[key].shape == sketch.shape
