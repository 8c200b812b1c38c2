"""Runs that are told to end, by themselves or with their launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer import Callback


def one_thread() -> dict[str, str]:
    """The environment of now, for a process with sums in the order of other tests' processes."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class Tell(Callback):
    """Sends this process signals as step number `step` begins."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def before_train_batch(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(group: int) -> bool:
    """Whether a process group has any process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def launched_and_told(
    command: Sequence[str], folder: Path, metrics: Path, number: int, to_all: bool, seconds: float
) -> str:
    """What a launcher and its ranks say that get a signal once `metrics` has six lines; nothing of them is left.

    Args:
        folder: for what they say.
        to_all: whether the whole process group gets it, or the launcher alone.
        seconds: that they may take to end.
    """
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=one_thread(),
        )
        try:
            until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_bytes().count(b"\n") > 5))
            (os.killpg if to_all else os.kill)(process.pid, number)
            assert process.wait(seconds) != 0
            until(lambda: not alive(process.pid), 30)
        finally:
            if alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return (folder / "output.txt").read_text(encoding="utf-8")
