"""How a run saves: at once or beside the training, what it does when that fails, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mindspeed_mm.checkpoint.background import Background, HostCopy
from mindspeed_mm.checkpoint.coordination import rank, run_together
from mindspeed_mm.checkpoint.publish import folder_name, remove
from mindspeed_mm.checkpoint.retention import Retention, reasons_to_keep
from mindspeed_mm.checkpoint.store import Snapshot, write_snapshot
from mindspeed_mm.distributed.parallel import sizes
from mindspeed_mm.distributed.state import host_group, print_rank_0, warn_rank_0
from mindspeed_mm.errors import UserError

# A slow file system is no hang: ranks that are lost are noticed at once, those that hang by the training's timeout.
_PATIENCE = timedelta(hours=2)


class Saver:
    """Writes checkpoints into one folder, one at a time.

    A save that fails because of the disk costs a warning: the training goes on, what was saved before stays, and the
    next save is the next attempt. Only :meth:`finish` does not put up with it.

    Args:
        folder: where to.
        beside: write in a thread, from a copy in host memory.
        keep: which older checkpoints stay after a save.
        form: what the log calls the format.
        keeper: whether this rank looks after the folder on its disk; default rank 0.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        beside: bool,
        keep: Retention,
        form: str = "torch_dcp",
        keeper: bool | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.keeper = rank() == 0 if keeper is None else keeper
        self.form = form
        self.newest: Path | None = None
        """The newest checkpoint that this run has saved."""
        # Its own gloo group: the thread's messages never meet those of the training.
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = host_group("save", timeout=_PATIENCE) if several else None
        self._copy = HostCopy() if beside else None
        self._background = Background()
        self._again: Callable[[], None] | None = None

    def save(self, iteration: int, take: Callable[[HostCopy | None], Snapshot], loss: float | None = None) -> None:
        """Save what ``take`` collects; waits for the save before. A collective.

        Args:
            iteration: completed iterations.
            take: returns the snapshot, with its tensors copied to the given place if there is one.
            loss: of the evaluation at this iteration.

        Raises:
            RuntimeError: a rank failed, but not because it could not write.
        """
        self.wait()
        print_rank_0(f"saving checkpoint at iteration {iteration:7d} to {self.folder} in {self.form} format")
        self._again = lambda: self._write(self._together(iteration, lambda: take(None)), loss)
        if self._copy is None:
            self._tolerate(self._again)
        else:
            snapshot = self._together(iteration, lambda: take(self._copy))
            self._background.start(lambda: self._write(snapshot, loss))

    def check(self) -> None:
        """Tell about a save that has ended beside the training; called after every step."""
        if not self._background.busy:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        self._tolerate(self._background.wait)

    def finish(self) -> None:
        """See to it that the last save has succeeded; try once more if it has not. A collective.

        Raises:
            UserError: the last state could not be saved.
        """
        self.wait()
        if self._again is not None:
            self._again()

    def _together(self, iteration: int, take: Callable[[], Snapshot]) -> Snapshot:
        snapshot: Snapshot = run_together(f"saving {self.folder / folder_name(iteration)}", take, self.group)
        return snapshot

    def _write(self, snapshot: Snapshot, loss: float | None) -> None:
        self.newest = write_snapshot(self.folder, snapshot, self.group, loss, self.keeper)
        self._again = None
        iteration = snapshot.iteration
        place = f"[ t 1/{sizes().tensor}, p 1/{sizes().pipeline} ]"
        print_rank_0(f"  successfully saved checkpoint from iteration {iteration:7d} to {self.folder} {place}")
        if self.keep and self.keeper:
            try:
                for path, reason in reasons_to_keep(self.folder, self.keep, quick=True).items():
                    if not reason:
                        remove(path)
            except OSError as error:
                warn_rank_0(f"cannot delete old checkpoints in {self.folder}: {error}")

    def _tolerate(self, write: Callable[[], None]) -> None:
        try:
            write()
        except UserError as error:
            stays = f"{self.newest} stays the newest checkpoint" if self.newest else "this run has saved none yet"
            warn_rank_0(f"{error}\nTraining goes on; {stays}; the next save is the next attempt.")
