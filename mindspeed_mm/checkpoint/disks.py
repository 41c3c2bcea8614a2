"""Whether all hosts of a job see the same folder."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from mindspeed_mm.checkpoint.coordination import rank, run_together
from mindspeed_mm.errors import UserError

_PATIENCE_SECONDS = 10.0  # a network file system may show a new file late


def check_shared(flag: str, folder: str | Path) -> None:
    """Check that every rank sees what rank 0 writes into ``folder``, which is made if it is not there. A collective.

    Raises:
        UserError: a rank does not, because its host has a disk of its own there; raised on all ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    folder = Path(folder)
    news = [f".seen_by_all_{uuid.uuid4().hex}", socket.gethostname()]
    dist.broadcast_object_list(news, src=0)
    mark, first_host = folder / news[0], news[1]

    def write() -> None:
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()

    def look() -> None:
        until = time.monotonic() + _PATIENCE_SECONDS
        while not mark.exists():
            if time.monotonic() > until:
                raise UserError(
                    f"{flag} {folder}: rank {rank()} ({socket.gethostname()}) does not see what rank 0 ({first_host}) "
                    "writes there: the hosts have different disks. Give a folder on a disk that all hosts share."
                )
            time.sleep(0.2)

    run_together(f"preparing {folder}", write)
    try:
        run_together(f"looking into {folder}", look)
    finally:
        if rank() == 0:
            mark.unlink(missing_ok=True)
