"""Record what fills the memory of the device, for pytorch.org/memory_viz."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from mindspeed_mm import accelerator
from mindspeed_mm.configs.tools import MemoryProfileConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.tools.profiler import is_listed, this_rank

logger = logging.getLogger(__name__)

_MIB = 2**20


def _record(max_entries: int | None = None, stacks: str = "all") -> bool:
    """Start to record allocations. Return False, after one warning, on a device that keeps no history of them."""
    if accelerator.memory_history(True, max_entries=max_entries, stacks=stacks):
        return True
    logger.warning("no memory history on %s", accelerator.device_type())
    return False


def _dump(path: str | Path) -> None:
    """Write the allocations recorded so far to ``path``."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    accelerator.memory_snapshot(str(path))


def _stop() -> None:
    """Stop recording allocations."""
    accelerator.memory_history(False)


class MemoryProfiler:
    """The ``memory_profile`` section of tools.json at work.

    ``reset(config)`` comes before the model is built and ``step()`` at the top of every iteration; ``start_step`` and
    ``end_step`` count these calls from 0. ``stop()`` ends a recording that the run was too short to finish.
    """

    def __init__(self) -> None:
        self.reset(MemoryProfileConfig())

    def reset(self, config: MemoryProfileConfig) -> None:
        """Begin anew with ``config``.

        Raises:
            UserError: it is enabled and its range of steps is empty.
        """
        if config.enable and config.end_step <= config.start_step:
            raise UserError(
                f"tools.json: memory_profile.end_step is {config.end_step}; it must be greater than start_step, which "
                f"is {config.start_step}."
            )
        self._config = config
        self._on = config.enable and is_listed(this_rank(), config.dump_ranks)
        self._recording = False
        self._calls = 0
        self._advance()

    def step(self) -> None:
        """Count one iteration that is about to run."""
        self._calls += 1
        self._advance()

    def stop(self) -> None:
        """Write what was recorded, if anything is being recorded."""
        if not self._recording:
            return
        self._recording = False
        name = f"snapshot_{datetime.now():%Y-%m-%d-%H-%M}_{this_rank()}.pickle"
        _dump(Path(self._config.save_path) / name)
        _stop()

    def _advance(self) -> None:
        if not self._on:
            return
        if self._config.mem_info:
            stats = accelerator.memory_stats()
            peaks = (f"{name}: {stats[name] / _MIB:.1f}" for name in ("max_reserved", "max_allocated"))
            print(f"[Rank {this_rank()}] step {self._calls} memory (MB) | {' | '.join(peaks)}", flush=True)
        if self._calls == self._config.start_step:
            self._recording = _record(self._config.max_entries, self._config.stacks)
        elif self._calls == self._config.end_step:
            self.stop()


memory_profiler = MemoryProfiler()
