"""Ranks as forks of one process that has imported the package.

To start Python and import Composer takes each of them longer than what most tests ask of it. `run_forked` takes the
place of `composer -n N SCRIPT ARGUMENTS`: the same environment, every rank a process of its own, and one that fails
ends the others. What is about the launcher itself starts the launcher.

Run as a script this is that process: a request per line of its input, an answer per line of its output.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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
        assert answer, f"the process that ranks are forks of has ended: {self.process.wait()}"
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


stem: Stem | None = None


@dataclass(frozen=True)
class Ended:
    """What ranks wrote, one after the other, and the first exit code that is not 0."""

    returncode: int
    stdout: str
    stderr: str


def run_forked(
    folder: Path,
    num_ranks: int,
    *arguments: str | Path,
    timeout: float = 200,
    cwd: Path | None = None,
    **environment: str,
) -> Ended:
    """`python ARGUMENTS` on so many ranks: a script, or "-m" and a module, with what it is given.

    Args:
        folder: for what ranks write.
        environment: beside one's own.

    Raises:
        TimeoutError: they took longer than `timeout` seconds; they are ended then.
    """
    global stem
    stem = stem or Stem()
    said = [str(folder / f"said_{time.monotonic_ns()}_{rank}") for rank in range(num_ranks)]
    answer = stem.ask(
        argv=list(map(str, arguments)),
        environment={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        directory=str(cwd or os.getcwd()),
        said=said,
        timeout=timeout,
    )
    out, err = ("".join(Path(f"{name}.{kind}").read_text(encoding="utf-8") for name in said) for kind in KINDS)
    if answer["late"]:
        raise TimeoutError(f"{arguments} on {num_ranks} ranks took longer than {timeout} s\n{out[-3000:]}{err[-3000:]}")
    return Ended(next((code for code in answer["codes"] if code), 0), out, err)


def serve() -> None:
    import clipcov_stream.train  # noqa: F401  (what takes long)

    assert threading.active_count() == 1, threading.enumerate()  # a fork has only the thread that forks
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(served(json.loads(line))), file=answers, flush=True)


def served(request: dict[str, Any]) -> dict[str, Any]:
    num_ranks, port = len(request["said"]), free_port()
    ranks = {}
    for rank in range(num_ranks):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_PORT": port}
        numbers |= {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        environment = {**request["environment"], **{name: str(number) for name, number in numbers.items()}}
        environment["MASTER_ADDR"] = "127.0.0.1"
        child = os.fork()
        if child == 0:
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


def become(request: dict[str, Any], environment: dict[str, str], said: str) -> NoReturn:
    """A rank, from here on."""
    code = 1
    try:
        os.setpgid(0, 0)
        for number, kind in enumerate(KINDS, 1):
            os.dup2(os.open(f"{said}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.close(0)
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
