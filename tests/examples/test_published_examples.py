"""The examples are what users copy: their files must load, and their scripts must start what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.arguments import inert_flags, parse_args, validate_args
from mindspeed_mm.configs.base import load_config
from mindspeed_mm.configs.config import mm_extra_args_provider
from mindspeed_mm.configs.data import DataConfig
from mindspeed_mm.configs.fsdp2 import load_fsdp2_config
from mindspeed_mm.configs.model import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"examples/qwen3vl": "qwen3_vl", "examples/internvl3.5": "internvl"}
SCRIPTS = [*FAMILIES, "examples/quickstart"]
MEGATRON = ["examples/qwen2.5vl", "examples/qwen3vl_moe", "examples/internvl3"]
FOLDERS = [*SCRIPTS, *MEGATRON, *(f"{folder}/tiny" for folder in [*FAMILIES, *MEGATRON])]


@pytest.mark.parametrize("folder", FOLDERS)
def test_config_files_load(folder: str) -> None:
    load_config(DataConfig, ROOT / folder / "data.json")
    load_config(ModelConfig, ROOT / folder / "model.json")
    if folder.removesuffix("/tiny") not in MEGATRON:
        load_fsdp2_config(ROOT / folder / "fsdp2_config.yaml")


def launch(folder: str, environment: dict[str, str], *flags: str, timeout: float = 60.0) -> str:
    """Run ``pretrain.sh`` of an example from the root of the repository and return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # torchrun is beside this Python
    answer = subprocess.run(
        ["bash", f"{folder}/pretrain.sh", *flags],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert answer.returncode == 0, answer.stdout[-4000:]
    return answer.stdout


def command_of(folder: str, tmp_path: Path, *flags: str, **environment: str) -> list[str]:
    """Return the command line that ``pretrain.sh`` hands to ``torchrun``, from a ``torchrun`` that writes it down."""
    stub = tmp_path / "bin" / "torchrun"
    stub.parent.mkdir()
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$COMMAND_FILE"\n')
    stub.chmod(0o755)
    written = tmp_path / "command"
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    launch(folder, {"PATH": path, "COMMAND_FILE": str(written), "LOG_DIR": str(tmp_path), **environment}, *flags)
    return written.read_text().splitlines()


@pytest.mark.parametrize("folder", SCRIPTS)
def test_script_hands_torchrun_a_valid_command(folder: str, tmp_path: Path) -> None:
    command = command_of(folder, tmp_path, "--train-iters", "7", NPROC_PER_NODE="2", LOAD_PATH="somewhere")
    split = command.index("pretrain_transformers.py")
    launch_flags, flags = command[:split], command[split + 1 :]
    assert launch_flags[launch_flags.index("--nproc_per_node") + 1] == "2"
    args = parse_args(mm_extra_args_provider, argv=flags)
    validate_args(args, world_size=2)
    assert (args.train_iters, args.load, args.use_torch_fsdp2) == (7, "somewhere", True)
    assert Path(ROOT / args.fsdp2_config_path).is_file()


@pytest.mark.parametrize("folder", MEGATRON)
def test_megatron_script_hands_torchrun_a_valid_command(folder: str, tmp_path: Path) -> None:
    command = command_of(folder, tmp_path, "--train-iters", "7", LOAD_PATH="somewhere")
    split = command.index("pretrain_vlm.py")
    launch_flags, flags = command[:split], command[split + 1 :]
    sizes = [int(launch_flags[launch_flags.index(f"--{name}") + 1]) for name in ("nproc_per_node", "nnodes")]
    args = parse_args(mm_extra_args_provider, argv=flags)
    validate_args(args, world_size=sizes[0] * sizes[1])
    assert (args.train_iters, args.load, args.use_torch_fsdp2, args.bf16) == (7, "somewhere", False, True)
    assert args.data_parallel_size * args.tensor_model_parallel_size * args.pipeline_model_parallel_size > 1


def test_quickstart_passes_only_flags_that_count(tmp_path: Path) -> None:
    command = command_of("examples/quickstart", tmp_path)
    args = parse_args(mm_extra_args_provider, argv=command[command.index("pretrain_transformers.py") + 1 :])
    without_effect = args.explicit & inert_flags("fsdp2").keys()
    assert without_effect <= {"untie_embeddings_and_output_weights", "gradient_accumulation_fusion"}


@pytest.mark.ranks
@pytest.mark.parametrize("folder", ["examples/qwen3vl", pytest.param("examples/internvl3.5", marks=pytest.mark.slow)])
def test_tiny_variant_trains_through_the_published_script(folder: str, tmp_path: Path) -> None:
    from tests.data.tiny import save_digits
    from tests.ranks import free_port
    from tests.training.job import save_tiny_hf_folder

    for file in (ROOT / folder / "tiny").iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    save_tiny_hf_folder(FAMILIES[folder], tmp_path / "hf")
    rows = save_digits(tmp_path / "pictures")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {
        "CONFIG_DIR": str(tmp_path),
        "SAVE_PATH": str(tmp_path / "ckpt"),
        "LOG_DIR": str(tmp_path / "logs"),
        "MASTER_PORT": str(free_port()),
        "NPROC_PER_NODE": "2",
        "NUM_WORKERS": "0",
        "GRAD_ACC_STEP": "1",
        "TRAIN_ITERS": "4",
        "LR": "5e-3",
    }
    output = launch(folder, environment, timeout=240.0)
    metrics = [json.loads(line) for line in (tmp_path / "ckpt" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in metrics] == [1, 2, 3, 4]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text().strip() == "4"
    assert "iteration        4/       4 | consumed samples:            8" in output


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("folder", "layout"),
    [
        ("examples/qwen3vl_moe", {}),
        pytest.param("examples/qwen2.5vl", {}, marks=pytest.mark.slow),
        pytest.param(
            "examples/qwen2.5vl", {"TP": "1", "CP": "2", "CP_ALGO": "ulysses_cp_algo"}, marks=pytest.mark.slow
        ),
        pytest.param("examples/internvl3", {}, marks=pytest.mark.slow),
        pytest.param("examples/internvl3", {"TP": "1", "PP": "2"}, marks=pytest.mark.slow),
    ],
)
def test_megatron_example_trains_a_tiny_model(folder: str, layout: dict[str, str], tmp_path: Path) -> None:
    from tests.ranks import free_port

    environment = {
        "CONFIG_DIR": str(tmp_path),
        "MASTER_PORT": str(free_port()),
        "TRAIN_ITERS": "6",
        "PYTHONPATH": str(ROOT),
    }
    launch(folder, {**environment, **layout}, "--tiny", timeout=280.0)
    rows = [json.loads(line) for line in (tmp_path / "ckpt" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
