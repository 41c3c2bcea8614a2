"""What recording leaves behind: nothing when off, whole files when killed, tensors when asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.recording.batch import read_batch
from mindspeed_mm.precision.recording.hooks import ModuleHooks
from mindspeed_mm.precision.recording.plan import read_plan
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.recording.rows import BatchRows
from mindspeed_mm.precision.records.record import Key, RankStep, Record, RecordWriter
from mindspeed_mm.precision.records.sketch import distance
from tests.precision.runs import record
from tests.precision.test_digest import of
from tests.ranks import RankPool
from tests.training.job import Job


def train_without_flags(folder: str, *flags: str) -> list[str]:
    """Train two steps; return what of us was attached or imported, looked at in the second."""
    from mindspeed_mm.training import pretrain
    from tests.training.script import Net, arguments

    for name in [name for name in sys.modules if name.startswith("mindspeed_mm.precision")]:
        del sys.modules[name]
    found: list[str] = []

    def forward_step(iterator: Any, model: Any) -> Any:
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                found.extend(str(hook) for hook in hooks.values() if "precision" in str(hook))
        imported = {name for name in sys.modules if name.startswith("mindspeed_mm.precision")}
        found.extend(
            imported
            - {
                f"mindspeed_mm.precision{name}"
                for name in ("", ".recording", ".recording.effective", ".recording.sites")
            }
        )  # the manifest
        return model(**next(iterator)), lambda loss: loss

    arguments(folder, *flags, steps=2)
    batch = {"x": torch.ones(2, 6), "y": torch.tensor([0, 1])}
    pretrain(lambda: (iter([batch] * 9), None, None), Net, None, forward_step)
    return found


def test_nothing_is_attached_or_imported_when_off(ranks1: RankPool, tmp_path: Path) -> None:
    assert ranks1.run(train_without_flags, str(tmp_path)) == [[]]
    (found,) = ranks1.run(
        train_without_flags, str(tmp_path), "--precision-capture", "steps=1", "--precision-dir", f"{tmp_path}/r"
    )
    assert any("ModuleHooks" in name for name in found), "the look would see it"


class Small(nn.Module):
    """A layer, a norm and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.norm = nn.Embedding(50, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(self.embed(input_ids))).square().mean()


def test_the_host_does_not_wait_within_a_step() -> None:
    """Nothing can be read from a tensor on the meta device: who waits for a value fails."""
    ids = torch.randint(50, (2, 5))
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    model, pool = Small().to("meta"), StepPool()
    hooks = ModuleHooks(model, pool)
    hooks.install()
    hooks.begin_micro_batch(BatchRows(read_batch(batch), torch.device("meta")))
    model(**{name: value.to("meta") for name, value in batch.items()}).backward()
    for name, parameter in model.named_parameters():
        pool.add_whole(Key("grad_reduced", name, "gradient"), parameter.grad)
    hooks.remove()
    with pytest.raises(NotImplementedError):
        pool.read()


def test_a_module_that_is_called_twice_has_two_sites() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(self.layer(x))).sum()

    torch.manual_seed(0)
    model, pool, x = Twice(), StepPool(), torch.randn(3, 4)
    hooks = ModuleHooks(model, pool, keep=("layer",))
    hooks.install()
    hooks.begin_micro_batch(BatchRows(read_batch({"x": x}), torch.device("cpu")))
    model(x).backward()
    hooks.remove()
    entries = pool.read()
    first, second = hooks.kept["layer"]
    hidden = torch.relu(first.tensors["output.0"]).requires_grad_()
    model.layer(hidden).sum().backward()
    for what, expected in (("output.0@1", model(x).new_tensor(0)), ("grad_input.0@1", hidden.grad)):
        assert Key("forward" if what[0] == "o" else "backward", "layer", what) in entries
        if what[0] == "g":
            assert torch.equal(second.tensors["grad_input.0"], expected)
    assert torch.equal(second.tensors["output.0"], model.layer(second.args[0]))


