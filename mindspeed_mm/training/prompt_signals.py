"""Signals that are noticed at once: while the main thread is in a long call, Python's own handlers wait for its end."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_END = b"\0"  # no signal has this number


@contextmanager
def noticed_at_once(notice: Callable[[int], None]) -> Iterator[None]:
    """Call ``notice(number)`` in a thread for every signal that has a Python handler; enter in the main thread.

    The handler is called as well, when the main thread comes to it.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reader, notice), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.send(_END)  # closing is not enough: forked processes have the socket too
        thread.join()  # one that is still ending when the interpreter shuts down may abort the process
        writer.close()


def _listen(reader: socket.socket, notice: Callable[[int], None]) -> None:
    with reader:
        while (number := reader.recv(1)) != _END:
            notice(number[0])


# A forked process would write the signals it gets, such as those that end a worker, to its parent's socket.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
