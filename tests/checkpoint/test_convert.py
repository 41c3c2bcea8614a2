from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from mindspeed_mm import cli
from mindspeed_mm.checkpoint import store
from mindspeed_mm.checkpoint.convert import copy_checkpoint, dcp_to_hf, hf_to_dcp
from mindspeed_mm.checkpoint.publish import find
from mindspeed_mm.errors import UserError
from tests.checkpoint import hf
from tests.models.tiny import FAMILIES


class Wrapper(nn.Module):
    """Names weights as TransformersModel does."""

    def __init__(self, family: str, tie: bool) -> None:
        super().__init__()
        self.model = hf.model_class(family)._from_config(hf.config_of(family, tie), dtype=torch.float32)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str) -> tuple[int, str, str]:
    """Run a command line in this process and return exit code, stdout and stderr."""
    program, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as stop:
        (cli.main if program == "mindspeed-mm" else cli.mm_convert)()
        raise SystemExit(0)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(tmp_path: Path, family: str, tie: bool) -> None:
    expected = hf.write_folder(tmp_path / "hf", family, tie, max_shard_size="60KB")
    assert hf_to_dcp(tmp_path / "hf", tmp_path / "dcp") == tmp_path / "dcp" / "release"
    assert (tmp_path / "dcp" / "latest_checkpointed_iteration.txt").read_text() == "release"

    wrapper = Wrapper(family, tie)
    loaded = store.load(tmp_path / "dcp", model=wrapper, optimizer=None)
    assert (loaded.iteration, loaded.rank_state) == (0, None)
    assert not hf.differing(expected, hf.tensors_of(wrapper.model))

    store.save(tmp_path / "run", 5, model=wrapper, optimizer=None, extra={}, rank_state={})
    dcp_to_hf(tmp_path / ("dcp/release" if tie else "run"), tmp_path / "out", tmp_path / "hf")
    native = getattr(transformers, hf.config_of(family, tie).architectures[0])
    assert not hf.differing(expected, hf.read_back(tmp_path / "out", native))
    assert hf.keys_on_disk(tmp_path / "hf") == hf.keys_on_disk(tmp_path / "out")


def test_checkpoint_of_a_bare_model(tmp_path: Path) -> None:
    expected = hf.write_folder(tmp_path / "hf", "qwen3", False)
    model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "hf")
    store.save(tmp_path / "run", 1, model=model, optimizer=None, extra={}, rank_state={})
    dcp_to_hf(tmp_path / "run", tmp_path / "out", tmp_path / "hf", dtype=torch.bfloat16)
    back = hf.read_back(tmp_path / "out", type(model))
    assert torch.equal(back["lm_head.weight"], expected["lm_head.weight"].bfloat16())


def test_errors(tmp_path: Path) -> None:
    hf.write_folder(tmp_path / "hf", "qwen3", False)
    hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    with pytest.raises(UserError, match=r"no config.json; pass a Hugging Face model folder"):
        hf_to_dcp(tmp_path, tmp_path / "dcp")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())

    def change(**keys: object) -> None:
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | keys))

    change(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(UserError, match=r"do not fit its config.json"):
        hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    with pytest.raises(UserError, match=r"release lacks 11 of the 36 weights.*\n  model.layers.2"):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "out", tmp_path / "hf")
    change(vocab_size=400)
    with pytest.raises(UserError, match=r"other shapes.*\n  model.embed_tokens.weight: checkpoint \(321, 32\)"):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "out", tmp_path / "hf")
    change(architectures=["MyModel"])
    with pytest.raises(UserError, match="no class 'MyModel'"):
        hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    change(model_type="mine")
    with pytest.raises(UserError, match=r"config.json: .*mine"):
        hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    assert not (tmp_path / "out").exists() and sorted(p.name for p in (tmp_path / "dcp").iterdir())[1] == "release"


