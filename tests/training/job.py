"""A tiny training job of documented files, and two ways to run its script: launched by torchrun, or in a pool rank."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tests.data.tiny import save_digits, save_tiny_processor, write_jsonl

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "pretrain_transformers.py"
SCRIPTS = Path(__file__).parent / "scripts"
_LAUNCHER_LINE = re.compile(r"^[EWI]\d{4} \S+ \d+ \S*torch/distributed/", re.MULTILINE)
_ERROR_LINE = re.compile(r"^error( \(rank \d+\))?:", re.MULTILINE)


_QWEN = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_TOKENS = {
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen2_5_vl": _QWEN,
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
    "qwen2_audio": {"audio_token_index": "<|AUDIO|>"},
}


def save_tiny_hf_folder(family: str, folder: Path, vocabulary: int | None = None) -> Path:
    """Write a whole HF folder: processor, config with the processor's token ids, weights.

    Args:
        family: see ``tests.models.tiny``.
        folder: where to.
        vocabulary: words of the model, default as many as the tokenizer has.
    """
    import torch
    import transformers

    from tests.models.tiny import tiny_config

    tokenizer = save_tiny_processor(family.removesuffix("_moe"), folder).tokenizer
    config = tiny_config(family)
    for name, token in _TOKENS[family].items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    config.text_config.vocab_size = vocabulary or len(tokenizer)
    torch.manual_seed(0)
    model_class = getattr(transformers, config.architectures[0])
    model_class._from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def copy_with_dropout(hf_folder: Path, folder: Path) -> Path:
    """Copy an HF folder, with dropout in its text model's attention."""
    shutil.copytree(hf_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.3
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Job:
    """The files and flags of a run, to be changed before :meth:`command` writes them.

    Attributes:
        folder: everything lies here; it is the working directory too.
        rows: of ``train.jsonl``; text is written as it is, None writes no file.
        data, model, yaml: the config files' contents; a yaml that is text is written as it is.
        flags: the command line, without the leading dashes; True is a bare flag, None leaves it out, a list
            is several words.
        script: the entry script.
    """

    def __init__(self, folder: Path, hf_folder: Path) -> None:
        self.folder = folder
        self.rows: list[Any] | str | None = save_digits(folder)
        self.data: dict[str, Any] = {
            "dataset_param": {
                "dataset_type": "huggingface",
                "preprocess_parameters": {"model_name_or_path": str(hf_folder)},
                "basic_parameters": {"dataset_dir": str(folder), "dataset": "train.jsonl"},
                "attr": {
                    "messages": "messages",
                    "images": "images",
                    "role_tag": "role",
                    "content_tag": "content",
                    "user_tag": "user",
                    "assistant_tag": "assistant",
                },
            },
            "dataloader_param": {
                "dataloader_mode": "sampler",
                "sampler_type": "BaseRandomBatchSampler",
                "shuffle": False,
                "collate_param": {"model_name": "qwen3vl"},
            },
        }
        self.model: dict[str, Any] = {"model_id": "qwen3_vl", "init_from_hf_path": str(hf_folder)}
        self.yaml: dict[str, Any] | str = {
            "sharding_size": "auto",
            "sub_modules_to_wrap": ["model.visual.blocks.{*}", "model.language_model.layers.{*}"],
        }
        self.flags: dict[str, Any] = {
            "use-torch-fsdp2": True,
            "fsdp2-config-path": "fsdp2_config.yaml",
            "mm-data": "data.json",
            "mm-model": "model.json",
            "micro-batch-size": 1,
            "global-batch-size": 2,
            "train-iters": 4,
            "lr": "1e-3",
            "log-interval": 1,
            "eval-iters": 0,
            "num-workers": 0,
            "ckpt-format": "torch_dcp",
            "distributed-backend": "nccl",
        }
        self.script = SCRIPT

    def use_script(self, text: str, name: str = "pretrain_custom.py") -> None:
        """Run this script instead of the repository's."""
        self.script = self.folder / name
        self.script.write_text(text, encoding="utf-8")

    def command(self) -> list[str]:
        """Write the files and return the script with its flags."""
        if isinstance(self.rows, str):
            (self.folder / "train.jsonl").write_text(self.rows, encoding="utf-8")
        elif self.rows is not None:
            write_jsonl(self.folder / "train.jsonl", self.rows)
        for name, content in (("data.json", self.data), ("model.json", self.model), ("fsdp2_config.yaml", self.yaml)):
            text = content if isinstance(content, str) else json.dumps(content)  # YAML reads JSON
            (self.folder / name).write_text(text, encoding="utf-8")
        words = [str(self.script)]
        for flag, value in self.flags.items():
            if value is not None:
                values = value if isinstance(value, list) else [value]
                words += [f"--{flag}"] if value is True else [f"--{flag}", *map(str, values)]
        return words


@dataclass(frozen=True)
class Outcome:
    """What a run left: exit code, everything it printed, in order, and when it ended (seconds since the epoch)."""

    code: int
    text: str
    ended: float

    @property
    def losses(self) -> list[float]:
        """The logged training losses."""
        return [float(value) for value in re.findall(r"iteration +\d+/.*\| loss: (\S+) \|", self.text)]

    def error(self) -> str:
        """Return the one message of ours, after checking that it is the only one and the last thing of ours."""
        found = list(_ERROR_LINE.finditer(self.text))
        assert self.code != 0 and len(found) == 1, f"exit code {self.code}, {len(found)} messages in:\n{self.text}"
        before, after = self.text[: found[0].start()], self.text[found[0].start() :]
        launcher = _LAUNCHER_LINE.search(after)
        message, summary = (after[: launcher.start()], after[launcher.start() :]) if launcher else (after, "")
        assert "Traceback" not in before and summary.count("Traceback") <= 1, self.text
        return message.strip()


def launch(job: Job, *, nproc: int = 2, timeout: float = 150.0, env: dict[str, str] | None = None) -> Outcome:
    """Run the job by torchrun on ``nproc`` ranks, as a user does.

    Raises:
        subprocess.TimeoutExpired: it hangs.
    """
    return torchrun(job.command(), job.folder, "--standalone", nproc=nproc, timeout=timeout, env=env)


def torchrun(
    command: list[str],
    folder: Path,
    *options: str,
    nproc: int = 2,
    timeout: float = 150.0,
    env: dict[str, str] | None = None,
) -> Outcome:
    """Run a script with its flags by torchrun, with the given options of torchrun's own.

    Raises:
        subprocess.TimeoutExpired: it hangs.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(nproc), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    process = subprocess.run(
        launcher + command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(process.returncode, process.stdout, time.time())


class _Both(io.TextIOBase):
    """Writes to two streams."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
            stream.flush()
        return len(text)


def run_here(command: list[str], folder: Path) -> Outcome:
    """Run a script in this process, for pool ranks: a process group that exists is used.

    What the script registers and imports from beside it is forgotten afterwards.
    """
    from mindspeed_mm.models.common.modelzoo import ModelHub

    output, code = io.StringIO(), 0
    before = sys.argv, os.getcwd(), sys.path[:]
    mappings, modules = dict(ModelHub.MODEL_MAPPINGS), set(sys.modules)
    try:
        sys.argv = command
        sys.path.insert(0, os.path.dirname(command[0]))
        os.chdir(folder)
        # What the run says on its way out has to be seen, though a rank of several then leaves without coming back.
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(_Both(output, sys.stderr)):
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        sys.argv, sys.path[:] = before[0], before[2]
        os.chdir(before[1])
        ModelHub.MODEL_MAPPINGS.clear()
        ModelHub.MODEL_MAPPINGS.update(mappings)
        for name in set(sys.modules) - modules:
            if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    return Outcome(code, output.getvalue(), time.time())


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the hash of every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
