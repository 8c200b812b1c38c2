"""When a loader's worker processes end: with their run, and not before it."""

from __future__ import annotations

import os
import signal
import threading
import time

TELLS_SENDER = hasattr(signal, "sigtimedwait")
"""Whether this system says who sent a signal."""


def begin_worker(worker: int = 0) -> None:
    """Have a worker end when the process that started it says so or is gone, and at no other's word; a
    `worker_init_fn`.

    A signal to a whole process group reaches workers too, while their run may still finish the step that it is at: they
    outlive it. PyTorch's own worker looks for its parent between two pools alone, and one that waits in Streaming for
    others that are dead too would stay for ever.
    """
    parent = os.getppid()
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