def test_a_killed_run_leaves_whole_steps(tmp_path: Path) -> None:
    writers = [RecordWriter(tmp_path, rank, 2) for rank in range(2)]
    writers[0].start({"a": 1})
    data = RankStep(entries={Key("weights", "w", "parameter"): of(torch.ones(3))})
    for writer in writers:
        writer.write(0, data)
    writers[0].write(1, data)
    (tmp_path / "step_0000001" / "rank_00001.npz.tmp").write_bytes(b"half")
    assert Record.open(tmp_path).steps == [0]
    writers[1].write(1, data)
    assert Record.open(tmp_path).steps == [0, 1]
    writers[0].start({"a": 2}, first_step=1)
    assert Record.open(tmp_path).steps == [0] and Record.open(tmp_path).manifest["a"] == 2


def test_kept_tensors_are_those_of_the_step(job: Job, hf_folder: Path, ranks2: RankPool, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    site = "model.language_model.layers.1"
    capture = f"steps=0,tensors={site}*,model.visual.merger"
    run = record(ranks2, job, tmp_path / "r", micro_batch_size=2, train_iters=1, precision_capture=capture)
    step, model = run.step(0), AutoModelForImageTextToText.from_pretrained(hf_folder, dtype=torch.float32)
    name = f"{site}.mlp.down_proj.weight"
    before = step.tensor(Key("weights", name, "parameter"))
    assert before is not None and torch.equal(before, model.get_parameter(name))
    for key in (Key("grad_clipped", name, "gradient"), Key("optimizer", name, "exp_avg")):
        tensor = step.tensor(key)
        assert tensor is not None and distance(of(tensor), step.entries[key]).relative < 1e-6
    calls = step.calls(f"{site}.mlp")
    assert [(call.rank, call.micro_batch) for call in calls] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with torch.no_grad():
        for call in calls:
            assert torch.allclose(model.get_submodule(f"{site}.mlp")(*call.args), call.output, rtol=1e-5, atol=1e-7)
            assert call.tensors["grad_output.0"].shape == call.output.shape
    layer = step.calls(site)[0]
    with torch.no_grad():
        output = model.get_submodule(site)(*layer.args, **layer.kwargs)
    assert torch.allclose(output, layer.output, rtol=1e-5, atol=1e-6)
    assert step.tensor(Key("forward", site, "output.0")) is not None


def test_the_manifest_says_what_is_in_force(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    found = record(
        ranks2, job, tmp_path / "r", micro_batch_size=2, precision_capture="steps=0,level=parameter", lr_warmup_iters=1
    )
    effective = found.manifest["effective"]
    assert effective["norm_eps"]["model.language_model.layers.0.input_layernorm"] == 1e-6
    assert effective["rope_base"] == {
        "model.visual.rotary_pos_emb": 10000.0,
        "model.language_model.rotary_emb": 10000.0,
    }
    assert effective["dtypes"] == {"float32": 64} and effective["mesh"] == {"shard": 2}
    assert effective["mixed_precision"] == {"param_dtype": None, "reduce_dtype": None, "output_dtype": None}
    assert [group["betas"] for group in effective["groups"]] == [[0.9, 0.999]] * 2
    assert sorted(name for group in effective["groups"] for name in group["parameters"]) == sorted(
        key.site for key in found.weights if key.what == "parameter"
    )
    assert effective["learning_rates"] == {"0": 0.0, "1": 1e-3, "2": 0.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [("step=0", "steps"), ("steps=3-1", "3-1"), ("steps=a", "steps=a"), ("level=op", "module"), ("0-1", "no key")],
)
def test_a_plan_that_cannot_be_read_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_plan(text)


def test_a_plan_is_read() -> None:
    plan = read_plan("steps=0-2,7,level=module,tensors=a.*,b")
    assert plan.steps == {0, 1, 2, 7} and plan.modules and plan.tensors == ("a.*", "b")