def test_damaged_weights_are_not_converted(tmp_path: Path) -> None:
    hf.write_folder(tmp_path / "hf", "qwen3", False)
    file = hf_to_dcp(tmp_path / "hf", tmp_path / "dcp") / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    damaged = r"release is damaged and is not converted:\n  __0_0.distcp is not what was saved"
    with pytest.raises(UserError, match=damaged):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "out", tmp_path / "hf")
    with pytest.raises(UserError, match=damaged):
        copy_checkpoint(tmp_path / "dcp", tmp_path / "copy")
    (tmp_path / "hf" / "model.safetensors").unlink()
    for index in ("[]", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": 1, "b": "c"}}'):
        (tmp_path / "hf" / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match="is not a safetensors index"):
            hf_to_dcp(tmp_path / "hf", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "hf"]


def test_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hf.write_folder(tmp_path / "hf", "qwen3", True)
    monkeypatch.chdir(tmp_path)
    for i, (there, back) in enumerate(
        [
            (
                "mindspeed-mm convert hf-to-dcp --hf-dir hf --dcp-dir dcp{i}",
                "mindspeed-mm convert dcp-to-hf --load-dir dcp{i} --save-dir out{i} --model-assets-dir hf",
            ),
            (
                "mm-convert Qwen3VLConverter hf_to_dcp --hf_dir hf --dcp_dir dcp{i} --tie_weight",
                "mm-convert Qwen3VLConverter dcp_to_hf --load_dir dcp{i} --save_dir out{i} --model_assets_dir hf",
            ),
            (
                "mm-convert ExpertMergeDcpConverter hf_to_dcp --hf_dir hf --save_dir dcp{i}",
                "mm-convert ExpertMergeDcpConverter dcp_to_hf --hf_dir hf --dcp_dir dcp{i} --save_dir out{i}",
            ),
            (
                "mm-convert GenericDCPConverter hf_to_dcp --hf-dir hf --dcp-dir dcp{i} --dcp_prefix model.",
                "mm-convert GenericDCPConverter dcp_to_hf --load_dir dcp{i}/release --save_dir out{i} "
                "--model_assets_dir hf --trust_remote_code true",
            ),
        ]
    ):
        for command in (there, back):
            code, out, err = run(capsys, monkeypatch, command.format(i=i))
            assert code == 0 and out.startswith("wrote "), err
            assert ("not needed" in err) == ("--tie_weight" in command or "--dcp_prefix" in command)
        assert not hf.differing(expected, hf.read_back(tmp_path / f"out{i}", transformers.Qwen3ForCausalLM))


def test_megatron_command_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hf.write_folder(tmp_path / "hf", "qwen2_5_vl", False)
    monkeypatch.chdir(tmp_path)
    layout = "--cfg.parallel_config.llm_pp_layers [[1,1]] --cfg.parallel_config.tp_size 2"
    for command, out in {
        f"hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir hf {layout}": "wrote ",
        f"resplit --cfg.source_dir mm --cfg.target_dir mm2 {layout}": "copied to mm2/release",
        f"mm_to_hf --cfg.mm_dir mm2 --cfg.hf_config.hf_dir hf --cfg.save_hf_dir out {layout}": "wrote ",
    }.items():
        code, said, err = run(capsys, monkeypatch, f"mm-convert Qwen2_5_VLConverter {command}")
        assert code == 0 and said.startswith(out) and "a checkpoint has no parallel layout" in err, err
    native = getattr(transformers, hf.config_of("qwen2_5_vl", False).architectures[0])
    assert not hf.differing(expected, hf.read_back(tmp_path / "out", native))


def test_a_copy_is_the_newest_checkpoint_of_its_folder(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    for iteration in (7, 9):
        store.save(tmp_path / "run", iteration, model=model, optimizer=None, extra={}, rank_state={})
        copy = copy_checkpoint(tmp_path / "run", tmp_path / "copy")
        assert (tmp_path / "copy" / "latest_checkpointed_iteration.txt").read_text() == str(iteration)
        assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in find(tmp_path / "run").iterdir())
    loaded = nn.Linear(3, 2)
    assert store.load(tmp_path / "copy", model=loaded, optimizer=None).iteration == 9
    assert torch.equal(loaded.weight, model.weight)
    with pytest.raises(UserError, match="iter_0000009 exists already"):
        copy_checkpoint(tmp_path / "run", tmp_path / "copy")


def test_mistakes_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command, message in {
        "mindspeed-mm convert hf-to-dcp --hf-dir nowhere --dcp-dir dcp": "error: nowhere: no config.json",
        "mm-convert Qwen3VLConvertor hf_to_dcp": "Did you mean 'Qwen3VLConverter'?",
        "mm-convert Qwen3VLConverter dcp_to_hf --load_dir a --save_dir b": "--model_assets_dir or --hf_dir is missing",
    }.items():
        code, _, err = run(capsys, monkeypatch, command)
        assert code == 1 and message in err and err.count("\n") == 1, err


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf.write_folder(tmp_path / "hf", "qwen3", False)
    hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    command = "mm-convert Qwen2VLConverter resplit --cfg.source_dir dcp --cfg.target_dir file/below"
    code, _, err = run(capsys, monkeypatch, command)
    assert code == 1 and err.endswith("error: [Errno 20] Not a directory: 'file/below'\n")


def test_help_is_quick() -> None:
    start = time.perf_counter()
    probe = "import sys, mindspeed_mm.cli; assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)
    assert time.perf_counter() - start < 5
