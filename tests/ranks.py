"""A pool of real gloo ranks that lives as long as the test session.

Starting a rank costs seconds of imports, so the ranks are started once for each world size and then run one
test function after the other. A function is sent by name: it must be at the top level of an importable module.
"""

from __future__ import annotations

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.multiprocessing as mp

_MOST_THREADS = 250
"""Of a rank; then new ones are started. Each parallel layout leaves groups of gloo, whose threads never rest."""


def free_port() -> int:
    """Return a TCP port that nothing listens on right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(rank: int, world_size: int, port: int, tasks: mp.Queue, results: mp.Queue) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TOKENIZERS_PARALLELISM="false",
    )
    import torch
    import torch.distributed as dist

    mp.set_start_method("fork", force=True)  # as in a rank of torchrun's; a spawned process would spawn its workers
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    while (task := tasks.get()) is not None:
        function, args, kwargs = task
        try:
            results.put((rank, True, function(*args, **kwargs), _threads()))
        except BaseException:  # noqa: BLE001 - whatever it was, the test process shows it
            results.put((rank, False, traceback.format_exc(), _threads()))
    dist.destroy_process_group()


def _threads() -> int:
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0


class RankPool:
    """``world_size`` processes joined by a default gloo process group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank and return the results in rank order.

        Raises:
            AssertionError: a rank raised, died or did not answer within ``timeout`` seconds. The pool is then
                thrown away, because the surviving ranks may be stuck in a collective.
        """
        if not self._processes:
            self._start()
        for tasks in self._tasks:
            tasks.put((function, args, kwargs))
        answers: dict[int, Any] = {}
        failures: list[str] = []
        most_threads = 0
        for _ in range(self.world_size):
            try:
                rank, ok, value, threads = self._answer(timeout if not failures else 5.0)
            except queue.Empty:
                exits = [p.exitcode for p in self._processes]
                failures.append(f"a rank left, or did not answer within {timeout} s; exit codes so far: {exits}")
                break
            most_threads = max(most_threads, threads)
            if ok:
                answers[rank] = value
            else:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.stop(kill=True)
            raise AssertionError("\n".join(failures))
        if most_threads > _MOST_THREADS:
            self.stop(kill=True)
        return [answers[rank] for rank in range(self.world_size)]

    def _answer(self, timeout: float) -> Any:
        """Return the next answer; raise ``queue.Empty`` after ``timeout`` seconds, and soon after a rank has left."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            left = any(process.exitcode is not None for process in self._processes)
            try:
                return self._results.get(timeout=5.0 if left else 1.0)
            except queue.Empty:
                if left:
                    raise
        raise queue.Empty

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._tasks = [context.Queue() for _ in range(self.world_size)]
        self._results = context.Queue()
        port = free_port()
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            self._processes = [
                context.Process(
                    target=_serve, args=(r, self.world_size, port, self._tasks[r], self._results), daemon=False
                )
                for r in range(self.world_size)
            ]
            for process in self._processes:
                process.start()
        finally:
            os.environ.pop("OMP_NUM_THREADS")
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before

    def stop(self, kill: bool = False) -> None:
        """End the ranks; the next ``run`` starts new ones."""
        for process, tasks in zip(self._processes, getattr(self, "_tasks", []), strict=False):
            if kill:
                process.kill()
            else:
                tasks.put(None)
        for process in self._processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
        self._processes = []
