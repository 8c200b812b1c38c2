"""When a loader's worker processes end: with their run, and not before it."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any


def begin_worker(worker: int = 0) -> None:
    """A `worker_init_fn`."""
    outlive_signals()
    end_with_parent(worker)


def outlive_signals() -> None:
    """Have a worker outlive a signal to its whole process group: its run may still finish the step it is at.

    The run ends its workers by other means, and those that hang by a SIGTERM of its own, of which the second is heeded.
    """
    told: list[int] = []

    def at_second(number: int, frame: Any) -> None:
        told.append(number)
        if len(told) > 1:
            raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, at_second)


def end_with_parent(worker: int = 0) -> None:
    """Have a worker end with the process that started it, whatever it is doing.

    PyTorch's looks for its parent between two pools alone, and one that waits in Streaming for others that are dead too
    would stay for ever.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name=f"parent of worker {worker}").start()
