"""Recorded runs of the Megatron road."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_mm.precision.record import Record
from tests.precision.runs import record
from tests.ranks import RankPool
from tests.training.job import ROOT, Job

TP = {"tensor_model_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}
OTHER_ROAD = {"use_torch_fsdp2": None, "fsdp2_config_path": None, "ckpt_format": "torch_dist"}


def on_megatron(pool: RankPool, job: Job, folder: Path, **flags: Any) -> Record:
    """Run a job of the other road through ``pretrain_vlm.py`` and return its record."""
    script, job.script = job.script, ROOT / "pretrain_vlm.py"
    try:
        return record(pool, job, folder, **{**OTHER_ROAD, **flags})
    finally:
        job.script = script
