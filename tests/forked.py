"""Ranks as forks of one process that has imported the package.

To start Python and import Composer takes each of them longer than what most tests ask of it. `run_forked` takes the
place of `composer -n N SCRIPT ARGUMENTS`: ranks are told who they are by the same variables, each is a process of its
own with random numbers of its own, and one that fails ends the others. What is unlike: hashes of strings, and what
modules read from the environment when they were imported, which all forks share; one OpenMP thread; the end of an
interpreter, but for its exit functions. What is about these, or about the launcher, starts the launcher.

Run as a script this is that process: a request per line of its input, an answer per line of its output.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from ports import free_port

KINDS = ("out", "err")
"""Of a rank's files, of what it writes."""

GRACE = 10.0
"""Seconds between SIGTERM to the ranks that are left and SIGKILL."""


class Stem:
    """The process that ranks are forks of."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self.close)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process that ranks are forks of has ended: {self.process.wait(GRACE)}"
        return json.loads(answer)

    def close(self) -> None:
        """With its ranks, which end when it does."""
        atexit.unregister(self.close)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


stem: Stem | None = None


@dataclass(frozen=True)
class Ended:
    """Ranks' exit codes, and what they wrote, one after the other."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """The first that is not 0."""
        return next((code for code in self.codes if code), 0)


def run_forked(
    folder: Path,
    num_ranks: int,
    *arguments: str | Path,
    timeout: float = 200,
    cwd: Path | None = None,
) -> Ended:
    """`python ARGUMENTS` on so many ranks: a script, or "-m" and a module, with what it is given.

    Args:
        folder: for what ranks write.

    Raises:
        TimeoutError: they took longer than `timeout` seconds; they are ended then.
    """
    global stem
    if stem is None or stem.process.poll() is not None:
        stem = Stem()
    said = [str(folder / f"said_{time.monotonic_ns()}_{rank}") for rank in range(num_ranks)]
    try:
        answer = stem.ask(
            argv=list(map(str, arguments)),
            environment={**os.environ, "OMP_NUM_THREADS": "1"},
            directory=str(cwd or os.getcwd()),
            said=said,
            timeout=timeout,
        )
    except BaseException:  # a test's own time is over, or Ctrl-C: the answer to come is nobody's
        stem.close()
        stem = None
        raise
    out, err = ("".join(Path(f"{name}.{kind}").read_text(encoding="utf-8") for name in said) for kind in KINDS)
    if answer["late"]:
        raise TimeoutError(f"{arguments} on {num_ranks} ranks took longer than {timeout} s\n{out[-3000:]}{err[-3000:]}")
    return Ended(answer["codes"], out, err)


def serve() -> None:
    import clipcov_stream.train  # noqa: F401  (what takes long)

    assert threading.active_count() == 1, threading.enumerate()  # a fork has only the thread that forks
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(served(json.loads(line), answers)), file=answers, flush=True)


def served(request: dict[str, Any], answers: IO[str]) -> dict[str, Any]:
    num_ranks, port = len(request["said"]), free_port()
    ranks = {}
    for rank in range(num_ranks):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_PORT": port}
        numbers |= {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        environment = {**request["environment"], **{name: str(number) for name, number in numbers.items()}}
        environment["MASTER_ADDR"] = "127.0.0.1"
        child = os.fork()
        if child == 0:
            answers.close()
            become(request, environment, request["said"][rank])
        ranks[child] = rank
    codes, ends, late = [0] * num_ranks, time.monotonic() + request["timeout"], False
    killed = False
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in ranks:
            codes[ranks.pop(child)] = os.waitstatus_to_exitcode(status)
        if any(codes) and not killed:
            end(list(ranks), signal.SIGTERM)
            ends, killed = min(ends, time.monotonic() + GRACE), True
        if time.monotonic() > ends:
            late = late or not killed
            end(list(ranks), signal.SIGKILL)
            killed, ends = True, time.monotonic() + GRACE
        if not child:
            time.sleep(0.02)
    return {"codes": codes, "late": late}


def end(processes: list[int], number: int) -> None:
    for process in processes:
        os.kill(process, number)


def end_with_parent() -> None:
    """Have Linux kill this process when the one that it is a fork of ends."""
    parent_death_signal = 1
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def become(request: dict[str, Any], environment: dict[str, str], said: str) -> NoReturn:
    """A rank, from here on."""
    code = 1
    try:
        end_with_parent()
        os.setpgid(0, 0)
        random.seed()
        np.random.seed(os.getpid() % 2**31)
        torch.manual_seed(os.getpid())
        for number, kind in enumerate(KINDS, 1):
            os.dup2(os.open(f"{said}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(request["directory"])
        sys.argv = request["argv"]
        if sys.argv[0] == "-m":
            del sys.argv[0]
            sys.path[0] = request["directory"]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


if __name__ == "__main__":
    serve()
