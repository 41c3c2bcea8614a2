from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.configs.config import ConfigReader, MMConfig, merge_mm_args, mm_extra_args_provider
from mindspeed_mm.errors import UserError
from tests.configs.test_documents import HUGGINGFACE, MULTIMODAL, TRANSFORMERS_MODEL


def arguments(folder: Path, data: Any = None, model: Any = None, tool: Any = None, **flags: Any) -> Namespace:
    args = Namespace(mm_data="", mm_model="", mm_tool="", **flags)
    for name, document in (("data", data), ("model", model), ("tool", tool)):
        if document is not None:
            path = folder / f"{name}.json"
            path.write_text(json.dumps(document))
            setattr(args, f"mm_{name}", str(path))
    return args


def test_the_provider_adds_the_three_flags_once() -> None:
    parser = ArgumentParser()
    assert mm_extra_args_provider(mm_extra_args_provider(parser)) is parser
    args = parser.parse_args(["--mm-data", "d.json", "--mm-model=m.json"])
    assert (args.mm_data, args.mm_model, args.mm_tool) == ("d.json", "m.json", "")


def test_the_documents_are_attributes_of_args_mm(tmp_path: Path) -> None:
    args = arguments(tmp_path, HUGGINGFACE, TRANSFORMERS_MODEL, {"profile": {"enable": True}})
    merge_mm_args(args)
    assert args.mm.model.model_id == "qwen3_vl"
    assert args.mm.data.dataset_param.basic_parameters.template == "qwen3_vl"
    assert args.mm.tool.profile.enable is True
    other = copy.deepcopy(args.mm)
    other.model.model_id = "x"
    assert args.mm.model.model_id == "qwen3_vl"
    assert pickle.loads(pickle.dumps(args.mm)).model == args.mm.model


def test_all_three_may_be_left_out() -> None:
    args = Namespace()
    assert merge_mm_args(args) == []
    assert args.mm.tool.profile.enable is False  # the packaged tools.json
    assert not hasattr(args.mm, "model") and getattr(args.mm, "data", None) is None
    with pytest.raises(UserError, match=r"args\.mm\.model is read, but no file was given\. Pass --mm-model <file>\."):
        _ = args.mm.model
    with pytest.raises(AttributeError, match=r"args\.mm has no 'modle'"):
        _ = args.mm.modle


def test_one_error_for_all_files(tmp_path: Path) -> None:
    args = arguments(tmp_path, data={"dataset_param": 1}, model={"modelid": "x"})
    args.mm_tool = "no/such/tools.json"
    with pytest.raises(UserError) as error:
        merge_mm_args(args)
    data, model, tool = str(error.value).splitlines()
    assert "data.json: dataset_param: must be an object" in data
    assert "model.json: modelid: unknown key. Did you mean 'model_id'?" in model
    assert tool.startswith("no/such/tools.json: no such file.")


def test_the_command_line_decides_the_loader(tmp_path: Path) -> None:
    document = copy.deepcopy(HUGGINGFACE)
    document["dataloader_param"] |= {"batch_size": 7, "num_workers": 2}
    flags = {"micro_batch_size": 1, "num_workers": 2, "seed": 42, "seq_length": 1024}
    args = arguments(tmp_path, document, **flags)
    notes = merge_mm_args(args)
    loader = args.mm.data.dataloader_param
    assert (loader.batch_size, loader.num_workers, loader.seed) == (1, 2, 42)
    assert args.mm.data.dataset_param.basic_parameters.seq_length == 1024
    assert notes == [f"{args.mm_data}: dataloader_param.batch_size is 7 there; --micro-batch-size decides, 1 is used."]


def test_the_sequence_length_of_a_multimodal_dataset(tmp_path: Path) -> None:
    document = copy.deepcopy(MULTIMODAL)
    document["dataset_param"]["seq_length"] = 512
    args = arguments(tmp_path, document, seq_length=None)
    assert merge_mm_args(args) == [] and args.mm.data.dataset_param.seq_length == 512
    args.seq_length = 1024
    assert len(merge_mm_args(args)) == 1 and args.mm.data.dataset_param.seq_length == 1024


def test_trust_remote_code_reaches_model_and_processor(tmp_path: Path) -> None:
    for data in (HUGGINGFACE, MULTIMODAL):
        args = arguments(tmp_path, data, TRANSFORMERS_MODEL)
        merge_mm_args(args)
        dataset = args.mm.data.dataset_param
        processor = dataset.preprocess_parameters if data is HUGGINGFACE else dataset.tokenizer_config
        assert not args.mm.model.trust_remote_code and not processor.trust_remote_code
        args.trust_remote_code = True
        merge_mm_args(args)
        dataset = args.mm.data.dataset_param
        processor = dataset.preprocess_parameters if data is HUGGINGFACE else dataset.tokenizer_config
        assert args.mm.model.trust_remote_code and processor.trust_remote_code


@pytest.mark.parametrize(
    ("flag", "loss_type"),
    [("calculate_per_token_loss", "per_token_loss"), ("calculate_per_sample_loss", "per_sample_loss")],
)
def test_loss_flags(tmp_path: Path, flag: str, loss_type: str) -> None:
    for written in ({}, {"loss_type": loss_type}):
        args = arguments(tmp_path, model={"loss_cfg": written}, **{flag: True})
        assert merge_mm_args(args) == [] and args.mm.model.loss_cfg.loss_type == loss_type
    args = arguments(tmp_path, model={"loss_cfg": {"loss_type": "default"}}, **{flag: True})
    with pytest.raises(UserError, match=f"loss_type is 'default', but --{flag.replace('_', '-')} asks for") as error:
        merge_mm_args(args)
    assert "model.json: loss_cfg" in str(error.value)


@pytest.mark.parametrize("written", [{}, {"load_strict": False}, {"load_strict": True}])
@pytest.mark.parametrize("flag", [{}, {"load_strict": False}, {"load_strict": True}])
def test_weights_must_fit_unless_file_or_flag_says_otherwise(
    tmp_path: Path, written: dict[str, bool], flag: dict[str, bool]
) -> None:
    args = arguments(tmp_path, model=written, **flag)
    merge_mm_args(args)
    assert args.mm.model.load_strict is (False not in (*written.values(), *flag.values()))


def test_patches_are_reported(tmp_path: Path) -> None:
    args = arguments(tmp_path, model={"patch": {"scale_grad": True, "ae_float32": False}})
    (note,) = merge_mm_args(args)
    assert "model.json: patch.scale_grad has no effect" in note


def test_documented_names() -> None:
    assert ConfigReader({"a": {"b": 1}}).a.b == 1
    assert not hasattr(MMConfig(), "data")


def test_importing_configs_does_not_import_torch() -> None:
    code = (
        "import sys, mindspeed_mm.configs.config, mindspeed_mm.configs.fsdp2\n"
        "sys.exit(', '.join({'torch', 'megatron', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
