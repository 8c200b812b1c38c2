"""A second live run of one name is refused; a run that was killed stops nobody."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from corpora import draw_corpus, recipe, write_recipe
from runs import composer, run, trainer_of

from clipcov_stream import alone
from clipcov_stream.alone import Alone
from clipcov_stream.ledger import read_ledger
from clipcov_stream.train import main

HOLDER = """
import os, sys, time
from clipcov_stream.alone import Alone
Alone(sys.argv[1:2], sys.argv[2:]).take()
child = os.fork()  # a loader's worker, which outlives its trainer
if child:
    print(child, flush=True)
time.sleep(300)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus"))


@contextmanager
def holder(*places: Path) -> Iterator[tuple[int, int]]:
    """A process that has the locks of a folder and of files, and one forked from it; their numbers."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, *map(str, places)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process.pid, child
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


def recorded(corpus: Path, runs: Path, **sections: Any) -> dict[str, Any]:
    files = {"ledger": str(runs / "ledger"), "metrics_file": str(runs / "r.jsonl"), "save_folder": str(runs / "saved")}
    return recipe(corpus, **{"run_name": "r", "autoresume": True, "max_duration": "3ba", **files, **sections})


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path: Path, corpus: Path) -> None:
    runs = tmp_path / "runs"
    tree = recorded(corpus, runs)
    with holder(runs / "ledger", runs / "r.jsonl") as (pid, child):
        locks = sorted(path for path in runs.rglob("*") if path.is_file())
        assert locks == [runs / ".r.jsonl.lock", runs / "ledger" / ".clipcov.lock"]
        host = os.uname().nodename
        with pytest.raises(ValueError, match=rf"live run writes to '.*/ledger': process {pid} on host {host}\. Wait"):
            trainer_of(tmp_path, tree)
        beside = {**tree, "ledger": None}
        with pytest.raises(ValueError, match=rf"live run writes to '.*/r\.jsonl': process {pid} on"):
            trainer_of(tmp_path, beside)
        assert not (runs / "saved").exists()  # made for its lock alone
        assert sorted(path for path in runs.rglob("*") if path.is_file()) == locks
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.kill(child, 0)  # it lives, and holds nothing
        main(str(write_recipe(tmp_path / "recipe.yaml", tree)), [])
    assert len(set(read_ledger(runs / "ledger")[0].step.tolist())) == 3
    assert not list(runs.rglob("*.lock"))


def test_a_trainer_has_its_locks_until_it_is_closed(tmp_path: Path, corpus: Path) -> None:
    runs = tmp_path / "runs"
    script = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def is_locked(place: Path) -> bool:
        command = [sys.executable, "-c", script, str(place / ".clipcov.lock")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0 or "BlockingIOError" in done.stderr
        return done.returncode != 0

    tree = recorded(corpus, runs, save_folder=None, autoresume=False)
    trainer, _, _ = run(tmp_path, tree)
    assert is_locked(runs / "ledger")
    again, _, _ = trainer_of(tmp_path, tree)  # in one process it is the caller's matter
    trainer.close()
    assert is_locked(runs / "ledger")
    again.close()
    assert not list(runs.rglob("*.lock")) and not alone.HELD


def test_all_ranks_of_a_second_run_stop(tmp_path: Path, corpus: Path) -> None:
    runs = tmp_path / "runs"
    path = write_recipe(tmp_path / "recipe.yaml", recorded(corpus, runs))
    with holder(runs / "saved") as (pid, _):
        command = [*composer(), "-n", "2", "-m", "clipcov_stream", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode != 0 and f"process {pid} on host" in done.stdout + done.stderr
    assert [each.name for each in runs.rglob("*") if each.is_file()] == [".clipcov.lock"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    locks = Alone([tmp_path])
    locks.take()
    locks.release()
    assert f"{tmp_path} cannot be locked" in caplog.text and os.strerror(code) in caplog.text
    caplog.clear()
    Alone(["/proc/nowhere"], ["/proc/version"]).take()  # nobody can make a file there
    assert caplog.text.count("cannot be locked") == 2


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_on_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder removes it as it ends, between another's opening and locking it."""
    path, lockf, tries = tmp_path / ".clipcov.lock", fcntl.lockf, []

    def removed(file: int, how: int) -> None:
        tries.append(os.fstat(file).st_ino)
        if len(tries) == 1:
            path.unlink()
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", removed)
    locks = Alone([tmp_path])
    locks.take()
    assert len(tries) == 2 and path.stat().st_ino == tries[1]
    path.unlink()  # and with its folder, as between two runs of a notebook
    again = Alone([tmp_path])
    again.take()
    assert len(tries) == 3 and path.exists()
    again.release()
    assert not path.exists() and not alone.HELD


def test_a_forked_process_gives_nothing_back(tmp_path: Path) -> None:
    locks = Alone([tmp_path])
    locks.take()
    child = os.fork()
    if not child:
        locks.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".clipcov.lock").exists()
    locks.release()
    assert not (tmp_path / ".clipcov.lock").exists()


def test_a_start_that_fails_leaves_no_folder_of_its_own(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "runs").mkdir()
    places = {name: str(tmp_path / "runs" / "new" / name) for name in ("ledger", "gallery")}
    places["metrics_file"] = str(tmp_path / "runs" / "new" / "metrics.jsonl")
    tree = recipe(corpus, **places, stream={"local": str(tmp_path / "missing")})
    with pytest.raises(ValueError, match="missing"):
        trainer_of(tmp_path, tree)
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "runs" / "new" / "ledger").mkdir(parents=True)
    (tmp_path / "runs" / "new" / "mine.txt").write_text("to be kept")
    with pytest.raises(ValueError, match="missing"):
        trainer_of(tmp_path, tree)
    assert sorted(path.name for path in (tmp_path / "runs" / "new").iterdir()) == ["ledger", "mine.txt"]
