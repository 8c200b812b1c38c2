"""Ranks that are forks: what a test that uses them relies on."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
from forked import run_forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end forks with their parent")

PRINTS = """
import os, random, sys
import numpy as np
from composer.utils import dist
print(sys.argv[1:], dist.get_global_rank(), dist.get_world_size(), random.random(), np.random.rand(), flush=True)
print(__name__, "to stderr", file=sys.stderr)
"""
FAILS = """
import sys, time
from composer.utils import dist
if dist.get_global_rank() == 1:
    sys.exit("rank 1 has had enough")
time.sleep(100)
"""
STAYS = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(100)
"""


def script_of(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_ranks_are_told_who_they_are_and_draw_their_own_numbers(tmp_path: Path) -> None:
    done = run_forked(tmp_path, 2, script_of(tmp_path, PRINTS), "a", "b c")
    assert done.codes == [0, 0] and done.stderr.count("__main__ to stderr") == 2
    lines = [line.rsplit(" ", 4) for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines] == [["['a', 'b c']", str(rank), "2"] for rank in range(2)]
    assert len({number for line in lines for number in line[3:]}) == 4


def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run_forked(tmp_path, 2, script_of(tmp_path, FAILS))
    assert done.codes == [128 + signal.SIGTERM, 1] and done.stderr == "rank 1 has had enough\n"
    assert time.monotonic() - began < 60


def test_one_that_takes_too_long_is_ended_and_said(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"script\.py.* on 1 ranks took longer than 2 s"):
        run_forked(tmp_path, 1, script_of(tmp_path, STAYS), tmp_path / "pid", timeout=2)
    assert gone(int((tmp_path / "pid").read_text()))


def test_an_interrupted_test_leaves_neither_ranks_nor_answers(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    run_forked(tmp_path, 1, script_of(tmp_path, PRINTS))  # the process to fork from is there
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        with pytest.raises(InterruptedError):
            run_forked(tmp_path, 1, script_of(tmp_path, STAYS), tmp_path / "pid")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert forked.stem is None and gone(int((tmp_path / "pid").read_text()))
    assert run_forked(tmp_path, 1, script_of(tmp_path, PRINTS)).codes == [0]


def gone(process: int) -> bool:
    """Whether it ends within some seconds."""
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process}").exists():
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True
