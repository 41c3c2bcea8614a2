from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from mindspeed_mm.training.prompt_signals import noticed_at_once

_IN_A_LONG_CALL = """
from datetime import timedelta
from torch.distributed import TCPStore
from mindspeed_mm.training.exits import ExitWatch

store = TCPStore("localhost", 0, is_master=True)
with ExitWatch(None, None):
    print("here", flush=True)
    store.wait(["never set"], timedelta(seconds=60))
"""


@pytest.mark.ranks
def test_a_rank_leaves_out_of_a_call_that_waits_for_others() -> None:
    process = subprocess.Popen([sys.executable, "-c", _IN_A_LONG_CALL], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    time.sleep(1)  # until it is in the call
    process.terminate()
    assert process.wait(timeout=20) == 0
    assert "with nothing left to save" in process.stdout.read()


def test_it_ends_while_a_forked_process_lives() -> None:
    with noticed_at_once(lambda number: None):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_signals_of_forked_processes_are_their_own() -> None:
    noticed: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with noticed_at_once(noticed.append):
            child = os.fork()
            if not child:
                os.kill(os.getpid(), signal.SIGUSR2)
                os._exit(0)
            os.waitpid(child, 0)
            os.kill(os.getpid(), signal.SIGUSR2)
            deadline = time.monotonic() + 10
            while signal.SIGUSR2 not in noticed and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert noticed.count(signal.SIGUSR2) == 1
