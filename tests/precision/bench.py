"""Tiny runs on the training path with a record, a fault or a harmless change in them, made in pool ranks."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from mindspeed_mm.precision.finding import Finding
from mindspeed_mm.precision.records.record import Record
from tests.precision.faults import FAULTS, Fault
from tests.precision.more_faults import MORE
from tests.precision.port_faults import PORT
from tests.ranks import RankPool
from tests.training.job import Job, run_here

STEPS = 3
TEXTS = [
    "What digit is this?",
    "Which digit do you see in the picture?",
    "Tell me the digit.",
    "Say the number, please.",
]


def save_model(folder: Path, seed: int = 0) -> Path:
    """Write a tiny Qwen2.5-VL: two vision blocks and a merger, three layers with biases of q, k, v and GQA."""
    import torch
    import transformers

    from tests.data.tiny import save_tiny_processor
    from tests.models.tiny import tiny_config

    tokenizer = save_tiny_processor("qwen2_5_vl", folder).tokenizer
    config = tiny_config("qwen2_5_vl")
    for name, token in {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.num_hidden_layers = 3
    config.text_config.layer_types = ["full_attention"] * 3
    config.text_config.rms_norm_eps = 1e-6
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases and norms that do something
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif "embed_tokens" not in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def make_job(folder: Path, hf_folder: Path, record: Path, dtype: str, ranks: int, seed: int = 0) -> Job:
    """Return a job of three steps of four samples each, with variable lengths, whose first two steps are recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(folder, hf_folder)
    rows = []
    for index in range(STEPS * 4):
        row = json.loads(json.dumps(job.rows[(index + seed) % 8]))
        words = f"<image>\n{TEXTS[index % 4]} Number {index + 100 * seed}."
        row["messages"][0]["content"] = words
        row["messages"][1]["content"] += " It really is." * ((index + seed) % 3)
        rows.append(row)
    job.rows = rows
    job.model = {
        "model_id": "qwen2_5_vl",
        "init_from_hf_path": str(hf_folder),
        "loss_cfg": {"loss_type": "per_token_loss"},
    }
    job.data["dataloader_param"]["collate_param"]["model_name"] = "qwen2vl"
    if dtype == "bf16":
        job.yaml = {**job.yaml, "param_dtype": "bf16", "reduce_dtype": "fp32"}  # type: ignore[dict-item]
    job.flags.update(
        {
            "micro-batch-size": 1 if ranks > 1 else 2,
            "global-batch-size": 4,
            "train-iters": STEPS,
            "lr": "1e-2",
            "weight-decay": "0.1",
            "adam-beta2": "0.95",
            "clip-grad": "0.5",
            "lr-decay-style": "constant",
            "precision-dir": str(record),
            "precision-capture": "steps=0-1,level=module,tensors=*",
            "distributed-backend": "gloo",
        }
    )
    if dtype == "bf16":
        job.flags["bf16"] = True
    return job


def record(
    pool: RankPool,
    folder: Path,
    hf_folder: Path,
    *,
    fault: str | None = None,
    change: Callable[[Job], None] | None = None,
    program: Callable[[], Any] | None = None,
    dtype: str = "fp32",
    perturb: int = 0,
    seed: int = 0,
) -> Record:
    """Train in the pool's ranks and return what was recorded.

    Args:
        pool: of one rank or more.
        folder: for everything.
        hf_folder: the model.
        fault: one of ``FAULTS``, ``MORE`` or ``PORT``.
        change: a harmless change of the job.
        program: a harmless change of the program, a function at the top level of a module.
        dtype: ``fp32`` or ``bf16``.
        perturb: seed of rounding noise.
        seed: which samples.

    Raises:
        AssertionError: the run failed.
    """
    job = make_job(folder, hf_folder, folder / "record", dtype, pool.world_size, seed)
    found = find(fault)
    if found and found.job:
        found.job(job)
    if change:
        change(job)
    if perturb:
        job.flags["precision-perturb"] = perturb
    outcomes = pool.run(train_here, job.command(), str(job.folder), fault, program, timeout=250.0)
    assert all(code == 0 for code, _ in outcomes), outcomes[0][1][-3000:]
    return Record.open(folder / "record")


def train_here(
    command: list[str], folder: str, fault_name: str | None, program: Callable[[], Any] | None = None
) -> tuple[int, str]:
    """Run the training script in this process, with a fault or a harmless change."""
    from mindspeed_mm.models import transformers_model

    fault = find(fault_name)
    with contextlib.ExitStack() as around:
        for change in (fault and fault.program, program):
            if change:
                around.enter_context(change())
        if fault and fault.model:
            original = transformers_model.TransformersModel.__init__

            def build(self: Any, config: Any) -> None:
                original(self, config)
                fault.model(self.model)

            around.enter_context(mock.patch.object(transformers_model.TransformersModel, "__init__", build))
        outcome = run_here(command, Path(folder))
    return outcome.code, outcome.text


def find(name: str | None) -> Fault | None:
    """Return a fault by its name."""
    return None if name is None else {**FAULTS, **MORE, **PORT}[name]


def answers(name: str, found: Finding | None) -> bool:
    """Return whether a finding is the right one for a fault."""
    fault = find(name)
    assert fault is not None
    if found is None or found.step != fault.step or fault.evidence not in found.evidence:
        return False
    return bool(re.fullmatch(fault.phase, found.phase) and re.fullmatch(fault.site, found.site))
