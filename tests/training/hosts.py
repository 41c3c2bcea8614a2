"""Two hosts on one machine: Linux network namespaces, joined by a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.training.job import ROOT, Outcome

_NAMES = ("mm-a", "mm-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
_PORT = 29431
# torchrun tells a host that joins a running rendezvous the address of the store only without this optimisation.
_REJOIN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def why_not() -> str | None:
    """Return why this machine cannot have them, None if it can."""
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        return "needs root on Linux, with ip and unshare"
    try:
        _ip("netns", "add", "mm-probe")
        _ip("netns", "del", "mm-probe")
    except (subprocess.SubprocessError, OSError) as error:
        return f"network namespaces are not permitted here: {error}"
    return None


class Agent:
    """torchrun on one of the hosts, which prints into a file."""

    def __init__(self, host: int, command: list[str], log: Path, env: dict[str, str], mounts: dict[Path, Path]) -> None:
        self.host = host
        self.log = log
        inside = ["ip", "netns", "exec", _NAMES[host], "unshare", "--uts", "--mount", "sh", "-c"]
        names = log.with_suffix(".hosts")
        pairs = ("127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(ADDRESSES, _NAMES, strict=True)))
        names.write_text("".join(f"{pair}\n" for pair in pairs))
        bind = "".join(
            f"mount --bind {there} {here} && " for here, there in {Path("/etc/hosts"): names, **mounts}.items()
        )
        line = f'hostname {_NAMES[host]} && {bind}exec "$0" "$@"'
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [*inside, line, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
                start_new_session=True,
            )

    def wait(self, seconds: float) -> Outcome:
        """Return what it left.

        Raises:
            subprocess.TimeoutExpired: it goes on for longer.
        """
        code = self.process.wait(seconds)
        return Outcome(code, self.log.read_text(), time.time())

    def wait_for(self, text: str, seconds: float) -> None:
        """Return when ``text`` was printed; raises AssertionError if that takes longer."""
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)


class Hosts:
    """Both hosts and what runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agents: list[Agent] = []

    def __enter__(self) -> Hosts:
        self._remove()
        for name in _NAMES:
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", _NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", _NAMES[1])
        for name, address in zip(_NAMES, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in range(2):
            self.die(host)
        self._remove()

    def _remove(self) -> None:
        for name in _NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)

    def launch(
        self, host: int, command: list[str], *, restarts: int = 0, mounts: dict[Path, Path] | None = None
    ) -> Agent:
        """Start the script with its flags on one rank of a host, which sees other folders at some paths."""
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{_PORT}", "--rdzv-id", "test"]
        nodes = ["--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", str(restarts)]
        address = ["--local-addr", ADDRESSES[host]]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, *rendezvous, *address]
        log = self.folder / f"host_{host}.log"
        agent = Agent(host, [*torchrun, *command], log, {"GLOO_SOCKET_IFNAME": "eth0", **_REJOIN}, mounts or {})
        self.agents.append(agent)
        return agent

    def cut(self) -> None:
        """Cut the cable: packets vanish, and nobody is told."""
        _ip("-n", _NAMES[1], "link", "set", "eth0", "down")

    def join(self) -> None:
        """Repair it."""
        _ip("-n", _NAMES[1], "link", "set", "eth0", "up")

    def die(self, host: int) -> None:
        """Kill everything that runs on a host."""
        found = subprocess.run(
            ["ip", "netns", "pids", _NAMES[host]], check=False, capture_output=True, text=True, timeout=20
        )
        for pid in map(int, found.stdout.split()):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        for agent in self.agents:
            if agent.host == host:
                agent.process.wait(20)
