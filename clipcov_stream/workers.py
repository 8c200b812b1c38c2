"""When a loader's worker processes end: with their run, and not before it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TELLS_SENDER = hasattr(signal, "sigtimedwait")
"""Whether this system says who sent a signal."""


@contextmanager
def held_signals() -> Iterator[None]:
    """While workers are started, SIGTERM and SIGINT wait, for this thread and until `begin_worker` for a worker.

    In between a worker that a signal to the group reaches would end, or run its parent's handler as its own.
    """
    # A server of forks that begins here would have all that it ever forks deaf to SIGTERM.
    if not TELLS_SENDER or multiprocessing.get_start_method() == "forkserver":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(worker: int = 0) -> None:
    """Have a worker end when the process that started it says so or is gone, and at no other's word; a
    `worker_init_fn`.

    A signal to a whole process group reaches workers too, while their run may still finish the step that it is at: they
    outlive it. PyTorch's own worker looks for its parent between two pools alone, and one that waits in Streaming for
    others that are dead too would stay for ever.
    """
    parent = parent_pid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if TELLS_SENDER:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while os.getppid() == parent:
            if not TELLS_SENDER:
                time.sleep(1)
                continue
            told = signal.sigtimedwait({signal.SIGTERM}, 1)
            if told is not None and told.si_pid == parent:
                os._exit(0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name=f"parent of worker {worker}").start()


def parent_pid() -> int:
    """Of the process that started this one, though it be gone already: `os.getppid` is another's then."""
    parent = multiprocessing.parent_process()
    # A server of forks has forked this one for another, whose number nothing here would ever see.
    if parent is None or parent.pid is None or multiprocessing.get_start_method() == "forkserver":
        return os.getppid()
    return parent.pid
