"""The process group of the job, who this rank is in it, and megatron-core's groups on top."""

from __future__ import annotations

import os
import sys
import time
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_mm import accelerator
from mindspeed_mm.distributed import parallel
from mindspeed_mm.distributed.parallel import ParallelSizes
from mindspeed_mm.errors import UserError


@dataclass(frozen=True)
class RankInfo:
    """What the launcher says about this process: the ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE`` variables."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> RankInfo:
        """Read the launcher's variables; a process started without a launcher is rank 0 of 1."""
        return cls(*(int(os.environ.get(name, default)) for name, default in _RANK_VARIABLES))

    @property
    def ranks_of_host(self) -> range:
        """The ranks that this host's launcher started, in the way launchers number them."""
        first = self.rank - self.local_rank
        return range(first, min(first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")), self.world_size))


_owns_process_group = False
_timeout: timedelta | None = None
_host_groups: dict[Any, dist.ProcessGroup] = {}
_attempt = ""
_RANK_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def connect_store(info: RankInfo, timeout: timedelta = timedelta(minutes=5)) -> dist.Store:
    """Return the key-value store of this job, and of this attempt at it. All ranks have to call it.

    torchrun's agent hosts one store for all attempts. Without a prefix per attempt a restarted gloo job reads
    the addresses of the dead one from it.

    Raises:
        UserError: not all ranks came within ``timeout``; on rank 0 it names them.
    """
    global _attempt
    if dist.is_initialized():
        return dist.PrefixStore("mindspeed_mm", dist.distributed_c10d._get_default_store())
    if info.world_size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    store = open_store(info, timeout)
    _attempt = _agree_on_attempt(store, info, timeout)
    return dist.PrefixStore(_attempt, store)


def reconnect_store(info: RankInfo, timeout: timedelta) -> dist.Store:
    """Return another connection to what :func:`connect_store` returned: one waits while another thread uses it."""
    return dist.PrefixStore(_attempt, open_store(info, timeout, host=False))


def open_store(info: RankInfo, timeout: timedelta, *, host: bool = True) -> dist.Store:
    """Connect to the store at ``MASTER_ADDR``, or ``host`` it, if this is for rank 0 to do."""
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=info.world_size,
        is_master=host and info.rank == 0 and not agent_hosts,
        timeout=timeout,
        multi_tenant=True,
    )


def _agree_on_attempt(store: dist.Store, info: RankInfo, timeout: timedelta) -> str:
    """Return a name that all ranks of this attempt, and only they, know.

    ``TORCHELASTIC_RESTART_COUNT`` is none: every agent counts for itself, and that of a host that came back starts
    at 0. So rank 0 makes up a name, the others sign in under it, and rank 0 lets in who did. Who read the name of an
    earlier attempt does not find its own signature there and looks again.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    mine, signed = uuid.uuid4().hex, ""
    others = range(1, info.world_size)
    if info.rank == 0:
        store.set("attempt", mine)
        missing = list(others)
        while missing := [rank for rank in missing if not store.check([f"{mine}/here/{rank}"])]:
            _wait_for(missing, deadline)
        store.set(f"{mine}/all", ",".join(store.get(f"{mine}/here/{rank}").decode() for rank in others))
        return mine
    while True:
        attempt = store.get("attempt").decode()
        if attempt != signed:
            store.set(f"{attempt}/here/{info.rank}", mine)
            signed = attempt
        if store.check([f"{attempt}/all"]) and mine in store.get(f"{attempt}/all").decode().split(","):
            return attempt
        _wait_for([], deadline)


def _wait_for(missing: list[int], deadline: float) -> None:
    if time.monotonic() > deadline:
        who = f"rank(s) {', '.join(map(str, missing[:16]))} of this job" if missing else "all ranks of this job"
        raise UserError(f"timed out waiting for {who} to start; see what they or their hosts print.")
    time.sleep(0.1)


def initialize(
    store: dist.Store | None,
    info: RankInfo,
    *,
    backend: str,
    timeout: timedelta | None,
    sizes: ParallelSizes | None = None,
) -> None:
    """Bind the device, join the default process group and create megatron-core's groups.

    A process group that exists already, or groups of these sizes, are used as they are.

    Args:
        store: where the ranks meet.
        info: who this rank is.
        backend: of the process group.
        timeout: of its collectives.
        sizes: of the groups; default data parallel only.
    """
    global _owns_process_group, _timeout
    _timeout = timeout
    accelerator.set_device(info.local_rank)
    if not dist.is_initialized():
        dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.world_size, timeout=timeout)
        _owns_process_group = True
    accelerator.load_megatron_core()
    parallel.create_groups(sizes or ParallelSizes(), timeout)


def host_group(purpose: str, ranks: Sequence[int] | None = None, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Return the gloo group of the hosts for one purpose; the first call makes it and is a collective of all ranks.

    It is made once in the life of the process group: each has threads that never rest.

    Args:
        purpose: messages of different purposes never meet.
        ranks: default all.
        timeout: default the job's; gloo's own is 30 minutes.
    """
    key = (dist.group.WORLD, purpose, None if ranks is None else tuple(ranks))
    if key not in _host_groups:
        _host_groups[key] = dist.new_group(ranks, backend="gloo", timeout=timeout or _timeout)
    return _host_groups[key]


def owns_process_group() -> bool:
    """Return whether this process is ours: :func:`initialize` joined the job, not somebody who runs us in theirs."""
    return _owns_process_group


def shutdown() -> None:
    """Leave the process groups that :func:`initialize` created."""
    global _owns_process_group
    if not _owns_process_group:
        return
    parallel.destroy_groups()
    dist.destroy_process_group()
    _host_groups.clear()
    _owns_process_group = False


def data_parallel_group() -> dist.ProcessGroup:
    """Return megatron-core's data-parallel group, context-parallel ranks included: what FSDP2 shards over."""
    return parallel.replica_group()


def loader_group() -> dist.ProcessGroup:
    """Return the ranks that read different samples: the data-parallel group without context-parallel ranks."""
    return parallel.loader_group()


def is_last_rank() -> bool:
    """Return whether this is the rank that prints the training log, as in Megatron."""
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


def print_line(message: object) -> None:
    """Print a line in one piece: launchers run ranks unbuffered, and their lines must not mix."""
    sys.stdout.write(f"{message}\n")
    sys.stdout.flush()


def print_rank_0(message: object) -> None:
    """Print on rank 0 only, at once."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print_line(message)


def print_rank_last(message: object) -> None:
    """Print on the last rank only, at once."""
    if is_last_rank():
        print_line(message)


def warn_rank_0(message: str) -> None:
    """Print a warning line to stderr on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        sys.stderr.write(f"warning: {message}\n")


def same_on_all(content: bytes, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether all ranks of ``group``, which speaks on ``device``, pass the same content. Sends 8 bytes."""
    mark = zlib.crc32(content) >> 1  # not every device has unsigned or 64-bit integers
    marks = torch.tensor([mark, -mark], dtype=torch.int32, device=device)
    dist.all_reduce(marks, op=dist.ReduceOp.MAX, group=group)
    read = marks if device.type == "cpu" else marks.cpu()
    return not read.numpy().sum()


def average_over(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the mean of ``values`` over the ranks of ``group``; every rank must call it with the same shape."""
    total = values.clone()
    dist.all_reduce(total, group=group)  # a sum and a division: not every library has an average
    return total / dist.get_world_size(group)
