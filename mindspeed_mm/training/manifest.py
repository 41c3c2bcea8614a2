"""``run_manifest.json``: what a run was made of, for whoever wants to repeat or to compare it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mindspeed_mm import accelerator
from mindspeed_mm.arguments import road_of
from mindspeed_mm.checkpoint.coordination import rank, run_together
from mindspeed_mm.configs.fsdp2 import load_fsdp2_config
from mindspeed_mm.engine import Engine
from mindspeed_mm.errors import UserError
from mindspeed_mm.optimizer import ParameterGroup
from mindspeed_mm.optimizer.schedule import Schedule
from mindspeed_mm.training.checkpointing import plain_values

FILE = "run_manifest.json"
_PACKAGES = ("mindspeed-mm", "torch", "transformers", "megatron-core", "datasets", "numpy", "torch-npu")


def write_manifest(folder: str | Path, entry: dict[str, Any]) -> None:
    """Add this start of the run to ``<folder>/run_manifest.json``. A collective; rank 0 writes.

    The file holds ``{"starts": [...]}``, one object for each time that the run was started, the newest last. It is
    replaced as a whole, so that a kill leaves the old one or the new one.

    Raises:
        UserError: the file that is there is not a manifest, or it cannot be written; raised on all ranks.
    """
    run_together(f"writing {Path(folder) / FILE}", lambda: _write(Path(folder), entry) if rank() == 0 else None)


def _write(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / FILE
    starts = []
    if path.exists():
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a manifest of earlier starts ({error}); move it away or delete it."
            ) from error
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"starts": [*starts, entry]}, file, indent=1, ensure_ascii=False, default=str)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def describe_run(args: Namespace, groups: Sequence[ParameterGroup]) -> dict[str, Any]:
    """Return one start of a run as plain values.

    Args:
        args: the resolved command line, ``args.mm`` included; ``args.iteration`` is where it starts.
        groups: the optimizer's parameter groups, with the peak learning rate and the first weight decay of each.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "start_iteration": args.iteration,
        "command": sys.argv,
        "arguments": plain_values(vars(args)),
        "configs": {
            **{name: getattr(args.mm, name).to_dict() for name in ("model", "data", "tool") if hasattr(args.mm, name)},
            "fsdp2": load_fsdp2_config(args.fsdp2_config_path).model_dump(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _git(Path(sys.argv[0]).resolve().parent),
        "device": {"type": accelerator.device_type(), "name": accelerator.device_name()},
        "backend": dist.get_backend(),
        "world_size": dist.get_world_size(),
        "parameter_groups": [group.describe(args.lr, args.weight_decay) for group in groups],
    }


def describe_effective(args: Namespace, engine: Engine, schedule: Schedule) -> dict[str, Any]:
    """Return what is really in force, read from the objects that are about to train.

    Beside what :func:`mindspeed_mm.precision.recording.effective.effective_values` reads: ``learning_rates`` by the
    number of iterations done, the first 20 and up to 100 others, and how losses and gradients are combined.
    """
    last = args.train_iters or 0
    steps = sorted({*range(min(last, 20) + 1), *range(0, last, last // 100 + 1)})
    loss = "per_token" if args.calculate_per_token_loss else "per_sample" if args.calculate_per_sample_loss else "mean"
    found = _effective_values(args, engine)
    found["learning_rates"] = {step: schedule.preview(step * args.global_batch_size) for step in steps}
    found["loss"] = loss
    found["clip_grad"] = args.clip_grad
    return found


def _effective_values(args: Namespace, engine: Any) -> dict[str, Any]:
    if road_of(args) == "fsdp2":
        from mindspeed_mm.precision.recording import effective

        return effective.effective_values(engine.module, engine.optimizer)
    from mindspeed_mm.precision.recording.megatron import effective as of_megatron

    return of_megatron.effective_values(engine.module, engine.mains, engine.optimizer, engine.group_names)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path) -> dict[str, Any] | None:
    """Return the commit that the entry script lies in and whether files have changed since; None outside of git."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "modified": bool(changes)}
