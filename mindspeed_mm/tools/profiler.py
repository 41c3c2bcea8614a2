"""Record what the host and the device do in some iterations, with ``torch.profiler``."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule, tensorboard_trace_handler

from mindspeed_mm import accelerator
from mindspeed_mm.configs.base import Config, load_config
from mindspeed_mm.configs.tools import ProfileConfig, ProfileRequest, StaticProfile
from mindspeed_mm.errors import UserError

logger = logging.getLogger(__name__)

REQUEST_FILE = "profiler_config.json"

_FOR_ASCEND_PROFILER = ("level", "aic_metrics_type", "data_simplification", "analyse", "experimental_config")


def this_rank() -> int:
    """Return the rank the launcher gave this process, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_listed(rank: int, ranks: list[int]) -> bool:
    """Tell whether ``ranks`` covers ``rank``; ``[-1]`` covers all."""
    return rank in ranks or -1 in ranks


class Profiler:
    """The ``profile`` section of tools.json at work: ``start()``, ``step()`` after every iteration, ``stop()``.

    A static profile records a range of iterations that is known beforehand. A dynamic one reads
    ``<config_path>/profiler_config.json`` whenever it changes and records what it asks for, so that a run can be
    looked into without a restart. Iterations count from the start of this process. The profiler of torch runs in
    the recorded iterations and their warm-up only.

    Raises:
        UserError: the range of a static profile is empty.
    """

    def __init__(self, config: ProfileConfig) -> None:
        self._ranks = config.ranks
        self._rank = this_rank()
        self._finished = 0  # iterations
        self._plan: _Plan | None = None
        self._profile: profile | None = None
        self._left = 0  # iterations until the profile under way is complete
        self._requests: Path | None = None
        self._seen: int | None = None  # modification time of the request that was read last
        if config.enable and config.profile_type == "dynamic":
            self._requests = Path(config.dynamic_param.config_path) / REQUEST_FILE
        elif config.enable and is_listed(self._rank, config.ranks):
            self._plan = _Plan.static(config.static_param)

    def start(self) -> None:
        """Begin; call before the first iteration."""
        if self._requests is not None and self._rank == 0 and not self._requests.exists():
            self._requests.parent.mkdir(parents=True, exist_ok=True)
            self._requests.write_text(json.dumps(ProfileRequest().to_dict(), indent=4), encoding="utf-8")
            logger.warning("profiler: edit %s to ask for a profile while training runs", self._requests)
        self._begin_if_due()

    def step(self) -> None:
        """Count one finished iteration."""
        self._finished += 1
        if self._profile is not None:
            self._profile.step()
            self._left -= 1
            if self._left == 0:
                self._end()
        self._begin_if_due()

    def stop(self) -> None:
        """End. A recording under way is written as far as it came; one that never began is reported."""
        if self._profile is not None:
            self._end()
        elif self._plan is not None:
            logger.warning(
                "profiler: no trace was written: the run ended after %d iterations, recording was to start after %d",
                self._finished,
                self._plan.begin + self._plan.warmup,
            )
            self._plan = None

    def _begin_if_due(self) -> None:
        if self._requests is not None:
            self._read_request(self._requests)
        if self._plan is None or self._profile is not None or self._finished < self._plan.begin:
            return
        self._profile = self._plan.build(self._rank)
        self._left = self._plan.warmup + self._plan.active
        self._plan = None
        self._profile.start()

    def _end(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        self._profile = None

    def _read_request(self, file: Path) -> None:
        try:
            changed = file.stat().st_mtime_ns
        except OSError:  # not there (yet)
            return
        if changed == self._seen:
            return
        self._seen = changed
        try:
            request = load_config(ProfileRequest, file)
        except UserError as error:  # a slip of the pen in this file must not end the training
            logger.warning("profiler: the request is not used.\n%s", error)
            return
        if is_listed(self._rank, request.rank_list if request.is_rank else self._ranks):
            self._plan = _Plan.requested(request, self._finished)


@dataclass(frozen=True)
class _Plan:
    """One recording to come."""

    begin: int
    """Finished iterations after which the profiler of torch starts."""
    warmup: int
    """Iterations that it runs but does not record."""
    active: int
    """Iterations that it records."""
    folder: str
    options: dict[str, Any]
    with_cpu: bool = True
    metadata: dict[str, Any] | None = None

    @classmethod
    def static(cls, config: StaticProfile) -> _Plan:
        if config.end_step <= config.start_step:
            raise UserError(
                f"tools.json: profile.static_param.end_step is {config.end_step}; it must be greater than start_step, "
                f"which is {config.start_step}."
            )
        _warn_ascend_only(config)
        warmup = min(config.start_step, 1)  # the first recorded iteration would carry the start-up of the profiler
        return cls(
            begin=config.start_step - warmup,
            warmup=warmup,
            active=config.end_step - config.start_step,
            folder=config.save_path,
            options={
                "record_shapes": config.record_shapes,
                "profile_memory": config.with_memory,
                "with_stack": config.with_stack,
            },
            with_cpu=config.with_cpu,
        )

    @classmethod
    def requested(cls, request: ProfileRequest, finished: int) -> _Plan | None:
        if request.start_step == 0:
            return None
        if 0 < request.start_step < finished + request.warmup:
            logger.warning(
                "profiler: start_step %d with warmup %d is not used: %d iterations are finished. -1 starts at once.",
                request.start_step,
                request.warmup,
                finished,
            )
            return None
        _warn_ascend_only(request)
        options = ("record_shapes", "profile_memory", "with_stack", "with_flops", "with_modules")
        return cls(
            begin=finished if request.start_step == -1 else request.start_step - request.warmup,
            warmup=request.warmup,
            active=request.active,
            folder=request.prof_dir,
            options={name: getattr(request, name) for name in options},
            with_cpu=request.activities is None or "CPU" in request.activities,
            metadata=request.metadata.to_dict(),
        )

    def build(self, rank: int) -> profile:
        recording = profile(
            activities=accelerator.profiler_activities(with_cpu=self.with_cpu),
            schedule=schedule(wait=0, warmup=self.warmup, active=self.active, repeat=1),
            on_trace_ready=tensorboard_trace_handler(self.folder, worker_name=f"rank{rank}"),
            **self.options,
        )
        for key, value in (self.metadata or {}).items():
            recording.add_metadata_json(key, json.dumps(value))
        return recording


def _warn_ascend_only(config: Config) -> None:
    default = type(config)()
    chosen = [name for name in _FOR_ASCEND_PROFILER if config.get(name) != default.get(name)]
    if chosen:
        logger.warning("profiler: %s: for Ascend's own profiler, no effect on torch's", ", ".join(chosen))
